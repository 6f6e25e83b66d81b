"""Every adapter of this package passes the kit that others are given, and counts over all processes."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher.adapter import Segmenter
from boxteacher.testing import check_provider
from boxteacher_adapters.condinst import build_condinst
from boxteacher_adapters.mask2former import build_mask2former
from boxteacher_adapters.mask_rcnn import build_mask_rcnn
from boxteacher_adapters.solov2 import build_solov2
from tests.support import seeded_images, target

Build = Callable[..., Segmenter]
Losses = dict[str, Tensor]


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_condinst, build_solov2, build_mask2former, build_mask_rcnn])
def test_the_adapter_conforms(build: Build) -> None:
    check_provider(build(3, backbone="resnet18", weights="none", image_size=128))


@pytest.mark.parametrize("build", [build_condinst, build_solov2, build_mask2former, build_mask_rcnn])
def test_a_plain_call_in_training_mode_says_how_to_train(build: Build) -> None:
    with torch.device("meta"):
        model = build(3, backbone="resnet18", weights="none", image_size=128)
    with pytest.raises(InputError, match=f"{type(model).__name__} is trained through .*: wrap it"):
        model.train()(seeded_images((64, 96)))


def losses_of_processes(functions: Sequence[Callable[[], Losses]], monkeypatch: pytest.MonkeyPatch) -> Losses:
    """The mean of losses that functions compute, each in a process of its own, with sums over them all."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(functions))
    counts: list[list[Tensor]] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: counts[-1].append(tensor.clone()))
    for function in functions:
        counts.append([])
        function()
    totals = [torch.stack(each).sum(0) for each in zip(*counts, strict=True)]
    assert totals
    results = []
    for function in functions:
        remaining = iter(totals)
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, left=remaining: tensor.copy_(next(left)))
        results.append(function())
    return {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}


@pytest.mark.parametrize("build", [build_condinst, build_solov2, build_mask2former])
@pytest.mark.parametrize("boxes", [(), ((4, 4, 40, 50), (30, 20, 60, 60))])
def test_two_processes_have_the_losses_of_one(
    build: Build, boxes: tuple[tuple[float, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them sees an image without boxes."""
    torch.manual_seed(0)
    model = build(3, backbone="resnet18", weights="none", image_size=128).train()
    freeze_batch_norms(model)
    images, targets = seeded_images((64, 64), (64, 64)), [target(*boxes), target()]

    @torch.no_grad()
    def losses(first: int, end: int) -> Losses:
        return model.forward_student(images[first:end], targets[first:end]).losses

    expected = losses(0, 2)
    actual = losses_of_processes([lambda: losses(0, 1), lambda: losses(1, 2)], monkeypatch)
    assert actual.keys() == expected.keys()
    for name, loss in actual.items():
        assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)


def freeze_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
