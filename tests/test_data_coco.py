"""Reading COCO files: the index, and the problem reported for each kind of bad input."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from boxteacher.data import DataIndex, InstanceDataset, read_coco
from tests.data_support import (
    HEIGHT,
    WIDTH,
    Folder,
    annotation,
    compressed,
    filled_mask,
    uncompressed,
    valid_content,
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def assert_same(first: DataIndex, second: DataIndex) -> None:
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def test_the_index_of_a_file(folder: Folder) -> None:
    folder.content["annotations"][0]["area"] = 41.5
    index = folder.index()
    assert index.category_ids == [3, 44]
    assert index.class_names == ["dog", "cat"]
    assert index.image_ids.tolist() == [70, 9]
    assert [index.image_path(i) for i in range(len(index))] == [folder.images / n for n in ("a.png", "b.jpg")]
    assert index.sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert index.starts.tolist() == [0, 3, 3]
    assert index.boxes.tolist() == [[4, 2, 14, 8], [20, 5, 28, 14], [30, 0, 40, 24]]
    assert index.labels.tolist() == [1, 0, 1]
    assert index.annotation_ids.tolist() == [1, 2, 5]
    assert index.area.tolist() == [41.5, 72, 240]
    assert not index.crowd.any()
    assert index.masks is None


def test_a_missing_area_is_that_of_the_mask_or_else_of_the_box(folder: Folder) -> None:
    first, second, third = folder.content["annotations"]
    first["segmentation"] = compressed(filled_mask(4, 2, 9, 8))
    second["segmentation"] = None
    third["area"] = 7
    assert folder.index(read_masks=True, masks_optional=True).area.tolist() == [30, 72, 7]
    assert folder.index().area.tolist() == [60, 72, 7]


def test_max_boxes_does_not_count_crowds(folder: Folder) -> None:
    assert folder.index().max_boxes() == (3, folder.images / "a.png")
    folder.content["annotations"] += [annotation(10 + i, 9, 3, [i, 0, 5, 5], None) for i in range(4)]
    assert folder.index().max_boxes() == (4, folder.images / "b.jpg")
    for record in folder.content["annotations"][4:]:
        record["iscrowd"] = 1
    assert folder.index().max_boxes() == (3, folder.images / "a.png")


@pytest.mark.parametrize(
    "field",
    [
        {"area": None},
        {"area": "x"},
        {"area": math.nan},
        {"iscrowd": None},
        {"iscrowd": "0"},
        {"iscrowd": False},
    ],
)
def test_an_optional_field_of_another_type_is_ignored(folder: Folder, field: dict[str, Any]) -> None:
    expected = folder.index(read_masks=True)
    for record in folder.content["annotations"]:
        record.update(field)
    assert_same(expected, folder.index(read_masks=True))
    for record in folder.content["annotations"]:
        del record["iscrowd"]
    assert_same(expected, folder.index(read_masks=True))


@pytest.mark.parametrize("read_masks", [False, True])
@pytest.mark.parametrize("box", ["absent", None, [1, 2, math.nan, 4]])
@pytest.mark.parametrize("encode", [compressed, uncompressed, lambda mask: [[20, 5, 28, 5, 28, 14, 20, 14]]])
def test_a_crowd_without_a_box_has_that_of_its_mask(
    folder: Folder, encode: Any, box: Any, read_masks: bool
) -> None:
    record = folder.content["annotations"][1]
    record.update(iscrowd=1, segmentation=encode(filled_mask(20, 5, 28, 14)))
    expected, expected_problems = folder.read(read_masks=read_masks)
    record["bbox"] = box
    if box == "absent":
        del record["bbox"]
    index, problems = folder.read(read_masks=read_masks)
    assert problems == expected_problems
    assert_same(index, expected)


@pytest.mark.parametrize("segmentation", [None, [], "garbage", {"counts": [5, 5], "size": [9, 9]}])
def test_a_crowd_without_a_box_and_a_mask_is_left_out_and_said(folder: Folder, segmentation: Any) -> None:
    folder.content["annotations"].append(annotation(6, 9, 3, [1, 1, 5, 5], None))
    record = folder.content["annotations"][1]
    record.update(iscrowd=1, segmentation=segmentation)
    del record["bbox"]
    index, (problem,) = folder.read()
    assert index.annotation_ids.tolist() == [1, 5, 6]
    assert problem.severity == "warning"
    assert "(id 2): 'bbox' is missing" in str(problem)
    assert "left out" in str(problem)


@pytest.mark.parametrize(
    ("group", "key", "said"),
    [
        ("images", "width", "a 64-bit integer"),
        ("images", "file_name", "a string"),
        ("annotations", "bbox", "a list"),
    ],
)
def test_a_field_of_another_type_is_told_what_coco_has(
    folder: Folder, group: str, key: str, said: str
) -> None:
    folder.content[group][0][key] = {}
    assert f"{key!r} is {{}}, but COCO has {said} there" in folder.failure()


def test_crowds_are_in_the_index_with_their_masks(folder: Folder) -> None:
    folder.content["annotations"][1]["iscrowd"] = 1
    index = folder.index(read_masks=True)
    assert index.crowd.tolist() == [False, True, False]
    assert index.masks is not None
    assert index.masks[1] == compressed(filled_mask(20, 5, 28, 14))["counts"].encode()


@pytest.mark.parametrize("segmentation", [None, [], "garbage", [[1]], {"counts": 7}, [["x", {}]], "absent"])
def test_segmentation_is_never_read_without_masks(folder: Folder, segmentation: Any) -> None:
    with_it = folder.index()
    for record in folder.content["annotations"]:
        record["segmentation"] = segmentation
        if segmentation == "absent":
            del record["segmentation"]
    assert_same(with_it, folder.index())


def test_boxes_are_clipped_without_a_warning(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.content["annotations"][0]["bbox"] = [-3, -2.5, 10, 10]
    folder.content["annotations"][1]["bbox"] = [30, 20, 10.0001, 100]
    boxes = folder.index().boxes
    assert_close(boxes[:2], np.array([[0, 0, 7, 7.5], [30, 20, 40, 24]], dtype=np.float32))
    assert not caplog.records


@pytest.mark.parametrize(
    "box",
    [[5, 5, 0, 4], [5, 5, 4, -1], [WIDTH, 0, 5, 5], [-9, 3, 9, 3], [1e300, 0, 1e300, 9], [30, 5, 1e-9, 9]],
    ids=str,
)
def test_boxes_without_area_are_left_out_with_one_warning(
    folder: Folder, caplog: pytest.LogCaptureFixture, box: list[float]
) -> None:
    # Its segmentation is not checked either.
    folder.content["annotations"][1].update(bbox=box, segmentation=None)
    whole = compressed(filled_mask(1, 1, 6, 6))
    folder.content["annotations"] += [
        annotation(6, 9, 3, box, None),
        annotation(7, 9, 3, [1, 1, 5, 5], whole),
    ]
    index = folder.index(read_masks=True)
    assert index.annotation_ids.tolist() == [1, 5, 7]
    assert index.starts.tolist() == [0, 2, 3]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "annotations[1] (id 2): bbox" in caplog.text
    assert "(1 more like this)" in caplog.text


def test_given_classes_define_the_labels(folder: Folder) -> None:
    index, problems = folder.read(classes={44: "cat", 3: "dog", 90: "horse"})
    assert index.labels.tolist() == [0, 1, 0]
    assert index.category_ids == [44, 3, 90]
    assert index.class_names == ["cat", "dog", "horse"]
    assert ["1 of 3 classes have no object here: ['horse']" in each.what for each in problems] == [True]


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        ({3: "dog", 44: "cat"}, [1, 0, 1], []),
        ({44: "dog", 3: "cat"}, [1, 0, 1], ["3 of 3 annotations", "dog is 3, not 44", "matched by name"]),
        ({0: "cat", 1: "dog"}, [0, 1, 0], ["3 of 3 annotations", "cat is 44, not 0", "matched by name"]),
        ({3: "Dog ", 44: "CAT"}, [1, 0, 1], []),
        ({44: " dog", 3: "Cat"}, [1, 0, 1], ["3 of 3 annotations", "dog is 3, not 44", "matched by name"]),
        (
            {3: "puppy", 44: "kitten"},
            [1, 0, 1],
            ["3 of 3 annotations", "3 is dog, not puppy", "matched by id"],
        ),
        # A name that two classes share decides nothing.
        ({3: "dog", 44: "cat", 5: "cat"}, [1, 0, 1], ["1 of 3 classes have no object here"]),
    ],
)
def test_categories_are_matched_by_name_or_if_all_are_renamed_by_id(
    folder: Folder, classes: dict[int, str], labels: list[int], said: list[str]
) -> None:
    index, problems = folder.read(classes=classes)
    assert index.labels.tolist() == labels
    assert index.category_ids == list(classes)
    assert len(problems) == bool(said)
    assert all(part in str(problems[0]) for part in said)
    assert all(problem.severity == "warning" for problem in problems)


def test_objects_of_a_category_that_training_lacks_are_counted(folder: Folder) -> None:
    assert folder.failure(classes={3: "dog"}).startswith(
        f"{folder.file}: categories: 2 of 3 annotations have a category that training does not: cat (id 44)"
    )


@pytest.mark.parametrize(
    "classes",
    [
        {3: "cat", 44: "mouse"},
        {3: "puppy", 44: "cat"},
        {0: "cat", 3: "bird"},
        {44: "Cat ", 3: "bird"},
    ],
)
def test_no_category_is_matched_by_id_beside_others_by_name(folder: Folder, classes: dict[int, str]) -> None:
    message = folder.failure(classes=classes)
    assert "1 of 3 annotations have a category that training does not: dog (id 3)" in message


@pytest.mark.parametrize("classes", [{3: "puppy"}, {3: "puppy", 44: "kitten", 5: "bird"}, {0: "a", 1: "b"}])
def test_renamed_categories_with_other_ids_are_an_error(folder: Folder, classes: dict[int, str]) -> None:
    assert "3 of 3 annotations have a category that training does not" in folder.failure(classes=classes)


def test_a_name_in_another_numbering_never_gives_its_id_to_another_class(folder: Folder) -> None:
    """Shifted ids and a new class: by id, a dog would be a cat's label."""
    folder.content["categories"] = [
        {"id": 44, "name": "cat "},
        {"id": 3, "name": "Dog"},
        {"id": 5, "name": "horse"},
    ]
    index, _ = folder.read(classes={3: "cat", 5: "dog"})
    assert index.labels.tolist() == [0, 1, 0]
    folder.content["annotations"][1]["category_id"] = 5
    assert "1 of 3 annotations have a category that training does not: horse (id 5)" in folder.failure(
        classes={3: "cat", 5: "dog"}
    )


