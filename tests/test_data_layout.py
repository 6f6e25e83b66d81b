"""Finding the two layouts of a data set, and saying what is missing."""

from pathlib import Path

import pytest

from boxteacher.data import find_split
from boxteacher.errors import InputError


def make(root: Path, folder: str, annotations: str) -> None:
    (root / folder).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / annotations).write_text("{}")


def failure(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        find_split(root, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_own_layout(tmp_path: Path) -> None:
    make(tmp_path, "train", "train.json")
    make(tmp_path, "val", "val.json")
    split = find_split(tmp_path, "val")
    assert (split.images, split.annotations) == (tmp_path / "val", tmp_path / "annotations" / "val.json")
    assert not split.is_coco


def test_coco_layout(tmp_path: Path) -> None:
    make(tmp_path, "train2017", "instances_train2017.json")
    split = find_split(tmp_path, "train")
    assert split.images == tmp_path / "train2017"
    assert split.annotations == tmp_path / "annotations" / "instances_train2017.json"
    assert split.is_coco


def test_neither_layout_names_both_paths(tmp_path: Path) -> None:
    message = failure(tmp_path)
    assert str(tmp_path / "annotations" / "train.json") in message
    assert str(tmp_path / "annotations" / "instances_train2017.json") in message


def test_missing_folder_of_images(tmp_path: Path) -> None:
    make(tmp_path, "train", "train.json")
    (tmp_path / "train").rmdir()
    assert failure(tmp_path).startswith(f"{tmp_path / 'train'}: no such folder")


def test_missing_root(tmp_path: Path) -> None:
    assert failure(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such folder")
