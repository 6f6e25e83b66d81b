"""Pseudo masks of a whole data set, from any source, and the file that keeps them."""

import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from boxteacher.data import DataIndex, InstanceDataset, collate, evaluation_transform
from boxteacher.data.masks import encode_binary_masks
from boxteacher.engine.devices import to_device
from boxteacher.engine.files import write_atomically
from boxteacher.grid import MaskGrid
from boxteacher.protocol import PseudoMaskSource, Target
from boxteacher.targets import box_masks
from boxteacher.validation import check_pseudo_masks

logger = logging.getLogger(__name__)

_MAXIMUM_CONFIDENCE = 0.999  # of a pseudo mask: 1 is that of an annotated one
_FINER = 2  # masks are predicted at this multiple of the training images' size


@dataclass(frozen=True)
class PredictedMasks:
    """A pseudo mask for each of a data set's M objects.

    Attributes:
        masks: counts of a compressed RLE at the stored image's size; None for a crowd, and where the source
            has none.
        confidence: (M,) float32 in [0, 1]; 0 where there is no mask.
    """

    masks: list[bytes | None]
    confidence: NDArray[np.float32]

    def save(self, path: Path, step: int) -> None:
        """Writes one compressed file; a crash leaves an earlier one as it was."""
        counts = [mask or b"" for mask in self.masks]

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(
                    file,
                    step=np.array(step),
                    counts=np.frombuffer(b"".join(counts), dtype=np.uint8),
                    ends=np.cumsum([len(each) for each in counts], dtype=np.int64),
                    confidence=self.confidence,
                )

        write_atomically(path, write)


def load_predicted_masks(path: Path) -> tuple[PredictedMasks, int]:
    """Pseudo masks that `PredictedMasks.save` wrote, and the step that they were predicted before."""
    with np.load(path) as file:
        text, ends = file["counts"].tobytes(), file["ends"].tolist()
        counts = [text[start:end] or None for start, end in pairwise([0, *ends])]
        return PredictedMasks(counts, file["confidence"]), int(file["step"])


@torch.no_grad()
def predict_pseudo_masks(
    source: PseudoMaskSource,
    index: DataIndex,
    *,
    image_size: int,
    shortest_side: int | None,
    device: str,
    workers: int,
) -> PredictedMasks:
    """Asks a source for the masks of all objects of a data set, one image at a time.

    Args:
        source: source of pseudo masks.
        index: data set; its own masks are not looked at.
        image_size: longest side of the training images in pixels; masks are predicted at twice their size.
        shortest_side: shortest side of the training images in pixels (see `evaluation_transform`).
        device: device of the source.
        workers: number of processes that load images.
    """
    transform = evaluation_transform(_FINER * image_size, shortest_side and _FINER * shortest_side)
    images = InstanceDataset(replace(index, masks=None, mask_confidence=None), transform=transform)
    masks: list[bytes | None] = [None] * len(index.labels)
    confidence = np.zeros(len(index.labels), dtype=np.float32)
    loader = DataLoader(
        images, batch_size=1, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
    for i, (batch, targets) in enumerate(loader):
        (image,), (target,) = to_device(batch, targets, torch.device(device))
        if len(target["boxes"]) == 0:
            continue
        grid = MaskGrid(1, *image.shape[-2:])
        pseudo = source([image], [cast(Target, target)], grid)
        check_pseudo_masks(source, pseudo, (len(target["boxes"]), *grid.shape))
        inside = pseudo.masks.masked_fill(~box_masks(target["boxes"], *grid.coordinates(image.device)), 0)
        start, end = index.starts[i : i + 2]
        objects = start + np.flatnonzero(~index.crowd[start:end])
        # Resizing may have left the smallest boxes without area.
        objects = objects[np.isin(index.annotation_ids[objects], target["annotation_ids"].cpu())]  # (N,)
        height, width = map(int, index.sizes[i])
        confidence[objects] = pseudo.confidence.float().cpu().numpy()
        for k, counts in zip(objects, encode_binary_masks(inside, height, width), strict=True):
            masks[k] = counts if confidence[k] > 0 else None
    return PredictedMasks(masks, confidence)


def with_pseudo_masks(index: DataIndex, predicted: PredictedMasks) -> DataIndex:
    """The data set with pseudo masks where an object has no annotated mask."""
    annotated = index.masks or [None] * len(predicted.masks)
    pseudo_confidence = predicted.confidence.clip(max=_MAXIMUM_CONFIDENCE)
    confidence = np.where([mask is not None for mask in annotated], 1.0, pseudo_confidence)
    return replace(
        index,
        masks=[own or pseudo for own, pseudo in zip(annotated, predicted.masks, strict=True)],
        mask_confidence=confidence.astype(np.float32),
    )
