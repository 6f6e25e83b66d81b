"""CondInst: its mask head against a loop, its samples and detections, and what it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from boxteacher_adapters.condinst import CondInst, DynamicMaskHead, build_condinst
from boxteacher_adapters.parts.backbones import build_backbone
from tests.disc_support import assert_learns_a_disc
from tests.support import seeded_images, target

IMAGES = seeded_images((64, 96), (57, 71))
TARGETS = [target((4, 4, 40, 50), (50, 20, 90, 60)), target((10, 10, 60, 50))]


def tiny(max_samples: int = 64) -> CondInst:
    torch.manual_seed(0)
    return CondInst(
        build_backbone("resnet18", "none"),
        3,
        channels=64,  # two values per group norm's group even on a map of one cell
        num_convs=1,
        mask_channels=16,
        level_sizes=(32, 64, 128, 256),
        max_samples=max_samples,
    )


@pytest.fixture(scope="module")
def talkative() -> CondInst:
    """An untrained network that finds things nonetheless, of different classes, sizes and scores."""
    model = tiny()
    head = model.box_head
    with torch.no_grad():
        head.class_logits.bias.fill_(-1.0)
        head.distances.bias.fill_(1.5)
        for conv in (head.class_logits, head.distances, head.centerness, head.controller):
            conv.weight.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def test_the_mask_head_is_a_convolution_per_instance():
    torch.manual_seed(0)
    head = DynamicMaskHead(5, sizes=(64, 128), stride=8, channels=4)
    features, params = torch.randn(2, 5, 6, 7), torch.randn(3, head.num_params)
    image, level = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    centers = torch.tensor([[20.0, 12.0], [4.0, 44.0], [52.0, 4.0]])
    logits = head(features, params, image, centers, level)
    assert logits.shape == (3, 1, 6, 7)
    assert head.num_params == 7 * 4 + 4 * 4 + 4 + 4 + 4 + 1
    ys, xs = torch.meshgrid(torch.arange(6) * 8 + 4, torch.arange(7) * 8 + 4, indexing="ij")
    for m in range(3):
        size = (64, 128)[level[m]]
        offset = torch.stack([centers[m, 0] - xs, centers[m, 1] - ys]) / size
        x = torch.cat([offset, features[image[m]]])[None]
        w1, w2, w3, b1, b2, b3 = params[m].split([28, 16, 4, 4, 4, 1])
        x = F.relu(F.conv2d(x, w1.view(4, 7, 1, 1), b1))
        x = F.relu(F.conv2d(x, w2.view(4, 4, 1, 1), b2))
        x = F.conv2d(x, w3.view(1, 4, 1, 1), b3)
        assert_close(logits[m], x[0], rtol=1e-4, atol=1e-5)


def test_detections_are_the_candidates_best_first(talkative):
    detections, candidates = talkative(IMAGES), talkative.forward_teacher(IMAGES)
    for i, found in enumerate(detections):
        assert 0 < len(found["scores"]) <= 100
        assert (found["scores"].diff() <= 0).all()
        mine = candidates.boxes[candidates.image_index == i]
        assert {tuple(box) for box in mine.tolist()} == {tuple(box) for box in found["boxes"].tolist()}


def test_the_number_of_masks_is_bounded_per_image():
    with torch.no_grad():
        (masks,) = tiny(max_samples=4).train().forward_student(IMAGES, TARGETS).masks
    assert masks.target_index.bincount(minlength=3).tolist() == [2, 2, 4]
    assert masks.logits.shape == (8, 16, 24)


def test_small_images_get_the_small_heads():
    with torch.device("meta"):
        small, large = (
            build_condinst(3, backbone="resnet18", weights="none", image_size=size) for size in (512, 513)
        )
    assert (small.fpn.inner_blocks[0][0].out_channels, small.level_sizes) == (128, (32, 64, 128, 256))
    assert (large.fpn.inner_blocks[0][0].out_channels, large.level_sizes) == (256, (64, 128, 256, 512))


def test_every_class_has_a_probability_of_a_hundredth_at_first():
    assert_close(tiny().box_head.class_logits.bias.sigmoid(), torch.full((3,), 0.01))


@pytest.mark.slow
def test_a_disc_is_learned_from_its_box():
    assert_learns_a_disc(tiny(), steps=70, warmup_steps=60, lr=5e-4)
