"""Settings and fixtures of all tests."""

from pathlib import Path

import pytest
import torch

from boxteacher.cli import main
from boxteacher.data import write_shapes
from boxteacher.engine.checkpoint import load_checkpoint, save_checkpoint
from tests.engine_support import train_arguments

# The networks are tiny: a second thread costs more than it saves, and changes the rounding of sums.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=8, val=4, size=64)
    return root


@pytest.fixture(scope="session")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(train_arguments(shapes, output)) == 0
    return output


@pytest.fixture(scope="session")
def checkpoint_with_detections(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that detects many objects in any image."""
    segmenter, info = load_checkpoint(run / "last.pt")
    head = segmenter.box_head
    with torch.no_grad():
        head.class_logits.bias.fill_(2.0)
        head.centerness.bias.fill_(2.0)
        head.distances.bias.fill_(2.0)
        head.controller.bias.normal_()
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    save_checkpoint(path, segmenter, info)
    return path
