"""Reader of COCO's instance JSON: every record is checked, and all problems are reported."""

import json
import math
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from boxteacher.data.categories import Categories, choose_classes, match_classes
from boxteacher.data.images import check_images, stored_name
from boxteacher.data.index import DataIndex, IndexedImage, IndexedObject, build_index, clip_box
from boxteacher.data.masks import encode_mask, mask_area, mask_box
from boxteacher.data.problems import Problem, RecordError, Severity
from boxteacher.data.units import BoxUnits

T = TypeVar("T")

_GROUPS = ("categories", "images", "annotations")
_KINDS: dict[type, str] = {int: "a 64-bit integer", str: "a string", list: "a list"}


def read_coco(
    images: str | Path,
    annotations: str | Path,
    *,
    read_masks: bool = False,
    masks_optional: bool = False,
    classes: Mapping[int, str] | None = None,
) -> tuple[DataIndex, list[Problem]]:
    """Reads a COCO JSON file, and checks it and its images.

    Records with a problem are left out of the index, an image together with its objects. Boxes are clipped
    to their image; a box without area there is left out with a warning.

    Args:
        images: folder of the image files.
        annotations: COCO JSON file.
        read_masks: whether to read masks; if not, `segmentation` is ignored.
        masks_optional: whether objects may have no mask; an invalid mask is then only a warning.
        classes: names of a trained model's classes by category id, in the order of its labels 0 … C−1, which
            the file's categories get (see `match_classes`). If not given, the labels are in the order of the
            file's own ids (see `choose_classes`).

    Returns:
        The index, and all problems.
    """
    images, annotations = Path(images), Path(annotations)
    file = _CocoFile(annotations)
    categories = _read_categories(file)
    if classes is None:
        classes, problems = choose_classes(categories)
        label_of = {each: label for label, each in enumerate(classes)}
    else:
        label_of, problems = match_classes(categories, classes)
    file.problems += problems
    found_images = _sound_images(file, images)
    position_of = {each.image_id: i for i, each in enumerate(found_images)}
    units = BoxUnits()

    def read_object(record: _Record) -> IndexedObject | None:
        """The object of a record; None if its image or its category is left out."""
        image_id = record.reference("image_id", "images", file.ids["images"])
        label = label_of.get(record.reference("category_id", "categories", file.ids["categories"]))
        crowd = record.is_crowd()
        bbox = [] if crowd else record.bbox()
        if image_id not in position_of or label is None:
            return None
        position = position_of[image_id]
        size = found_images[position].size
        x, y, width, height = record.crowd_bbox(*size) if crowd else bbox
        units.add((x, y, width, height), *size)
        box = clip_box((x, y, x + width, y + height), *size)
        if box is None:
            what = f"bbox {[x, y, width, height]} has no area inside its image and is left out"
            raise record.error(what, "correct it or remove the annotation", "warning")
        mask = None
        if read_masks:
            try:
                mask = record.mask(*size, optional=masks_optional or crowd)
            except RecordError as error:
                file.problems.append(error.problem)
        return IndexedObject(position, box, label, record.id, crowd, record.area(), mask)

    objects = [each for each in file.read("annotations", read_object) if each is not None]
    file.problems += units.problems(annotations)
    index = build_index(
        images,
        annotations,
        found_images,
        objects,
        class_names=list(classes.values()),
        category_ids=list(classes),
        problems=file.problems,
    )
    return index, file.problems


class _CocoFile:
    """The records of a file by group, and the ids and problems found so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.ids: dict[str, set[int]] = {group: set() for group in _GROUPS}
        try:
            self.groups = _load(path)
        except ValueError as error:
            self.problems.append(Problem(path, "", str(error), "give a COCO JSON file of instances"))
            self.groups = {group: [] for group in _GROUPS}

    def read(self, group: str, read_record: Callable[["_Record"], T]) -> list[T]:
        """Results of `read_record` for the records without a problem."""
        results = []
        for position, content in enumerate(self.groups[group]):
            record = _Record(self.path, f"{group}[{position}]", content)
            try:
                record.take_id(self.ids[group])
                results.append(read_record(record))
            except RecordError as error:
                self.problems.append(error.problem)
        return results

    def count(self, group: str, key: str) -> Counter[int]:
        """Number of the group's records by the whole number that they have as `key`."""
        values = (each.get(key) for each in self.groups[group] if isinstance(each, dict))
        return Counter(each for each in values if type(each) is int)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    groups = content if isinstance(content, dict) else {}
    missing = [repr(group) for group in _GROUPS if not isinstance(groups.get(group), list)]
    if missing:
        raise ValueError(f"no list {' or '.join(missing)} at its top level")
    if not groups["images"]:
        raise ValueError("'images' is empty")
    return groups