def test_names_that_differ_in_case_alone_are_told_apart_by_a_file_with_both(folder: Folder) -> None:
    folder.content["categories"] = [{"id": 44, "name": "Cat"}, {"id": 3, "name": "cat"}]
    assert folder.index(classes={44: "cat", 3: "Cat"}).labels.tolist() == [1, 0, 1]
    assert "cat (id 3)" in folder.failure(classes={7: "Cat"})


def test_renamed_categories_are_matched_by_id_beside_a_grouping(folder: Folder) -> None:
    for record in folder.content["categories"]:
        record["supercategory"] = "animals"
    folder.content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    assert folder.index(classes={3: "puppy", 44: "kitten"}).labels.tolist() == [1, 0, 1]


def test_a_grouping_that_no_annotation_uses_is_no_class(folder: Folder) -> None:
    """The first category of Roboflow's files."""
    expected = folder.index()
    for record in folder.content["categories"]:
        record["supercategory"] = "animals"
    folder.content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    index, (problem,) = folder.read()
    assert_same(index, expected)
    assert "'animals' (id 0) groups others and has 0 of 3 annotations" in str(problem)
    assert problem.severity == "warning"
    folder.content["annotations"].append(annotation(9, 9, 0, [1, 1, 5, 5], None))
    assert folder.index().class_names == ["animals", "dog", "cat"]


