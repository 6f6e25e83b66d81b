"""Imports: the core needs torch alone, and dependencies point one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = [*(ROOT / "boxteacher").glob("*.py"), *(ROOT / "boxteacher" / "losses").glob("*.py")]
CORE = sorted(path for path in CORE if path.name != "cli.py")
ADAPTERS = sorted((ROOT / "adapters").rglob("*.py"))
USERS = ("boxteacher.data", "boxteacher.engine", "boxteacher.cli")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_the_core_and_the_adapters_are_found():
    names = {path.name for path in CORE}
    assert {"teacher.py", "protocol.py", "pairs.py", "__init__.py"} <= names
    assert "condinst.py" in {path.name for path in ADAPTERS}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_torch_and_itself_only(path):
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "typing_extensions", "boxteacher"}
    for module in imports_of(path):
        assert module.split(".")[0] in allowed
        assert not within(module, USERS)


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.name)
def test_adapters_import_from_the_library_only_names_of_boxteacher_adapter(path):
    import boxteacher.adapter

    declared = {f"boxteacher.adapter.{name}" for name in boxteacher.adapter.__all__}
    assert {module for module in imports_of(path) if within(module, ("boxteacher",))} <= declared


@pytest.mark.parametrize("path", sorted((ROOT / "boxteacher").rglob("*.py")), ids=lambda path: path.name)
def test_the_library_never_imports_an_adapter_by_name(path):
    assert not any(within(module, ("boxteacher_adapters",)) for module in imports_of(path))


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that are loaded after each of three imports, one after another in a new process."""
    imports = ("boxteacher", "boxteacher.cli", "boxteacher_adapters.condinst")
    code = "import sys\n" + "".join(f"import {name}\nprint(*sys.modules)\n" for name in imports)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    lines = result.stdout.splitlines()
    return {name: set(line.split()) for name, line in zip(imports, lines, strict=True)}


def test_importing_the_core_loads_neither_users_nor_adapters_nor_extras(loaded):
    unwanted = ("pycocotools", "timm", "tensorboard", "matplotlib", "boxteacher_adapters", *USERS)
    assert "boxteacher.teacher" in loaded["boxteacher"]
    assert {module for module in loaded["boxteacher"] if within(module, unwanted)} == set()


def test_importing_the_command_line_does_not_load_the_engine(loaded):
    unwanted = ("pycocotools", "boxteacher.engine", "boxteacher.data")
    assert {module for module in loaded["boxteacher.cli"] if within(module, unwanted)} == set()


def test_importing_condinst_does_not_load_timm(loaded):
    assert "boxteacher_adapters.fcos" in loaded["boxteacher_adapters.condinst"]
    assert "timm" not in loaded["boxteacher_adapters.condinst"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_wheel_requires_five_packages_and_ships_every_package():
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    names = {requirement.split(">")[0] for requirement in project["project"]["dependencies"]}
    assert names == {"torch", "torchvision", "pycocotools", "numpy", "typing-extensions"}
    found = {
        ".".join(path.parent.relative_to(base).parts)
        for base, top in ((ROOT, "boxteacher"), (ROOT / "adapters", "boxteacher_adapters"))
        for path in (base / top).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_the_package_and_pyproject_have_the_same_version():
    import boxteacher

    line = f'version = "{boxteacher.__version__}"'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()


def test_every_public_name_is_there():
    import boxteacher
    import boxteacher.adapter
    import boxteacher.losses

    for module in (boxteacher, boxteacher.adapter, boxteacher.losses):
        assert module.__all__ == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