class _Record:
    """A record of the JSON file, with its place there and checks of COCO's fields."""

    def __init__(self, file: Path, place: str, content: Any) -> None:
        self.file, self.place = file, place
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}

    def error(self, what: str, remedy: str, severity: Severity = "error") -> RecordError:
        identity = reprlib.repr(self.content.get("id", "missing"))
        return RecordError(Problem(self.file, f"{self.place} (id {identity})", what, remedy, severity))

    def take_id(self, taken: set[int]) -> None:
        self.id = self.field("id", int)
        if self.id in taken:
            raise self.error("another record has the same id", "give each its own")
        taken.add(self.id)

    def field(self, key: str, kind: type[T]) -> T:
        value = self.content.get(key)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            found = reprlib.repr(value) if key in self.content else "missing"
            raise self.error(f"{key!r} is {found}, but COCO has {_KINDS[kind]} there", "correct the record")
        return value  # type: ignore[return-value]

    def reference(self, key: str, group: str, known: Collection[int]) -> int:
        value = self.field(key, int)
        if value not in known:
            what = f"{key} {value} is not among the {group}, {reprlib.repr(list(islice(known, 7)))}"
            raise self.error(what, "add it to them or remove this annotation")
        return value

    def bbox(self) -> list[float]:
        """x, y, width, height."""
        box: list[float] = self.field("bbox", list)
        if len(box) != 4 or not all(type(value) in (int, float) for value in box):
            what = f"bbox {reprlib.repr(box)} must be four numbers, x, y, width, height"
            raise self.error(what, "correct it")
        if not all(map(_is_finite, box)):
            raise self.error(f"bbox {box} has a coordinate that is NaN or infinite", "correct or remove it")
        return box

    def crowd_bbox(self, height: int, width: int) -> list[float]:
        """x, y, width, height; those of the segmentation if there is no valid bbox."""
        try:
            return self.bbox()
        except RecordError as error:
            try:
                return mask_box(encode_mask(self.content.get("segmentation"), height, width), height, width)
            except ValueError:
                # Training leaves crowds out, so none of them stops it.
                what = f"{error.problem.what}: a crowd with neither a valid box nor a valid mask is left out"
                raise self.error(what, "correct it or remove the annotation", "warning") from error

    def is_crowd(self) -> bool:
        value = self.content.get("iscrowd")
        if value not in (None, 0, 1, "0", "1"):  # true and false are equal to 1 and 0
            raise self.error(f"'iscrowd' is {reprlib.repr(value)}", "give 0 or 1")
        return value in (1, "1")

    def area(self) -> float:
        """Area in pixels; NaN if missing or invalid."""
        value: Any = self.content.get("area")
        return value if type(value) in (int, float) and _is_finite(value) and value >= 0 else math.nan

    def mask(self, height: int, width: int, *, optional: bool) -> bytes | None:
        """Counts of a compressed RLE; None if the record has no segmentation."""
        segmentation = self.content.get("segmentation")
        if not segmentation and optional:
            return None
        if not segmentation:
            raise self.error("no 'segmentation', but mask supervision needs masks", "add it")
        try:
            mask = encode_mask(segmentation, height, width)
        except ValueError as error:
            severity: Severity = "warning" if optional else "error"
            what = f"segmentation is no mask ({error})"
            raise self.error(what, "correct it or go without masks", severity) from error
        if not mask_area(mask, height, width):
            # Only a warning for mask supervision too: a polygon thinner than a pixel is no mistake.
            raise self.error("segmentation covers no pixel and counts as none", "correct it", "warning")
        return mask


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # unlike math.isfinite, also of integers that no float can hold


def _read_categories(file: _CocoFile) -> Categories:
    def read_category(record: _Record) -> tuple[int, str]:
        if record.content.get("supercategory") != record.content.get("name"):
            parents.add(repr(record.content.get("supercategory")))
        return record.id, record.field("name", str)

    parents: set[str] = set()
    names = dict(file.read("categories", read_category))
    names = {each: names.get(each, f"category {each}") for each in sorted(file.ids["categories"])}
    groupings = {each for each, name in names.items() if repr(name) in parents}
    return Categories(file.path, names, groupings, file.count("annotations", "category_id"))


def _sound_images(file: _CocoFile, folder: Path) -> list[IndexedImage]:
    """The images without a problem in their record or file."""
    found = file.read("images", _read_image)
    if not folder.is_dir():
        remedy = f"give the folder of the images of {file.path}"
        file.problems.append(Problem(folder, "", "no such folder", remedy))
        return found
    found = [each._replace(file_name=stored_name(folder, each.file_name)) for each in found]
    problems = check_images([folder / each.file_name for each in found], [each.size for each in found])
    file.problems += filter(None, problems)
    return [
        each
        for each, problem in zip(found, problems, strict=True)
        if problem is None or problem.severity == "warning"
    ]


def _read_image(record: _Record) -> IndexedImage:
    height, width = record.field("height", int), record.field("width", int)
    if min(height, width) < 1:
        raise record.error(f"width {width} and height {height} must be at least 1", "correct them")
    return IndexedImage(record.id, record.field("file_name", str), (height, width))
