"""The folder layouts of a data set: finding and reading a split."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from boxteacher.data.formats.coco import read_coco
from boxteacher.data.index import DataIndex
from boxteacher.data.problems import raise_first_error
from boxteacher.errors import InputError


@dataclass(frozen=True)
class Split:
    """Images folder and COCO JSON file of a split; `is_coco` if they are named as in COCO's release."""

    images: Path
    annotations: Path
    is_coco: bool


def find_split(root: str | Path, name: Literal["train", "val"]) -> Split:
    """Finds a split under `root` in one of two layouts.

    They are `annotations/NAME.json` with `NAME/`, which wins if both exist, and COCO's own
    `annotations/instances_NAME2017.json` with `NAME2017/`.

    Raises:
        InputError: `root` is not a folder, has neither layout, or lacks the images folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds 'annotations/' and the images")
    own = Split(root / name, root / "annotations" / f"{name}.json", is_coco=False)
    coco = Split(root / f"{name}2017", root / "annotations" / f"instances_{name}2017.json", is_coco=True)
    for split in (own, coco):
        if not split.annotations.is_file():
            continue
        if not split.images.is_dir():
            raise InputError(
                f"{split.images}: no such folder, but {split.annotations} exists; put its images there"
            )
        return split
    raise InputError(
        f"{root}: no {name} split; looked for {own.annotations} and {coco.annotations}; "
        f"put a COCO JSON file at one of them, and its images in {own.images} or {coco.images}"
    )


def read_split(
    root: str | Path,
    name: Literal["train", "val"],
    *,
    read_masks: bool = False,
    masks_optional: bool = False,
    classes: Mapping[int, str] | None = None,
) -> DataIndex:
    """Finds a split under `root` (see `find_split`) and reads it (see `read_coco`); logs warnings.

    Raises:
        InputError: there is no such split, or the data set has an error.
    """
    split = find_split(root, name)
    index, problems = read_coco(
        split.images,
        split.annotations,
        read_masks=read_masks,
        masks_optional=masks_optional,
        classes=classes,
    )
    raise_first_error(problems)
    return replace(index, is_coco=split.is_coco)
