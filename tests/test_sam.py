"""SamTeacher: what the network is asked, and which mask and confidence come of its answer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import box_iou, masks_to_boxes

from boxteacher import BoxTeacher, InputError, PseudoMaskSource
from boxteacher.grid import mask_grid
from boxteacher.targets import grid_targets
from boxteacher_adapters.sam import SamTeacher, mask_boxes
from tests.sam_support import KINDS, SIZE, ScriptedDecoder, filled_boxes, tiny_network, transformers
from tests.simulated_device import DEVICE, DeviceTensor, SimulatedDevice
from tests.support import ScriptedSegmenter, seeded_images, target
from tests.teaching_support import IMAGES, TARGETS, TEACHER_LOSSES

GRID = mask_grid(IMAGES, 4, 16)
SHAPES = [(48, 64), (64, 40), (100, 37)]
ONES = torch.ones(1, 4)


def scripted(kind: str, draw: Any) -> tuple[SamTeacher, ScriptedDecoder]:
    network = tiny_network(kind)
    decoder = ScriptedDecoder(network, draw)
    return SamTeacher(network), decoder


def fills_its_box(boxes: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    return filled_boxes(boxes)[:, None].expand(-1, 4, -1, -1), ONES.expand(len(boxes), -1)


def processor(kind: str) -> Any:
    """transformers' own preprocessing, for images in [0, 1]."""
    square = {"height": SIZE, "width": SIZE}
    if kind == "sam2":
        images = transformers.Sam2ImageProcessor(size=square, do_rescale=False)
        return transformers.Sam2Processor(images)
    images = transformers.SamImageProcessor(size={"longest_edge": SIZE}, pad_size=square, do_rescale=False)
    return transformers.SamProcessor(images)


@pytest.mark.skipif(transformers.__version__ < "5", reason="its preprocessing takes tensors since version 5")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_images_boxes_and_masks_are_mapped_as_by_transformers(kind, shape):
    height, width = shape
    (image,) = seeded_images(shape)
    box = (3.0, 5.5, width - 8.0, height - 10.0)
    answer = torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    teacher, decoder = scripted(kind, lambda boxes, pixels: (answer[None], ONES))
    grid = mask_grid([image], 1, 1)
    masks = teacher([image], [target(box)], grid).masks

    reference = processor(kind)
    inputs = reference(images=image, input_boxes=[[list(box)]], return_tensors="pt")
    assert_close(decoder.pixels[0], inputs["pixel_values"][0], atol=1e-4, rtol=0)
    assert_close(decoder.boxes[0], inputs["input_boxes"][0].float())
    sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
    (at_pixels,) = reference.post_process_masks([answer[None]], *sizes, binarize=False)  # (1, 4, H, W)
    inside = grid_targets([image], [target(box)], grid).box_masks
    difference = (masks - at_pixels[0].sigmoid() * inside).abs().amax((1, 2))
    assert float(difference.min()) < 1e-4  # one of the four answers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_found_where_it_is_in_the_image(kind, shape):
    """The decoder calls bright pixels of its input the object."""
    height, width = shape
    thing = (width // 4, height // 3, width // 4 * 3, height // 3 * 2)
    image = torch.zeros(3, height, width)
    image[:, thing[1] : thing[3], thing[0] : thing[2]] = 1
    teacher, _ = scripted(kind, lambda boxes, pixels: (pixels.mean(0).expand(1, 4, -1, -1), ONES))
    box = (thing[0] - 2, thing[1] - 1, thing[2] + 3, thing[3] + 4)
    grid = mask_grid([image], 2, 8)
    found = teacher([image], [target(box)], grid)
    truth = grid.sample(image[:1])
    assert ((found.masks > 0.5) != truth.bool()).sum() <= 0.05 * truth.sum()
    fit = box_iou(*(torch.tensor([each]) for each in (thing, box)))
    assert_close(found.confidence, fit[0].sqrt(), atol=0.03, rtol=0)  # half a pixel of the input per side


def test_every_box_of_every_image_gets_its_own_mask():
    teacher, decoder = scripted("sam", fills_its_box)
    found = teacher(IMAGES, TARGETS, GRID)
    boxes = torch.cat([each["boxes"] for each in TARGETS])
    rows, columns = (each + 0.5 for each in GRID.coordinates(boxes.device))  # centers of pixels
    expected = torch.stack(
        [((rows > y0) & (rows < y1))[:, None] & ((columns > x0) & (columns < x1)) for x0, y0, x1, y1 in boxes]
    )
    assert torch.equal(found.masks > 0.5, expected)
    assert (found.confidence > 0.93).all()
    assert len(decoder.pixels) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_cut_to_its_box_and_what_was_cut_off_lowers_its_confidence(kind):
    def everything(boxes: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(boxes), 4, 16, 16), 50.0), torch.full((len(boxes), 4), 0.8)

    teacher, _ = scripted(kind, everything)
    found = teacher(IMAGES, TARGETS, GRID)
    truth = grid_targets(IMAGES, TARGETS, GRID)
    assert torch.equal(found.masks, truth.box_masks.float())
    share = [26 * 26 / (48 * 64), 40 * 34 / (48 * 64), 30 * 26 / (40 * 50)]
    assert_close(found.confidence, (torch.tensor(share) * 0.8).sqrt())


