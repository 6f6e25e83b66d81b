"""Data sets: read and checked once into an index, then loaded as tensors."""

from boxteacher.data.dataset import InstanceDataset, collate
from boxteacher.data.formats.coco import read_coco
from boxteacher.data.index import DataIndex
from boxteacher.data.layout import find_split, read_split
from boxteacher.data.shapes import write_shapes
from boxteacher.data.transforms import evaluation_transform, training_transform

__all__ = [
    "DataIndex",
    "InstanceDataset",
    "collate",
    "evaluation_transform",
    "find_split",
    "read_coco",
    "read_split",
    "training_transform",
    "write_shapes",
]
