"""Counts over processes: two with a part of the batch each give the gradient of one with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from boxteacher import BoxTeacher, PseudoMasks
from boxteacher.distributed import global_count, global_mean
from tests.support import ScriptedSegmenter, filled, seeded_images, target

IMAGES = seeded_images((48, 64), (48, 64), (48, 64))
ANNOTATED = filled((12, 12, 36, 30), 48, 64)[None]
TARGETS = [target((4, 4, 30, 30), (20, 10, 60, 44)), target((10, 10, 40, 36), masks=ANNOTATED), target()]
PARTS = ([0, 1], [2])  # the second process has no box at all


def boxes_as_masks(images, targets, grid):
    """Filled boxes as pseudo masks, with confidence 0 for narrow ones."""
    boxes = torch.cat([each["boxes"] for each in targets])
    return PseudoMasks(torch.ones(len(boxes), *grid.shape), (boxes[:, 2] - boxes[:, 0] > 28).float() * 0.7)


def gradients(part: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    segmenter = ScriptedSegmenter()
    segmenter.norm.eval()
    model = BoxTeacher(segmenter, teacher=boxes_as_masks, augmentation=nn.Identity(), warmup_steps=0).train()
    segmenter.norm.eval()
    losses = model([IMAGES[i] for i in part], [TARGETS[i] for i in part])
    sum(loss for name, loss in losses.items() if name != "loss_class").backward()
    return {name: p.grad for name, p in segmenter.named_parameters() if p.grad is not None}


def steps_after_resuming(rank: int) -> tuple[int, float]:
    """Steps and warm-up after a batch, where only the first process has loaded a state of 5 steps."""
    model = BoxTeacher(ScriptedSegmenter(), teacher=boxes_as_masks).train()
    if rank == 0:
        model.load_state_dict({**model.state_dict(), "step_count": torch.tensor(5)})
    nn.parallel.DistributedDataParallel(model)(IMAGES, TARGETS)
    return model.optimizer_steps, model.warmup(12)


def run(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = gradients(PARTS[rank])
    for gradient in found.values():  # as DistributedDataParallel does
        dist.all_reduce(gradient)
        gradient /= 2
    counts = global_count(torch.tensor([rank + 1, 4]))
    mean = global_mean(torch.tensor([1.0, 2.0]) if rank == 0 else torch.zeros(0))
    torch.save((found, counts, mean, steps_after_resuming(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_counts_are_left_as_they_are_in_one_process():
    count = torch.tensor(3)
    assert global_count(count) is count
    assert global_mean(torch.tensor([1.0, 2.0])) == 1.5
    assert global_mean(torch.zeros(0)) == 0


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_have_the_gradient_of_one(tmp_path: Path):
    mp.start_processes(run, (str(tmp_path),), nprocs=2, start_method="fork")  # spawned ones import torch anew
    expected = gradients([0, 1, 2])
    means = []
    for rank in range(2):
        found, counts, mean, steps = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert steps == (5, 0.5)
        assert counts.tolist() == [1.5, 4.0]
        means.append(mean)
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    assert sum(means) / 2 == 1.5