def test_a_category_of_its_own_name_is_a_class_and_its_lack_of_objects_is_said(folder: Folder) -> None:
    """COCO's "person" is of the supercategory "person"."""
    folder.content["categories"].append({"id": 50, "name": "person", "supercategory": "person"})
    index, (problem,) = folder.read()
    assert index.class_names == ["dog", "cat", "person"]
    assert "1 of 3 classes have no object here: ['person']" in str(problem)


def test_many_crowds_are_counted(folder: Folder) -> None:
    content = folder.content
    content["annotations"] += [annotation(10 + i, 9, 3, [i, 0, 5, 5], None) for i in range(17)]
    content["annotations"][4]["iscrowd"] = content["annotations"][5]["iscrowd"] = 1
    assert folder.read()[1] == []
    for record in content["annotations"][10:]:
        record["iscrowd"] = 1
    (problem,) = folder.read()[1]
    assert problem.severity == "warning"
    assert "12 of 20 objects are crowds" in str(problem)


def as_corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def as_shares(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_corners, ["2 of 3 boxes end beyond the right or bottom edge", "corners"]),
        (as_shares, ["3 of 3 boxes are at most one pixel wide and high", "multiply"]),
        (lambda box: as_shares(as_corners(box)), ["3 of 3 boxes are at most one pixel", "multiply"]),
    ],
    ids=["corners", "shares", "corners as shares"],
)
def test_boxes_that_can_hardly_be_in_pixels_are_counted(folder: Folder, change, said: list[str]) -> None:
    for record in folder.content["annotations"]:
        record["bbox"] = change(record["bbox"])
    _, (problem,) = folder.read()
    assert problem.severity == "warning"
    assert all(part in str(problem) for part in (str(folder.file), *said))


