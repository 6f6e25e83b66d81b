"""Every public function that takes a path takes text as well."""

import shutil
from pathlib import Path

import pytest
import torch

from boxteacher.data import find_split, read_coco, read_split, write_shapes
from boxteacher.data.images import read_image
from boxteacher.engine.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from boxteacher.engine.convert import convert
from boxteacher.engine.evaluate import evaluate
from boxteacher.engine.export import export
from boxteacher.engine.predict import predict
from boxteacher.engine.weights import build_with_weights, read_released
from boxteacher.errors import InputError
from boxteacher_adapters.parts.backbones import build_backbone


def test_data_sets_are_written_and_read_by_text(tmp_path: Path) -> None:
    root = str(tmp_path / "shapes")
    write_shapes(root, train=2, val=1, size=32)
    write_shapes(root, train=2, val=1, size=32)  # which is there already
    split = find_split(root, "train")
    index, _ = read_coco(str(split.images), str(split.annotations))
    assert len(index) == len(read_split(root, "train")) == 2
    assert read_image(str(index.image_path(0))).shape[0] == 3
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_split(f"{root}/nowhere", "train")
    with pytest.raises(InputError, match=r"gone\.png"):
        read_image(f"{root}/gone.png")


def test_a_checkpoint_is_named_by_text(run: Path, shapes: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copy(run / "last.pt", str(tmp_path / "copied.pt"))
    assert is_checkpoint(checkpoint)
    segmenter, info = load_checkpoint(checkpoint)
    save_checkpoint(str(tmp_path / "copy.pt"), segmenter, info)
    evaluation = evaluate(checkpoint, str(shapes), device="cpu", workers=0)
    assert evaluation.metrics
    images = [str(sorted((shapes / "val").iterdir())[0])]
    assert predict(checkpoint, images, str(tmp_path / "out"), device="cpu").is_file()
    assert export(checkpoint, str(tmp_path / "state.pt"), image=images[0]).is_file()
    size = info.image_size
    options = {"backbone": "resnet18", "weights": checkpoint, "image_size": size}
    build_with_weights("condinst", len(info.class_names), **options)
    with pytest.raises(InputError, match="is a checkpoint of this library already"):
        convert(checkpoint, str(tmp_path / "converted.pt"))


def test_weights_are_named_by_text(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(build_backbone("resnet18", "none").network.state_dict(), file)
    backbone = build_backbone("resnet18", str(file))
    assert backbone.frozen
    assert read_released(str(file)) is None
    with pytest.raises(InputError, match="weights imagnet do not exist: check the path, or give 'imagenet'"):
        build_backbone("resnet18", "imagnet")
