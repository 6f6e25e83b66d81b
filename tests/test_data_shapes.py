"""The rendered data set: reproducible pixels, exact masks, and objects that differ from the background."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from boxteacher.data import InstanceDataset, read_split, write_shapes
from boxteacher.data.images import read_image
from boxteacher.errors import InputError

GOLDEN = "d73c1b731f89a26f6107152c6465dcf6b4fbee5b12015944d1de843b5910fa54"


def load(root: Path, split: Any = "train") -> InstanceDataset:
    return InstanceDataset(read_split(root, split, read_masks=True))


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(root, train=24, val=4, size=96)
    return root


def lab(image: Tensor) -> Tensor:
    """CIE Lab of sRGB (3, H, W) in [0, 1], under D65."""
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("ij,jhw->ihw", to_xyz, linear) / torch.tensor([0.9505, 1.0, 1.089])[:, None, None]
    x, y, z = torch.where(xyz > 216 / 24389, xyz ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_pixels_of_the_first_image_are_the_recorded_ones(shapes: Path) -> None:
    pixels = np.asarray(Image.open(shapes / "train" / "00001.png"))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN


def test_boxes_are_the_tight_bounds_of_masks_that_do_not_overlap(shapes: Path) -> None:
    for image, target in load(shapes):
        assert max(image.shape[-2:]) <= 96
        assert 1 <= len(target["boxes"]) <= 5
        assert target["masks"].sum(dim=0).max() <= 1
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == tight
            assert mask.sum() >= 96 * 96 / 256


def test_areas_are_those_of_the_masks_and_all_classes_occur(shapes: Path) -> None:
    content = json.loads((shapes / "annotations" / "train.json").read_text())
    data = load(shapes)
    areas = torch.cat([target["masks"].flatten(1).sum(dim=1) for _, target in data])
    assert areas.tolist() == [annotation["area"] for annotation in content["annotations"]]
    labels = torch.cat([target["labels"] for _, target in data])
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert data.index.class_names == ["disc", "triangle", "star", "cross"]


def test_objects_differ_from_the_background_in_cielab(shapes: Path) -> None:
    differences, spreads = [], []
    for image, target in load(shapes):
        colors = lab(image)
        ground = colors[:, ~target["masks"].any(dim=0)].median(dim=1).values
        for mask in target["masks"]:
            mean = colors[:, mask].mean(dim=1)
            differences.append((mean - ground).norm())
            spreads.append((colors[:, mask] - mean[:, None]).norm(dim=0).mean())
    assert torch.stack(differences).quantile(0.05) > 20
    assert torch.stack(spreads).quantile(0.95) < 8


def test_writing_again_changes_nothing_and_writing_elsewhere_gives_the_same_files(tmp_path: Path) -> None:
    write_shapes(tmp_path / "a", train=3, val=2, size=64, seed=5)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_shapes(tmp_path / "a", train=3, val=2, size=64, seed=5)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    (tmp_path / "b").mkdir()
    write_shapes(tmp_path / "b", train=3, val=2, size=64, seed=5)
    write_shapes(tmp_path / "c", train=3, val=2, size=64, seed=6)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["train/00001.png"] != files(tmp_path / "c")["train/00001.png"]
    # Nothing temporary is left beside them.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_first_images_do_not_depend_on_the_number_of_images(tmp_path: Path, shapes: Path) -> None:
    write_shapes(tmp_path / "few", train=2, val=1, size=96)
    assert torch.equal(read_image(tmp_path / "few/train/00002.png"), read_image(shapes / "train/00002.png"))
    assert files(shapes)["train/00001.png"] != files(shapes)["val/00001.png"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something other") as caught:
        write_shapes(tmp_path, train=1, val=1)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    write_shapes(tmp_path / "set", train=1, val=1, size=32)
    with pytest.raises(InputError, match="holds something other"):
        write_shapes(tmp_path / "set", train=1, val=1, size=40)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": 8}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        write_shapes(tmp_path / "set", **wrong)