def test_boxes_that_touch_the_edge_or_are_tiny_are_no_reason_for_a_warning(folder: Folder) -> None:
    for record, box in zip(
        folder.content["annotations"],
        ([30, 4, WIDTH - 29, HEIGHT - 4], [-5, -5, 60, HEIGHT + 5.9], [8, 9, 1, 1]),
        strict=True,
    ):
        record["bbox"] = box
    assert folder.read()[1] == []


# A change of the content, and parts of the message that it leads to.
BAD_RECORDS: dict[str, tuple[Any, list[str]]] = {
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
    "no crowd flag": (lambda c: c["annotations"][1].update(iscrowd="no"), ["(id 2)", "'iscrowd' is 'no'"]),
    "huge": (lambda c: c["annotations"][1].update(bbox=[1, 2, 10**400, 4]), ["(id 2)", "infinite"]),
    "huge id": (lambda c: c["images"][1].update(id=10**30), ["images[1]", "'id' is 1000"]),
    "no id": (lambda c: c["annotations"][0].pop("id"), ["annotations[0]", "'id' is missing"]),
    "no width": (lambda c: c["images"][0].pop("width"), ["(id 70)", "'width' is missing"]),
    "text height": (lambda c: c["images"][0].update(height="24"), ["(id 70)", "'height' is '24'"]),
    "zero height": (lambda c: c["images"][0].update(height=0), ["(id 70)", "height 0"]),
    "no file_name": (lambda c: c["images"][1].pop("file_name"), ["(id 9)", "'file_name' is missing"]),
    "no name": (lambda c: c["categories"][0].pop("name"), ["(id 44)", "'name' is missing"]),
    "record no object": (lambda c: c["images"].append("x"), ["images[2]", "'id' is missing"]),
    "no images": (lambda c: c["images"].clear(), ["'images' is empty"]),
    "no boxes": (lambda c: c["annotations"].clear(), ["no annotation is a box"]),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], ["no annotation is a box"]),
    "no key images": (lambda c: c.pop("images"), ["no list 'images'"]),
    "no key annotations": (lambda c: c.pop("annotations"), ["no list 'annotations'"]),
    "no key categories": (lambda c: c.pop("categories"), ["no list 'categories'"]),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_named(folder: Folder, name: str) -> None:
    change, parts = BAD_RECORDS[name]
    change(folder.content)
    message = folder.failure()
    for part in (str(folder.file), *parts):
        assert part in message


