"""SOLOv2 gives the original's numbers from stand-in weights that every machine makes alike."""

import math
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from boxteacher import MaskSupervised
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.solov2 import SOLOv2
from boxteacher_adapters.solov2_masks import by_cell
from tests.support import filled, reference

# From the names here to those of AdelaiDet's checkpoint, whose names the stand-in weights are made from.
ORIGINAL_NAMES = (
    (r"^fpn\.inner_blocks\.(\d)\.0\.", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}."),
    (r"^fpn\.layer_blocks\.(\d)\.0\.", lambda m: f"backbone.fpn_output{int(m[1]) + 2}."),
    (r"^head\.category_tower\.", "ins_head.cate_tower."),
    (r"^head\.kernel_tower\.", "ins_head.kernel_tower."),
    (r"^head\.category\.", "ins_head.cate_pred."),
    (r"^head\.kernel\.", "ins_head.kernel_pred."),
    (r"^mask_branch\.levels\.(\d)\.(\d)\.", r"mask_head.convs_all_levels.\1.conv\2."),
    (r"^mask_branch\.out\.", "mask_head.conv_pred."),
    (r"^backbone\.network\.(conv|bn)1\.", r"backbone.network.stem.\g<1>1."),
    (r"^backbone\.network\.", "backbone.bottom_up."),
    (r"\blayer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def stand_in(name: str, shape: torch.Size) -> Tensor:
    """What the tensor of this name was when the reference numbers were made."""
    for pattern, original in ORIGINAL_NAMES:
        name = re.sub(pattern, original, name)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    kind = name.rsplit(".", 1)[-1]
    if kind == "running_var":
        return 1 + 0.1 * noise.abs()
    if kind == "running_mean":
        return 0.1 * noise
    if kind == "bias":
        return 0.05 * noise - (2 if name == "ins_head.cate_pred.bias" else 0)
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(math.prod(shape[1:])) * (3 if name == "ins_head.cate_pred.weight" else 1)


@pytest.fixture(scope="module")
def original() -> SOLOv2:
    """The original's network and its settings."""
    body = build_backbone("resnet50_caffe", "none", (4, 8, 16, 32)).freeze()
    model = SOLOv2(body, 80, max_samples=1000)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in ("backbone.mean", "backbone.std") and not name.endswith("num_batches_tracked"):
                tensor.copy_(stand_in(name, tensor.shape))
    return model.eval()


expected = reference("forward_solov2_r50")


def original_images() -> list[Tensor]:
    return [expected(f"image_{i}") / 255 for i in range(2)]


def assert_close_to_greatest(actual: Tensor, wanted: Tensor) -> None:
    assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_features_are_the_original_s(original):
    with torch.no_grad():
        features = original._features(original_images())
    assert_close_to_greatest(features.mask_features[:, ::64], expected("mask_features"))
    first = 0
    for level, grid in enumerate(original.grids):
        assert_close_to_greatest(features.category_maps[level][:, ::16], expected(f"category_logits_{level}"))
        kernels = features.kernels[:, first : first + grid * grid, ::64]  # (B, G · G, 4)
        assert_close_to_greatest(kernels, by_cell([expected(f"kernels_{level}")]))
        first += grid * grid


def test_the_detections_are_the_original_s(original):
    with torch.no_grad():
        detections = original(original_images())
    for i, found in enumerate(detections):
        assert_close(found["scores"][:30], expected(f"{i}_scores"), rtol=1e-3, atol=0)
        assert torch.equal(found["labels"][:30], expected(f"{i}_labels"))
        masks = found["masks"][:30, 0] > 0.5  # (30, H, W)
        packed = np.unpackbits(expected(f"{i}_masks_packed").numpy(), axis=-1)
        wanted = torch.from_numpy(packed)[..., : masks.shape[-1]].bool()
        iou = (masks & wanted).sum((1, 2)) / (masks | wanted).sum((1, 2))
        assert iou.min() >= 0.99


def test_the_losses_from_masks_are_the_original_s(original):
    images = original_images()
    targets = []
    for i, image in enumerate(images):
        boxes = expected(f"train_{i}_gt_boxes")
        drawn = torch.stack([filled(b, *image.shape[1:]) for b in boxes.int().tolist()])
        # The original halves a mask's edge by bilinear shrinking and rounds the half up.
        shrunk = F.interpolate(drawn[None].float(), scale_factor=0.25, mode="bilinear")[0] >= 0.5
        masks = shrunk.repeat_interleave(4, 1).repeat_interleave(4, 2)
        targets.append({"boxes": boxes, "labels": expected(f"train_{i}_gt_labels"), "masks": masks})
    model = MaskSupervised(original)
    with torch.no_grad():
        losses = model.train()(images, targets)
    model.eval()
    assert_close(losses["loss_category"], expected("train_loss_cate"), rtol=1e-3, atol=0)
    assert_close(3 * losses["loss_mask"], expected("train_loss_ins"), rtol=1e-3, atol=0)  # its weight
