"""What the files of Mask2Former's tests share."""

import torch
from torch import Tensor

from boxteacher_adapters.mask2former import STRIDES, Mask2Former
from boxteacher_adapters.parts.backbones import build_backbone
from tests.support import filled


def tiny(*, queries: int = 6, spatial_prior: bool = False) -> Mask2Former:
    torch.manual_seed(0)
    return Mask2Former(
        build_backbone("resnet18", "none", strides=STRIDES),
        3,
        channels=64,
        num_queries=queries,
        encoder_layers=1,
        decoder_layers=3,
        spatial_prior=spatial_prior,
    )


def with_masks(targets: list[dict], images: list[Tensor]) -> list[dict]:
    """The targets with their filled boxes as annotated masks."""
    annotated = []
    for each, image in zip(targets, images, strict=True):
        masks = [filled(box, *image.shape[1:]) for box in each["boxes"].int().tolist()]
        annotated.append({**each, "masks": torch.stack(masks)})
    return annotated