def test_one_reading_reports_all_problems(folder: Folder) -> None:
    """And no problem that only follows from another one."""
    content = folder.content
    del content["categories"][1]["name"]
    content["images"] += [
        {"id": 9, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 11, "file_name": "a.png", "width": WIDTH, "height": 0},
        {"id": 12, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT},
        {"id": 13, "file_name": "small.png", "width": WIDTH, "height": HEIGHT},
    ]
    Image.fromarray(folder.pixels[:5]).save(folder.images / "small.png")
    box, mask = [1, 1, 5, 5], compressed(filled_mask(1, 1, 6, 6))
    content["annotations"] += [
        annotation(5, 70, 3, box, mask),
        annotation(20, 99, 3, box, mask),
        annotation(21, 9, 98, box, mask),
        annotation(22, 9, 3, [1, math.nan, 5, 5], mask),
        annotation(23, 9, 3, [1, 5, 5], mask),
        {**annotation(24, 9, 3, box, mask), "iscrowd": "some"},
        annotation(25, 9, 3, [WIDTH, 1, 5, 5], mask),
        annotation(26, 9, 3, box, [[]]),
        "no record",
        *(annotation(30 + image, image, 3, box, mask) for image in (9, 11, 12, 13)),
    ]
    index, problems = folder.read(read_masks=True)
    expected = [
        ("categories[1] (id 3)", "'name' is missing"),
        ("images[2] (id 9)", "same id"),
        ("images[3] (id 11)", "height 0"),
        (str(folder.images / "gone.png"), "no such image"),
        (str(folder.images / "small.png"), f"{WIDTH}x5"),
        ("annotations[3] (id 5)", "same id"),
        ("annotations[4] (id 20)", "image_id 99"),
        ("annotations[5] (id 21)", "category_id 98"),
        ("annotations[6] (id 22)", "NaN"),
        ("annotations[7] (id 23)", "four numbers"),
        ("annotations[8] (id 24)", "'iscrowd' is 'some'"),
        ("annotations[9] (id 25)", "no area inside its image"),
        ("annotations[10] (id 26)", "segmentation is no mask"),
        ("annotations[11] (id 'missing')", "'id' is missing"),
    ]
    assert len(problems) == len(expected)
    for problem, parts in zip(problems, expected, strict=True):
        assert all(part in str(problem) for part in parts)
        assert "\n" not in str(problem)
    assert [p.record for p in problems if p.severity == "warning"] == ["annotations[9] (id 25)"]
    assert index.image_ids.tolist() == [70, 9]
    assert index.annotation_ids.tolist() == [1, 2, 5, 26, 39]
    assert index.class_names == ["category 3", "cat"]
    assert folder.failure().endswith("(first of 12 errors)")  # masks are not checked


UNUSUAL_VALUES = (
    None,
    True,
    -1,
    3.5,
    "",
    "x\\0",
    [],
    {},
    [None] * 4,
    [1e308] * 4,
    [[10**400] * 6],
    math.nan,
    10**400,
    2**63,
)