@pytest.mark.parametrize(
    ("iou", "chosen"),
    [
        ((0.5, 0.5, 0.5, 0.5), 2),  # the best fit
        ((0.9, 0.1, 0.1, 0.5), 0),  # a good fit of a good mask rather than the best fit of a bad one
        ((0.0, 0.9, 0.0, 1.7), 3),  # a predicted IoU above 1 counts as 1
    ],
)
def test_the_chosen_mask_has_the_largest_product_of_fit_and_predicted_iou(iou, chosen):
    box = torch.tensor([8.0, 8.0, 40.0, 40.0])
    parts = torch.tensor([[8.0, 8, 40, 32], [8, 8, 24, 40], [8, 8, 40, 40], [8, 8, 40, 36]])
    fits = torch.tensor([0.75, 0.5, 1, 0.875])
    teacher, _ = scripted("sam2", lambda boxes, pixels: (filled_boxes(parts)[None], torch.tensor([iou])))
    image = torch.rand(3, SIZE, SIZE)
    found = teacher([image], [target(box.tolist())], mask_grid([image], 4, 4))
    assert_close(found.confidence, (fits * torch.tensor(iou).clamp(max=1)).sqrt()[[chosen]])
    expected = filled_boxes(parts[[chosen]])[:, 2::4, 2::4]
    assert_close(found.masks, expected.sigmoid() * (found.masks > 0), atol=1e-3, rtol=0)
    assert torch.equal(found.masks > 0.5, expected > 0)


def test_an_empty_mask_and_an_empty_box_have_confidence_0():
    def nothing(boxes: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(boxes), 4, 16, 16), -5.0), ONES.expand(len(boxes), -1)

    teacher, _ = scripted("sam", nothing)
    found = teacher([IMAGES[0]], [target((4, 4, 30, 30), (9, 9, 9, 9), (70, 60, 90, 80))], GRID)
    assert found.confidence.tolist() == [0, 0, 0]
    assert found.masks.max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_many_boxes_are_decoded_in_passes_of_at_most_32(kind):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(70, 2, generator=generator) * torch.tensor([40.0, 24.0])
    boxes = torch.cat([corners, corners + 8 + 16 * torch.rand(70, 2, generator=generator)], 1)
    teacher, decoder = scripted(kind, fills_its_box)
    together = teacher([IMAGES[0]], [target(*boxes.tolist())], GRID)
    assert [len(each) for each in decoder.boxes] == [32, 32, 32, 32, 6, 6]
    assert len(decoder.pixels) == 1
    alone = [teacher([IMAGES[0]], [target(box)], GRID) for box in boxes.tolist()]
    assert_close(together.masks, torch.cat([each.masks for each in alone]))
    assert_close(together.confidence, torch.cat([each.confidence for each in alone]))


def test_images_without_boxes_are_not_encoded():
    teacher, decoder = scripted("sam", fills_its_box)
    found = teacher([*IMAGES, IMAGES[0]], [target(), TARGETS[1], target()], GRID)
    assert found.masks.shape == (1, 12, 16)
    assert len(decoder.pixels) == 1
    found = teacher(IMAGES, [target(), target()], GRID)
    assert found.masks.shape == (0, 12, 16)
    assert found.confidence.shape == (0,)


def test_boxes_that_leave_the_image_are_cut_to_it():
    teacher, decoder = scripted("sam", fills_its_box)
    found = teacher([IMAGES[1]], [target((20, 20, 99, 99))], GRID)  # the image is 40 × 50
    assert_close(decoder.boxes[0], torch.tensor([[25.6, 25.5, 64, 51]]))
    assert found.confidence > 0.95
    assert not found.masks[:, 10:].any()
    assert not found.masks[:, :, 12:].any()


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=5, max_size=5))
@settings(deadline=None)
def test_boxes_of_clear_cut_masks_are_those_of_torchvision(cells):
    mask = torch.tensor([cells])
    if not mask.any():
        assert mask_boxes(mask.float() - 0.5).tolist() == [[0, 0, 0, 0]]
        return
    expected = masks_to_boxes(mask) + torch.tensor([0, 0, 1, 1])  # torchvision's ends are inclusive
    assert_close(mask_boxes(mask.float() * 6 - 3), expected.float())


def distances(boxes: Tensor, length: int) -> Tensor:
    """Logits (n, length, length): the distance in cells to the nearest side of a box in cells, within it."""
    center = torch.arange(length) + 0.5
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # (n, 1) each
    x, y = torch.minimum(center - x0, x1 - center), torch.minimum(center - y0, y1 - center)
    return torch.minimum(x[:, None, :], y[:, :, None])


