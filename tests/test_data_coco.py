"""COCO files: what is served against the truth, and what each kind of bad input is called."""

import copy
import io
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from boxteacher.data import CocoInstances, collate, evaluation_transform, training_transform
from boxteacher.data.images import read_image
from boxteacher.errors import InputError

HEIGHT, WIDTH = 24, 40


def truth_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, background first."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}


def annotation(identity: int, image: int, category: int, box: list[Any], segmentation: Any) -> dict[str, Any]:
    record = {"id": identity, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
    return {**record, "segmentation": segmentation}


def sound() -> dict[str, Any]:
    """Two images with sparse ids, the second without boxes, and all three kinds of segmentation."""
    return {
        "images": [
            {"id": 70, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 9, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 44, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            annotation(1, 70, 44, [4, 2, 10, 6], [[4, 2, 14, 2, 14, 8, 4, 8]]),
            annotation(2, 70, 3, [20, 5, 8, 9], uncompressed(truth_mask(20, 5, 28, 14))),
            annotation(5, 70, 44, [30, 0, 10, 24], compressed(truth_mask(30, 0, 40, 24))),
        ],
    }


class Folder:
    """A data set on disk whose JSON a test may spoil."""

    def __init__(self, root: Path) -> None:
        self.images, self.file = root / "images", root / "instances.json"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / "a.png")
        Image.fromarray(pixels).save(self.images / "b.jpg")
        self.pixels, self.content = pixels, sound()

    def load(self, **options: Any) -> CocoInstances:
        self.file.write_text(json.dumps(self.content))
        return CocoInstances(self.images, self.file, **options)

    def failure(self, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.load(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def assert_same(first: CocoInstances, second: CocoInstances) -> None:
    for (image, target), (other_image, other_target) in zip(first, second, strict=True):
        assert_close(image, other_image, rtol=0, atol=0)
        assert_close(target, other_target, rtol=0, atol=0)


def test_items(folder: Folder) -> None:
    data = folder.load()
    assert data.category_ids == [3, 44]
    assert data.class_names == ["dog", "cat"]
    assert data.image_ids == [70, 9]
    assert data.file_names == ["a.png", "b.jpg"]
    assert data.sizes == [(HEIGHT, WIDTH)] * 2
    assert len(data) == 2
    image, target = data[0]
    assert_close(image, torch.from_numpy(folder.pixels).permute(2, 0, 1) / 255)
    assert_close(target["boxes"], torch.tensor([[4.0, 2, 14, 8], [20, 5, 28, 14], [30, 0, 40, 24]]))
    assert target["labels"].tolist() == [1, 0, 1]
    assert target["image_id"] == 70
    assert set(target) == {"boxes", "labels", "image_id", "ignored_bottom_rows"}
    assert_close(data[-1][0], data[1][0])
    with pytest.raises(IndexError):
        data[2]


def test_image_without_boxes(folder: Folder) -> None:
    image, target = folder.load(read_masks=True, transform=training_transform(32))[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, *image.shape[-2:])


def test_polygons_and_both_kinds_of_rle(folder: Folder) -> None:
    _, target = folder.load(read_masks=True)[0]
    truth = np.stack([truth_mask(4, 2, 14, 8), truth_mask(20, 5, 28, 14), truth_mask(30, 0, 40, 24)])
    assert target["masks"].dtype == torch.bool
    assert torch.equal(target["masks"], torch.from_numpy(truth).bool())


def test_random_masks_survive_either_rle(folder: Folder) -> None:
    noise = np.random.default_rng(1).random((3, HEIGHT, WIDTH)) < [[[0.1]], [[0.5]], [[0.95]]]
    for encode in (compressed, uncompressed):
        for record, mask in zip(folder.content["annotations"], noise, strict=True):
            record["segmentation"] = encode(mask.astype(np.uint8))
        assert torch.equal(folder.load(read_masks=True)[0][1]["masks"], torch.from_numpy(noise))


def test_several_polygons_are_one_mask(folder: Folder) -> None:
    parts = [[0, 0, 5, 0, 5, 5, 0, 5], [10, 10, 20, 10, 20, 20, 10, 20]]
    folder.content["annotations"] = [annotation(1, 70, 3, [0, 0, 20, 20], parts)]
    mask = folder.load(read_masks=True)[0][1]["masks"][0]
    assert torch.equal(mask, torch.from_numpy(truth_mask(0, 0, 5, 5) + truth_mask(10, 10, 20, 20)).bool())


def test_only_plain_tensors_leave(folder: Folder) -> None:
    for transform in (None, training_transform(30)):
        image, target = folder.load(read_masks=True, transform=transform)[0]
        assert all(type(value) in (Tensor, int) for value in (image, *target.values()))


@pytest.mark.parametrize("segmentation", [None, [], "garbage", [[1]], {"counts": 7}, [["x", {}]], "absent"])
def test_segmentation_is_never_read_without_masks(folder: Folder, segmentation: Any) -> None:
    with_it = folder.load()
    for record in folder.content["annotations"]:
        record["segmentation"] = segmentation
        if segmentation == "absent":
            del record["segmentation"]
    assert_same(with_it, folder.load())


def test_crowds_are_left_out(folder: Folder) -> None:
    without = folder.load(read_masks=True)
    crowd = annotation(8, 70, 3, [0, 0, 9, 9], "unused")
    folder.content["annotations"].insert(1, {**crowd, "iscrowd": 1})
    assert_same(without, folder.load(read_masks=True))


def test_boxes_are_clipped_silently(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.content["annotations"][0]["bbox"] = [-3, -2.5, 10, 10]
    folder.content["annotations"][1]["bbox"] = [30, 20, 10.0001, 100]
    boxes = folder.load()[0][1]["boxes"]
    assert_close(boxes[:2], torch.tensor([[0, 0, 7, 7.5], [30, 20, 40, 24]]))
    assert not caplog.records


@pytest.mark.parametrize(
    "box", [[5, 5, 0, 4], [5, 5, 4, -1], [WIDTH, 0, 5, 5], [-9, 3, 9, 3], [1e300, 0, 1e300, 9]], ids=str
)
def test_a_box_without_area_is_dropped_with_one_warning(
    folder: Folder, caplog: pytest.LogCaptureFixture, box: list[float]
) -> None:
    # Its segmentation is of no interest either.
    folder.content["annotations"][1].update(bbox=box, segmentation=None)
    folder.content["annotations"].append(annotation(6, 9, 3, box, None))
    data = folder.load(read_masks=True)
    assert data[0][1]["labels"].tolist() == [1, 1]
    assert len(data[1][1]["boxes"]) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "dropped 2 of 4" in caplog.text
    assert "annotation 2" in caplog.text


def test_given_categories_fix_the_labels(folder: Folder) -> None:
    data = folder.load(category_ids=[44, 3, 90])
    assert data[0][1]["labels"].tolist() == [0, 1, 0]
    assert data.category_ids == [44, 3, 90]
    assert data.class_names[:2] == ["cat", "dog"]
    message = folder.failure(category_ids=[44])
    assert "(id 2)" in message
    assert "category_id 3" in message


def test_ignored_rows_scale_with_the_image(folder: Folder) -> None:
    assert folder.load(ignored_bottom_rows=5)[0][1]["ignored_bottom_rows"] == 5
    data = folder.load(ignored_bottom_rows=5, transform=evaluation_transform(WIDTH * 3 // 2))
    assert data[0][1]["ignored_bottom_rows"] == 7
    for rows in (-1, HEIGHT):
        assert f"ignored_bottom_rows={rows}" in folder.failure(ignored_bottom_rows=rows)


def test_loader_with_workers_and_pickle(folder: Folder) -> None:
    data = folder.load(read_masks=True, transform=training_transform(48))
    images, targets = next(iter(DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate)))
    assert [image.ndim for image in images] == [3, 3]
    assert [target["image_id"] for target in targets] == [70, 9]
    assert_same(folder.load(), pickle.loads(pickle.dumps(folder.load())))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    if mode == "1":
        ramp = (ramp > 127).astype(np.uint8) * 255
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    loaded = read_image(path)
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    expected = torch.from_numpy(ramp).expand(3, -1, -1) / 255
    # JPEG is lossy.
    assert_close(loaded, expected, atol=0.03 if mode == "CMYK" else 1e-6, rtol=0)


def test_exif_orientation_is_not_applied(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(folder.pixels).save(folder.images / "b.jpg", exif=exif)
    assert folder.load()[1][0].shape == (3, HEIGHT, WIDTH)


# Each spoils the content and says what the message must hold.
SPOILT: dict[str, tuple[Any, list[str]]] = {
    "image id twice": (lambda c: c["images"][1].update(id=70), ["images[1] (id 70)", "same id"]),
    "annotation id twice": (lambda c: c["annotations"][2].update(id=1), ["annotations[2] (id 1)", "same id"]),
    "category id twice": (lambda c: c["categories"][1].update(id=44), ["categories[1] (id 44)", "same id"]),
    "unknown image": (lambda c: c["annotations"][1].update(image_id=71), ["(id 2)", "image_id 71"]),
    "unknown category": (lambda c: c["annotations"][1].update(category_id=1), ["(id 2)", "category_id 1"]),
    "nan": (lambda c: c["annotations"][1].update(bbox=[1, 2, math.nan, 4]), ["(id 2)", "NaN"]),
    "inf": (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, math.inf]), ["(id 5)", "infinite"]),
    "three numbers": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), ["(id 2)", "four numbers"]),
    "not numbers": (lambda c: c["annotations"][1].update(bbox=[1, 2, "3", 4]), ["(id 2)", "four numbers"]),
    "no bbox": (lambda c: c["annotations"][0].pop("bbox"), ["(id 1)", "'bbox' is missing"]),
    "no image_id": (lambda c: c["annotations"][0].pop("image_id"), ["(id 1)", "'image_id' is missing"]),
    "no category_id": (
        lambda c: c["annotations"][0].pop("category_id"),
        ["(id 1)", "'category_id' is missing"],
    ),
    "no id": (lambda c: c["annotations"][0].pop("id"), ["annotations[0]", "'id' is missing"]),
    "no width": (lambda c: c["images"][0].pop("width"), ["(id 70)", "'width' is missing"]),
    "text height": (lambda c: c["images"][0].update(height="24"), ["(id 70)", "'height' is '24'"]),
    "zero height": (lambda c: c["images"][0].update(height=0), ["(id 70)", "height 0"]),
    "no file_name": (lambda c: c["images"][1].pop("file_name"), ["(id 9)", "'file_name' is missing"]),
    "no name": (lambda c: c["categories"][0].pop("name"), ["(id 44)", "'name' is missing"]),
    "record no object": (lambda c: c["images"].append("x"), ["images[2]", "'id' is missing"]),
    "no images": (lambda c: c["images"].clear(), ["'images' is empty"]),
    "no boxes": (lambda c: c["annotations"].clear(), ["none of the 0 annotations"]),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], ["none of the 3 annotations"]),
    "no key images": (lambda c: c.pop("images"), ["no list 'images'"]),
    "no key annotations": (lambda c: c.pop("annotations"), ["no list 'annotations'"]),
    "no key categories": (lambda c: c.pop("categories"), ["no list 'categories'"]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_bad_records_are_named(folder: Folder, name: str) -> None:
    spoil, parts = SPOILT[name]
    spoil(folder.content)
    message = folder.failure()
    for part in (str(folder.file), *parts):
        assert part in message


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[1, 2]", "3"])
def test_no_coco_file(folder: Folder, text: str) -> None:
    folder.file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="give a COCO JSON file") as caught:
        CocoInstances(folder.images, folder.file)
    assert str(folder.file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"nothing\.json: cannot be read"):
        CocoInstances(folder.images, folder.file.with_name("nothing.json"))
    folder.images = folder.images / "nowhere"
    assert folder.failure().startswith(f"{folder.images}: no such folder")


CUT = compressed(truth_mask(2, 3, 9, 17))
BAD_MASKS: dict[str, Any] = {
    "missing": None,
    "empty": [],
    "text": "x",
    "two points": [[1, 2, 3, 4]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]],
    "nan": [[1, 2, 3, math.nan, 5, 6]],
    "ragged": [[1, [2]]],
    "no size": {"counts": CUT["counts"]},
    "other size": {**CUT, "size": [WIDTH, HEIGHT]},
    "cut short": {**CUT, "counts": CUT["counts"][:-3]},
    "cut inside a number": {**CUT, "counts": CUT["counts"] + "o"},
    "no RLE": {**CUT, "counts": "~~~"},
    "not ascii": {**CUT, "counts": "é"},
    "no counts": {**CUT, "counts": ""},
    "empty runs": {**CUT, "counts": []},
    "short runs": {**CUT, "counts": [5, 5]},
    "negative runs": {**CUT, "counts": [-5, 5 + HEIGHT * WIDTH]},
    "text runs": {**CUT, "counts": ["a"]},
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_named_only_if_read(folder: Folder, name: str) -> None:
    folder.content["annotations"][1]["segmentation"] = copy.deepcopy(BAD_MASKS[name])
    folder.load()
    message = folder.failure(read_masks=True)
    assert str(folder.file) in message
    assert "(id 2)" in message
    assert "mask" in message


def test_missing_images_are_counted(folder: Folder) -> None:
    for path in folder.images.iterdir():
        path.unlink()
    message = folder.failure()
    assert message.startswith(str(folder.images / "a.png"))
    assert "2 of 2 are missing" in message


def test_size_differs_from_the_record(folder: Folder) -> None:
    Image.fromarray(folder.pixels[:, :-1]).save(folder.images / "b.jpg")
    message = folder.failure()
    assert message.startswith(str(folder.images / "b.jpg"))
    assert f"{WIDTH - 1}x{HEIGHT}" in message
    assert f"{WIDTH}x{HEIGHT}" in message


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("b.jpg", "JPEG")])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_images_are_found_at_once(folder: Folder, name: str, kind: str, share: float) -> None:
    # Larger than the tail that is looked at, as real photographs are.
    noise = np.random.default_rng(2).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=kind)
    record = next(image for image in folder.content["images"] if image["file_name"] == name)
    record.update(width=300, height=200)
    (folder.images / name).write_bytes(buffer.getvalue())
    folder.load()
    (folder.images / name).write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    assert folder.failure().startswith(f"{folder.images / name}: cannot be read as an image")


def test_image_damaged_inside_is_named_when_read(folder: Folder) -> None:
    path = folder.images / "a.png"
    data = folder.load()
    content = bytearray(path.read_bytes())
    content[80:120] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        data[0]
