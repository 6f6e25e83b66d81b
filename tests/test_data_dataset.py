"""Items of a data set, against the content of its file."""

import pickle
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from boxteacher.data import InstanceDataset, collate, evaluation_transform, training_transform
from boxteacher.errors import InputError
from tests.data_support import (
    HEIGHT,
    WIDTH,
    Folder,
    annotation,
    compressed,
    filled_mask,
    uncompressed,
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def assert_same(first: InstanceDataset, second: InstanceDataset) -> None:
    for (image, target), (other_image, other_target) in zip(first, second, strict=True):
        assert_close(image, other_image, rtol=0, atol=0)
        assert_close(target, other_target, rtol=0, atol=0)


def test_a_box_lies_on_its_object_in_the_view_that_was_annotated(folder: Folder) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[2:8, 4:14] = 255  # the box of the first annotation
    exif = Image.Exif()
    exif[0x0112] = 6  # the upright view is turned clockwise
    Image.fromarray(pixels).save(folder.images / "a.png", exif=exif)
    folder.content["annotations"] = folder.content["annotations"][:1]
    for size, box in [((HEIGHT, WIDTH), [4, 2, 14, 8]), ((WIDTH, HEIGHT), [HEIGHT - 8, 4, HEIGHT - 2, 14])]:
        record = folder.content["images"][0]
        record["height"], record["width"] = size
        x0, y0, x1, y1 = box
        folder.content["annotations"][0]["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        image, target = folder.load()[0]
        assert image.shape[1:] == size
        assert target["boxes"].tolist() == [box]
        assert image[:, y0:y1, x0:x1].min() == 1
        assert image.sum() == 3 * 60


def test_images_that_are_only_warned_of_stay_in_the_index(folder: Folder, caplog: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("a.png", "b.jpg"):
        Image.fromarray(folder.pixels).save(folder.images / name, exif=exif)
    data = folder.load()
    assert len(data) == 2
    assert_close(data[0][0], torch.from_numpy(folder.pixels[::-1, ::-1].copy()).permute(2, 0, 1) / 255)
    (message,) = caplog.messages  # once for all images
    assert "turned by its EXIF orientation, 3" in message
    assert "1 more like this" in message


@pytest.mark.parametrize(("on_disk", "in_file"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_however_its_name_is_composed(folder: Folder, on_disk: str, in_file: str) -> None:
    (folder.images / "a.png").rename(folder.images / unicodedata.normalize(on_disk, "Grünfläche.png"))
    folder.content["images"][0]["file_name"] = unicodedata.normalize(in_file, "Grünfläche.png")
    image, _ = folder.load()[0]
    assert_close(image, torch.from_numpy(folder.pixels).permute(2, 0, 1) / 255)


def test_a_file_that_was_replaced_by_one_of_another_size_is_named(folder: Folder) -> None:
    data = folder.load()
    Image.fromarray(folder.pixels[:, 1:]).save(folder.images / "a.png")
    with pytest.raises(InputError, match=r"a\.png: the file is 39x24 pixels .* its record says 40x24"):
        data[0]


def test_an_item_has_the_image_and_the_objects_of_the_file(folder: Folder) -> None:
    data = folder.load()
    assert len(data) == 2
    image, target = data[0]
    assert_close(image, torch.from_numpy(folder.pixels).permute(2, 0, 1) / 255)
    assert_close(target["boxes"], torch.tensor([[4.0, 2, 14, 8], [20, 5, 28, 14], [30, 0, 40, 24]]))
    assert target["labels"].tolist() == [1, 0, 1]
    assert target["annotation_ids"].tolist() == [1, 2, 5]
    assert target["image_id"] == 70
    assert set(target) == {"boxes", "labels", "annotation_ids", "image_id", "ignored_bottom_rows"}
    assert_close(data[-1][0], data[1][0])
    with pytest.raises(IndexError):
        data[2]


def test_an_image_without_boxes_has_empty_targets(folder: Folder) -> None:
    image, target = folder.load(read_masks=True, transform=training_transform(32))[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["annotation_ids"].shape == (0,)
    assert target["labels"].dtype == target["annotation_ids"].dtype == torch.int64
    assert target["masks"].shape == (0, *image.shape[-2:])


def test_annotations_in_any_order_stay_with_their_image(folder: Folder) -> None:
    first, *others = folder.content["annotations"]
    folder.content["annotations"] = [others[0], annotation(4, 9, 3, [1, 1, 2, 2], None), others[1], first]
    data = folder.load()
    assert [target["annotation_ids"].tolist() for _, target in data] == [[2, 5, 1], [4]]
    assert data[1][1]["boxes"].tolist() == [[1, 1, 3, 3]]


def test_masks_are_read_from_polygons_and_both_kinds_of_rle(folder: Folder) -> None:
    _, target = folder.load(read_masks=True)[0]
    truth = np.stack([filled_mask(4, 2, 14, 8), filled_mask(20, 5, 28, 14), filled_mask(30, 0, 40, 24)])
    assert target["masks"].dtype == torch.bool
    assert torch.equal(target["masks"], torch.from_numpy(truth).bool())


def test_random_masks_are_unchanged_by_either_rle(folder: Folder) -> None:
    noise = np.random.default_rng(1).random((3, HEIGHT, WIDTH)) < [[[0.1]], [[0.5]], [[0.95]]]
    for encode in (compressed, uncompressed):
        for record, mask in zip(folder.content["annotations"], noise, strict=True):
            record["segmentation"] = encode(mask.astype(np.uint8))
        assert torch.equal(folder.load(read_masks=True)[0][1]["masks"], torch.from_numpy(noise))


@pytest.mark.parametrize("stray", [[], [3, 3], [3, 3, 9, 9], [1, 2, 3]], ids=str)
def test_polygons_of_fewer_than_three_points_do_not_count_in_a_mask(folder: Folder, stray) -> None:
    parts = [[0, 0, 5, 0, 5, 5, 0, 5], stray, [10, 10, 20, 10, 20, 20, 10, 20]]
    folder.content["annotations"] = [annotation(1, 70, 3, [0, 0, 20, 20], parts)]
    mask = folder.load(read_masks=True)[0][1]["masks"][0]
    assert torch.equal(mask, torch.from_numpy(filled_mask(0, 0, 5, 5) + filled_mask(10, 10, 20, 20)).bool())


def test_has_mask_marks_the_objects_with_a_mask(folder: Folder) -> None:
    del folder.content["annotations"][1]["segmentation"]
    folder.content["annotations"].append(
        annotation(6, 9, 3, [0, 0, 9, 9], compressed(filled_mask(0, 0, 9, 9)))
    )
    data = folder.load(read_masks=True, masks_optional=True, transform=training_transform(64))
    (_, partly), (_, whole) = data
    assert partly["has_mask"].tolist() == [True, False, True]
    assert partly["masks"].flatten(1).any(1).tolist() == [True, False, True]
    assert "has_mask" not in whole


def test_items_hold_plain_tensors(folder: Folder) -> None:
    for transform in (None, training_transform(30)):
        image, target = folder.load(read_masks=True, transform=transform)[0]
        assert all(type(value) in (Tensor, int) for value in (image, *target.values()))


@pytest.mark.parametrize("crowd", [1, "1", True], ids=repr)
def test_items_leave_out_crowds(folder: Folder, crowd: Any) -> None:
    without = folder.load(read_masks=True)
    record = annotation(8, 70, 3, [0, 0, 9, 9], "unused")
    folder.content["annotations"].insert(1, {**record, "iscrowd": crowd})
    assert_same(without, folder.load(read_masks=True))


def test_ignored_rows_scale_with_the_image(folder: Folder) -> None:
    assert folder.load(ignored_bottom_rows=5)[0][1]["ignored_bottom_rows"] == 5
    data = folder.load(ignored_bottom_rows=5, transform=evaluation_transform(WIDTH * 3 // 2))
    assert data[0][1]["ignored_bottom_rows"] == 7
    for rows in (-1, HEIGHT):
        with pytest.raises(InputError, match=rf"a\.png: ignored_bottom_rows={rows}"):
            folder.load(ignored_bottom_rows=rows)


def test_a_data_set_works_with_workers_and_pickle(folder: Folder) -> None:
    data = folder.load(read_masks=True, transform=training_transform(48))
    images, targets = next(iter(DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)))
    assert [image.ndim for image in images] == [3, 3]
    assert [target["image_id"] for target in targets] == [70, 9]
    assert_same(folder.load(), pickle.loads(pickle.dumps(folder.load())))


def test_boxes_that_a_transform_left_without_area_are_dropped_with_all_that_belongs_to_them(
    folder: Folder,
) -> None:
    def narrow(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        boxes = target["boxes"].clone()
        boxes[1, 2] = boxes[1, 0]
        return image, {**target, "boxes": boxes}

    whole = folder.load(read_masks=True)[0][1]
    found = folder.load(read_masks=True, transform=narrow)[0][1]
    for key in ("boxes", "labels", "annotation_ids", "masks"):
        assert torch.equal(found[key], whole[key][[0, 2]])