@pytest.mark.parametrize("box", [(3.2, 5.75, 9.9, 18.1), (7.0, 12.5, 10.0, 16.4), (0.6, 0.5, 19.4, 19.5)])
def test_boxes_of_masks_are_exact_to_fractions_of_a_cell(box):
    boxes = torch.tensor([box])
    assert_close(mask_boxes(distances(boxes, 20)), boxes, atol=1e-5, rtol=0)


def test_the_fit_is_not_limited_by_the_size_of_a_cell():
    """A cell of the answer is 4 pixels of the input; the boxes end between cells."""
    teacher, _ = scripted(
        "sam", lambda boxes, pixels: (distances(boxes / 4, 16)[:, None].expand(-1, 4, -1, -1), ONES)
    )
    found = teacher([IMAGES[0]], [target((5, 9, 30, 27))], GRID)
    assert_close(found.confidence, torch.ones(1))


def test_a_teacher_alone_keeps_no_graph():
    teacher, _ = scripted("sam2", lambda boxes, pixels: (pixels.mean(0).expand(1, 4, -1, -1), ONES))
    found = teacher([IMAGES[1].clone().requires_grad_()], [TARGETS[1]], GRID)
    assert found.masks.max() > 0
    assert not found.masks.requires_grad
    assert not found.confidence.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_does_not_move_the_boxes(kind):
    exact, decoder = scripted(kind, fills_its_box)
    expected = exact(IMAGES, TARGETS, GRID)
    for dtype, ambient in ((torch.bfloat16, False), (None, True)):
        teacher = SamTeacher(exact.network, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
            found = teacher(IMAGES, TARGETS, GRID)
        assert_close(found.confidence, expected.confidence, atol=0, rtol=0)
    assert set(decoder.prompts) == {torch.float32}


@pytest.mark.parametrize(("dtype", "seen"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_encoder_computes_in_the_given_type(dtype, seen):
    network = tiny_network("sam")
    types = []
    network.vision_encoder.neck.conv1.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    SamTeacher(network, dtype=dtype)(IMAGES, TARGETS, GRID)
    assert set(types) == {seen}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_leaves_the_network_out_of_the_student(kind):
    torch.manual_seed(0)
    student = ScriptedSegmenter()
    network = tiny_network(kind).train()
    teacher = SamTeacher(network)
    model = BoxTeacher(student, teacher=teacher, warmup_steps=0).train()
    losses = model(IMAGES, TARGETS)
    assert losses.keys() == TEACHER_LOSSES
    assert all(loss.isfinite() for loss in losses.values())
    assert (model.last_pseudo_masks.confidence > 0).any()
    sum(losses.values()).backward()
    assert isinstance(teacher, PseudoMaskSource)
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in student.parameters()}
    assert all(name.startswith(("student.", "step_count")) for name in model.state_dict())
    assert model.segmenter is student


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_network_follows_the_images_to_their_device():
    teacher = SamTeacher(tiny_network("sam"))
    expected = teacher(IMAGES, TARGETS, GRID)
    moved = [{name: value.cuda() for name, value in each.items()} for each in TARGETS]
    found = teacher([image.cuda() for image in IMAGES], moved, GRID)
    assert_close(found.masks.cpu(), expected.masks, atol=1e-3, rtol=0)


class SamModel(nn.Module):
    """Its answer is there already, and it notes where it is moved."""

    def __init__(self, logits: Tensor, iou: Tensor) -> None:
        super().__init__()
        self.answer = (logits, iou)
        self.config = transformers.SamConfig(prompt_encoder_config={"image_size": SIZE})

    def to(self, device: torch.device) -> "SamModel":
        self.device = device
        return self

    def get_image_embeddings(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 8)

    def forward(self, *, image_embeddings: Tensor, input_boxes: Tensor, multimask_output: bool) -> Any:
        count, (logits, iou) = input_boxes.shape[1], self.answer
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return transformers.models.sam.modeling_sam.SamImageSegmentationOutput(
            pred_masks=logits[None, :count, chosen], iou_scores=iou[None, :count, chosen]
        )


def test_the_network_follows_the_images_and_the_teacher_s_own_part_does_not_synchronize():
    logits, iou = torch.randn(2, 4, 16, 16), torch.rand(2, 4)
    with SimulatedDevice() as device:
        teacher = SamTeacher(SamModel(DeviceTensor(logits), DeviceTensor(iou)))
        images = [DeviceTensor(image) for image in IMAGES]
        targets = [{name: DeviceTensor(value) for name, value in each.items()} for each in TARGETS]
        found = teacher(images, targets, GRID)
    assert not device.synchronizations
    assert teacher.network.device == DEVICE
    expected = SamTeacher(SamModel(logits, iou))(IMAGES, TARGETS, GRID)
    assert_close(found.masks.values, expected.masks)
    assert_close(found.confidence.values, expected.confidence)


def test_another_network_is_refused():
    with pytest.raises(InputError, match="network is a Linear: give a SamModel, Sam2Model, SamHQModel"):
        SamTeacher(nn.Linear(2, 2))
