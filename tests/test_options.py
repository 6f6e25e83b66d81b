"""Options declared once: a field on the command line, in the checks and in the docs."""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from boxteacher import InputError
from boxteacher.engine.options import add_options, option, options_table, resolve_options
from boxteacher.engine.settings import TrainSettings

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Settings:
    data: Path = option(help="folder of the data")
    steps: int = option(10, help="optimizer steps", minimum=1)
    rate: float = option(3e-4, help="learning rate", group="training", above=0, maximum=1)
    sides: tuple[int, ...] = option((), help="sides, 100 % whole", default_text="off", minimum=1)
    kind: Literal["box", "mask"] = option("box", help="supervision")
    weights: Path | Literal["none"] = option("none", help="initial weights", metavar="FILE|none")
    warmup: int = option(lambda run: run.steps // 5, help="warm-up", default_text="a fifth of the steps")

    def __post_init__(self) -> None:
        resolve_options(self)


def parsed(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser, Settings)
    return vars(parser.parse_args(arguments))


def test_the_command_line_gives_only_given_options_in_their_types():
    assert parsed() == {}
    arguments = "--data a/b --steps 3 --rate 1 --sides 4 5 --kind mask --weights c.pt --warmup 2"
    given = parsed(*arguments.split())
    assert given == {
        **{"data": Path("a/b"), "steps": 3, "rate": 1.0, "sides": [4, 5], "kind": "mask"},
        **{"weights": Path("c.pt"), "warmup": 2},
    }
    assert type(given["rate"]) is float
    assert Settings(**given).sides == (4, 5)
    assert parsed("--sides", "--weights", "none") == {"sides": [], "weights": "none"}


def test_a_default_may_depend_on_other_options():
    assert Settings(Path("a")).warmup == 2
    assert Settings(Path("a"), steps=50).warmup == 10
    assert Settings(Path("a"), steps=50, warmup=3).warmup == 3
    assert None not in asdict(Settings(Path("a"))).values()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "a whole number, at least 1"),
        ("steps", 1.0, "a whole number, at least 1"),
        ("steps", None, "a whole number, at least 1"),
        ("rate", 0, "a number, above 0 and at most 1"),
        ("rate", 1.5, "a number, above 0 and at most 1"),
        ("rate", math.nan, "a number, above 0 and at most 1"),
        ("rate", "1", "a number, above 0 and at most 1"),
        ("sides", (4, 0), "whole numbers, at least 1"),
        ("sides", 4, "whole numbers, at least 1"),
        ("kind", "boxes", "box or mask"),
        ("weights", 3, "a path or none"),
        ("data", 3, "a path"),
        ("warmup", "1", "a whole number"),
    ],
)
def test_the_error_for_an_invalid_value_names_option_value_and_range(name, value, allowed):
    with pytest.raises(InputError) as caught:
        Settings(**{"data": Path("a"), name: value})
    assert str(caught.value) == f"{name} is {value!r}: give {allowed}"


@pytest.mark.parametrize(("name", "value"), [("rate", 1), ("rate", 1e-9), ("steps", 1), ("sides", ())])
def test_inclusive_bounds_are_allowed(name, value):
    assert getattr(Settings(**{"data": Path("a"), name: value}), name) == value


def test_a_number_of_numpy_is_a_plain_one():
    given = Settings(Path("a"), steps=np.int64(5), rate=np.float32(0.5), sides=[np.int32(4), 5])
    plain = Settings(Path("a"), steps=5, rate=0.5, sides=[4, 5])
    assert given == plain
    assert json.dumps({**asdict(given), "data": ""}) == json.dumps({**asdict(plain), "data": ""})
    with pytest.raises(InputError, match=r"steps is 5\.0: give a whole number"):
        Settings(Path("a"), steps=np.float64(5))


def test_a_path_may_be_text():
    settings = Settings(data="a/b", weights="c")
    assert (settings.data, settings.weights) == (Path("a/b"), Path("c"))
    assert Settings(data="a", weights="none").weights == "none"


def test_the_help_names_meaning_default_and_choices():
    parser = argparse.ArgumentParser(prog="command")
    add_options(parser, Settings)
    text = " ".join(parser.format_help().split())
    assert "--kind box|mask supervision (default: box)" in text
    assert "--sides [SIDES ...] sides, 100 % whole (default: off)" in text
    assert "--weights FILE|none initial weights (default: none)" in text
    assert "training: --rate RATE learning rate (default: 0.0003)" in text
    assert "--warmup WARMUP warm-up (default: a fifth of the steps)" in text
    assert "--data DATA folder of the data --steps" in text


def test_the_table_has_a_row_for_every_option_and_one_for_every_group():
    first, _, *rows = options_table(Settings).splitlines()
    assert first == "| option | meaning | value | default |"
    assert rows[:4] == [
        "| `--data` | folder of the data | a path |  |",
        "| `--steps` | optimizer steps | a whole number, at least 1 | 10 |",
        "| **training** | | | |",
        "| `--rate` | learning rate | a number, above 0 and at most 1 | 0.0003 |",
    ]


def test_the_table_in_the_docs_is_that_of_the_settings():
    """If not: python -m boxteacher.engine.options docs/command_line.md."""
    assert options_table(TrainSettings) in (DOCS / "command_line.md").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "adam"),
        ("augmentation", "weak"),
        ("backbone_lr_factor", 0.0),
        ("weight_decay", -1e-4),
        ("weight_decay", float("nan")),
        ("gradient_clip", -1.0),
        ("gradient_clip", float("inf")),
        ("lr_warmup_steps", -1),
        ("mask_samples", -1),
        ("shortest_side", (640, 0)),
        ("lr_steps", (0, 5)),
        ("lr_steps", (80, 60)),
        ("lr_steps", (60, 60)),
        ("steps", 0),
        ("steps", 2.5),
        ("momentum", 1.5),
        ("iou_threshold", 0.0),
        ("seed", -1),
        ("data", 3),
        ("weights", None),
        ("teacher_size", (640,)),
        ("teacher_size", (800, 640)),
    ],
)
def test_an_invalid_setting_of_a_run_is_named_in_one_line(name, value):
    with pytest.raises(InputError, match=f"^{name} is ") as caught:
        TrainSettings(**{"model": "condinst", "data": Path(), "output": Path(), name: value})
    assert "\n" not in str(caught.value)
