"""Shared by tests of the engine: data sets, commands and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boxteacher.cli import main

Change = Callable[[dict[str, Any]], Any]


def train_arguments(data: Path, output: Path, *more: str) -> list[str]:
    fixed = "--model condinst --backbone resnet18 --weights none --image-size 64 --workers 0 --device cpu"
    where = ["--data", str(data), "--output", str(output)]
    return ["train", *fixed.split(), "--batch-size", "2", "--steps", "3", *where, *more]


def log_of(output: Path, *left_out: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", *left_out)} for line in lines]


def edited(root: Path, copy: Path, split: str, change: Change) -> Path:
    """A copy of a data set whose annotation file has been changed."""
    shutil.copytree(root, copy)
    file = copy / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return copy


def without_masks(content: dict[str, Any]) -> None:
    for record in content["annotations"]:
        del record["segmentation"]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("boxteacher:")]
    assert len(lines) == 1
    assert error.splitlines()[-1] == lines[0]
    assert "Traceback" not in error
    if code == 2:
        assert error.splitlines() == lines
    return lines[0]


def annotation(content: dict[str, Any]) -> dict[str, Any]:
    return content["annotations"][2]


def drop_annotations(content: dict[str, Any]) -> None:
    content["annotations"] = []
