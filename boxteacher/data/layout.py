"""Where a data set keeps the images and the annotations of a split, and reading it from there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from boxteacher.data.formats.coco import read_coco
from boxteacher.data.index import DataIndex
from boxteacher.data.problems import raise_first_error
from boxteacher.errors import InputError


@dataclass(frozen=True)
class Split:
    """A folder of images and the COCO JSON file about them; `is_coco` if they are named as COCO's own."""

    images: Path
    annotations: Path
    is_coco: bool


def find_split(root: Path, name: Literal["train", "val"]) -> Split:
    """Find a split under `root` in either layout, without being told which.

    The layouts are `annotations/NAME.json` with `NAME/`, and COCO's own `annotations/instances_NAME2017.json`
    with `NAME2017/`. The first wins where both are there.

    Raises:
        InputError: `root` is no folder, it holds neither layout, or the folder of images is missing.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds 'annotations/' and the images")
    own = Split(root / name, root / "annotations" / f"{name}.json", is_coco=False)
    coco = Split(root / f"{name}2017", root / "annotations" / f"instances_{name}2017.json", is_coco=True)
    for split in (own, coco):
        if not split.annotations.is_file():
            continue
        if not split.images.is_dir():
            raise InputError(
                f"{split.images}: no such folder, though {split.annotations} is there; put its images there"
            )
        return split
    raise InputError(
        f"{root}: no {name} split; looked for {own.annotations} and {coco.annotations}; "
        f"put a COCO JSON file at one of them, and its images in {own.images} or {coco.images}"
    )


def read_split(
    root: Path,
    name: Literal["train", "val"],
    *,
    read_masks: bool = False,
    masks_optional: bool = False,
    category_ids: Sequence[int] | None = None,
) -> DataIndex:
    """Find a split under `root` and read it; warnings about it are logged.

    The arguments after `name` are those of `read_coco`.

    Raises:
        InputError: there is no such split (see `find_split`), or something in it cannot be used.
    """
    split = find_split(root, name)
    index, problems = read_coco(
        split.images,
        split.annotations,
        read_masks=read_masks,
        masks_optional=masks_optional,
        category_ids=category_ids,
    )
    raise_first_error(problems)
    return replace(index, is_coco=split.is_coco)