@pytest.mark.parametrize("group", ["images", "categories", "annotations"])
def test_any_value_of_a_field_is_read_or_reported(folder: Folder, group: str) -> None:
    for key in [*folder.content[group][0], "area"]:
        for value in UNUSUAL_VALUES:
            folder.content = valid_content()
            folder.content[group][0][key] = value
            index, problems = folder.read(read_masks=True)
            assert problems or len(index.boxes) == 3
            assert problems or "masks" in InstanceDataset(index)[0][1]


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[1, 2]", "3"])
def test_a_file_that_is_not_coco_json_is_a_problem(folder: Folder, text: str) -> None:
    folder.file.write_bytes(text.encode("latin-1"))
    index, (problem,) = read_coco(folder.images, folder.file)
    assert len(index) == 0
    assert problem.file == folder.file
    assert "give a COCO JSON file" in str(problem)
    assert "\n" not in str(problem)


def test_a_missing_file_or_folder_is_named(folder: Folder) -> None:
    _, (problem,) = read_coco(folder.images, folder.file.with_name("nothing.json"))
    assert "nothing.json: cannot be read" in str(problem)
    folder.images = folder.images / "nowhere"
    assert folder.failure().startswith(f"{folder.images}: no such folder")


def test_the_error_counts_the_images_with_a_problem(folder: Folder) -> None:
    for path in folder.images.iterdir():
        path.unlink()
    message = folder.failure()
    assert message.startswith(f"{folder.images / 'a.png'}: no such image")
    assert message.endswith("(first of 2 errors)")


CUT = compressed(filled_mask(2, 3, 9, 17))
BAD_MASKS: dict[str, Any] = {
    "missing": None,
    "empty": [],
    "text": "x",
    "no points": [[]],
    "no points twice": [[], []],
    "two points": [[1, 2, 3, 4]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]],
    "nan": [[1, 2, 3, math.nan, 5, 6]],
    "huge": [[10**400] * 6],
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
    "half runs": {**CUT, "counts": [0.5, HEIGHT * WIDTH - 0.5]},
    "text runs": {**CUT, "counts": ["a"]},
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_named_only_if_read(folder: Folder, name: str) -> None:
    folder.content["annotations"][1]["segmentation"] = copy.deepcopy(BAD_MASKS[name])
    folder.index()
    message = folder.failure(read_masks=True)
    assert str(folder.file) in message
    assert "(id 2)" in message
    assert "mask" in message


@pytest.mark.parametrize("name", BAD_MASKS)
def test_with_optional_masks_a_bad_mask_is_a_warning_and_the_object_stays(folder: Folder, name: str) -> None:
    folder.content["annotations"][1]["segmentation"] = copy.deepcopy(BAD_MASKS[name])
    index, problems = folder.read(read_masks=True, masks_optional=True)
    absent = not BAD_MASKS[name]
    assert [problem.severity for problem in problems] == ([] if absent else ["warning"])
    assert index.masks is not None
    assert [mask is None for mask in index.masks] == [False, True, False]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(
    "segmentation",
    [[[3, 3, 3, 3, 3, 3]], [[5.1, 5.1, 5.3, 5.1, 5.2, 5.2]], uncompressed(np.zeros((HEIGHT, WIDTH)))],
    ids=["point", "thin", "runs"],
)
def test_a_mask_that_covers_no_pixel_counts_as_none(
    folder: Folder, segmentation: Any, optional: bool
) -> None:
    folder.content["annotations"][1]["segmentation"] = segmentation
    index, (problem,) = folder.read(read_masks=True, masks_optional=optional)
    assert index.masks is not None
    assert [mask is None for mask in index.masks] == [False, True, False]
    assert problem.severity == "warning"
    assert "(id 2): segmentation covers no pixel" in str(problem)
