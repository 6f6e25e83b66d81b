"""A minimal training from boxes: a disc is learned from its box and colors alone."""

import torch
from torch import nn
from torchvision.ops import box_iou

from boxteacher import BoxTeacher, EMATeacher
from tests.support import target


def assert_learns_a_disc(student: nn.Module, *, steps: int, warmup_steps: int, lr: float) -> None:
    """Trains on a disc and its mirror image; a mask that is just the box would overlap it by π / 4."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    disc = (x - 36).square() + (y - 34).square() < 20**2  # (64, 96)
    colors = ((0.9, 0.2), (0.5, 0.4), (0.1, 0.6))
    image = torch.stack([torch.where(disc, bright, dark) for bright, dark in colors])
    box, mirrored = target((16.0, 14.0, 57.0, 55.0)), target((39.0, 14.0, 80.0, 55.0))
    teacher = EMATeacher(student, momentum=0.8)
    model = BoxTeacher(student, teacher=teacher, warmup_steps=warmup_steps).train()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = model([image, image.flip(2)], [box, mirrored])
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert box_iou(found["boxes"][:1], box["boxes"]) > 0.75
    mask = found["masks"][0, 0] > 0.5
    assert (mask & disc).sum() / (mask | disc).sum() > 0.82
