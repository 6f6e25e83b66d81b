"""Images and boxes from COCO files, their transforms, and a data set drawn by the library itself."""

from boxteacher.data.coco import CocoInstances, collate
from boxteacher.data.layout import Split, find_split
from boxteacher.data.shapes import write_shapes
from boxteacher.data.transforms import evaluation_transform, training_transform

__all__ = [
    "CocoInstances",
    "Split",
    "collate",
    "evaluation_transform",
    "find_split",
    "training_transform",
    "write_shapes",
]
