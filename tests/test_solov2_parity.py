"""A released SOLOv2 gives the original's numbers, from stand-in weights that every machine makes alike.

The original's network takes seconds for two images, so its features are computed once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from boxteacher import MaskSupervised
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.weights import fill
from boxteacher_adapters.checkpoints import recognize
from boxteacher_adapters.parts.maps import flatten_levels
from boxteacher_adapters.solov2 import SOLOv2
from tests.released_support import released_shapes, stand_in_checkpoint
from tests.support import filled, reference

pytestmark = pytest.mark.slow
expected = reference("forward_solov2_r50")
IMAGES = [expected(f"image_{i}") / 255 for i in range(2)]


@pytest.fixture(scope="module")
def original() -> SOLOv2:
    """The original's network and settings, with the features of `IMAGES` whatever it is given."""
    path = Path("released.pth")
    whole = recognize(stand_in_checkpoint(released_shapes("solov2_r50")), path)
    model = build_segmenter("solov2", 80, backbone="resnet50_caffe", weights="none", image_size=1333)
    fill(model, 80, whole, path)
    model.max_samples = 1000
    model.backbone.freeze()  # the batch norms are the only parts that training mode changes
    with torch.no_grad():
        features = model.eval()._features(IMAGES)
    model._features = lambda images: features
    return model


def assert_close_to_largest(actual: Tensor, wanted: Tensor) -> None:
    assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_features_are_the_original_s(original):
    features = original._features(IMAGES)
    assert_close_to_largest(features.mask_features[:, ::64], expected("mask_features"))
    first = 0
    for level, grid in enumerate(original.grids):
        assert_close_to_largest(features.category_maps[level][:, ::16], expected(f"category_logits_{level}"))
        kernels = features.kernels[:, first : first + grid * grid, ::64]  # (B, G · G, 4)
        assert_close_to_largest(kernels, flatten_levels([expected(f"kernels_{level}")]))
        first += grid * grid


def test_the_detections_are_the_original_s(original):
    with torch.no_grad():
        detections = original.eval()(IMAGES)
    for i, found in enumerate(detections):
        assert_close(found["scores"][:30], expected(f"{i}_scores"), rtol=1e-3, atol=0)
        assert torch.equal(found["labels"][:30], expected(f"{i}_labels"))
        masks = found["masks"][:30, 0] > 0.5  # (30, H, W)
        packed = np.unpackbits(expected(f"{i}_masks_packed").numpy(), axis=-1)
        wanted = torch.from_numpy(packed)[..., : masks.shape[-1]].bool()
        iou = (masks & wanted).sum((1, 2)) / (masks | wanted).sum((1, 2))
        assert iou.min() >= 0.99


def test_the_losses_from_masks_are_the_original_s(original):
    targets = []
    for i, image in enumerate(IMAGES):
        boxes = expected(f"train_{i}_gt_boxes")
        pixels = torch.stack([filled(b, *image.shape[1:]) for b in boxes.int().tolist()])
        # The original halves a mask's edge by bilinear shrinking and rounds the half up.
        shrunk = F.interpolate(pixels[None].float(), scale_factor=0.25, mode="bilinear")[0] >= 0.5
        masks = shrunk.repeat_interleave(4, 1).repeat_interleave(4, 2)
        targets.append({"boxes": boxes, "labels": expected(f"train_{i}_gt_labels"), "masks": masks})
    with torch.no_grad():
        losses = MaskSupervised(original).train()(IMAGES, targets)
    assert_close(losses["loss_category"], expected("train_loss_cate"), rtol=1e-3, atol=0)
    assert_close(3 * losses["loss_mask"], expected("train_loss_ins"), rtol=1e-3, atol=0)  # its weight
