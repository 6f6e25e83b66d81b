"""The two layouts of a data set, and errors about missing parts."""

import json
from pathlib import Path

import pytest

from boxteacher.data import find_split, read_split
from boxteacher.errors import InputError
from tests.data_support import Folder


def make(root: Path, folder: str, annotations: str) -> None:
    (root / folder).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / annotations).write_text("{}")


def failure(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        find_split(root, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_split_in_the_plain_layout_is_found(tmp_path: Path) -> None:
    make(tmp_path, "train", "train.json")
    make(tmp_path, "val", "val.json")
    split = find_split(tmp_path, "val")
    assert (split.images, split.annotations) == (tmp_path / "val", tmp_path / "annotations" / "val.json")
    assert not split.is_coco


def test_a_split_in_coco_s_layout_is_found(tmp_path: Path) -> None:
    make(tmp_path, "train2017", "instances_train2017.json")
    split = find_split(tmp_path, "train")
    assert split.images == tmp_path / "train2017"
    assert split.annotations == tmp_path / "annotations" / "instances_train2017.json"
    assert split.is_coco


def test_the_error_for_neither_layout_names_both_paths(tmp_path: Path) -> None:
    message = failure(tmp_path)
    assert str(tmp_path / "annotations" / "train.json") in message
    assert str(tmp_path / "annotations" / "instances_train2017.json") in message


def test_a_missing_images_folder_is_named(tmp_path: Path) -> None:
    make(tmp_path, "train", "train.json")
    (tmp_path / "train").rmdir()
    assert failure(tmp_path).startswith(f"{tmp_path / 'train'}: no such folder")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    assert failure(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such folder")


@pytest.mark.parametrize(
    ("folder", "annotations", "is_coco"),
    [("train", "train.json", False), ("train2017", "instances_train2017.json", True)],
)
def test_a_split_is_read_and_its_errors_are_raised(
    tmp_path: Path, folder: str, annotations: str, is_coco: bool
) -> None:
    made = Folder(tmp_path)
    made.images.rename(tmp_path / folder)
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / annotations
    file.write_text(json.dumps(made.content))
    index = read_split(tmp_path, "train", read_masks=True)
    assert index.is_coco == is_coco
    assert index.images == tmp_path / folder
    assert index.masks is not None
    assert index.annotation_ids.tolist() == [1, 2, 5]
    del made.content["annotations"][1]["image_id"]
    file.write_text(json.dumps(made.content))
    with pytest.raises(InputError, match=r"annotations\[1\] \(id 2\): 'image_id' is missing"):
        read_split(tmp_path, "train")
