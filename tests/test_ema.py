"""The EMA update, against its closed form."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher.ema import ema_momentum, update_ema


class Mixed(nn.Module):
    """Parameters and buffers of several kinds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.long_float = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.short_float = nn.Parameter(torch.randn(5).bfloat16())
        self.register_buffer("hidden", torch.randn(3), persistent=False)
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("flags", torch.rand(6) < 0.5)
        self.layers[1].running_mean.normal_()
        self.layers[1].num_batches_tracked.fill_(seed)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_every_tensor_is_updated_by_the_formula(momentum):
    teacher, student = Mixed(1), Mixed(2)
    before, theirs = copy.deepcopy(tensors(teacher)), copy.deepcopy(tensors(student))
    update_ema(teacher, student, momentum)
    for name, value in tensors(teacher).items():
        if value.is_floating_point():
            expected = momentum * before[name].double() + (1 - momentum) * theirs[name].double()
            eps = torch.finfo(value.dtype).eps
            assert_close(value.double(), expected, rtol=2 * eps, atol=2 * eps)
        else:
            assert torch.equal(value, theirs[name])
    for name, value in tensors(student).items():
        assert torch.equal(value, theirs[name])


def test_buffers_can_stay_the_teacher_s_own():
    teacher, student = Mixed(1), Mixed(2)
    before = copy.deepcopy(dict(teacher.named_buffers()))
    update_ema(teacher, student, 0.0, buffers=False)
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_buffers())
    theirs = dict(student.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.named_parameters())


def test_without_momentum_the_teacher_is_a_copy():
    teacher, student = Mixed(1), Mixed(2)
    update_ema(teacher, student, 0.0)
    for name, value in tensors(teacher).items():
        assert torch.equal(value, tensors(student)[name])
        assert value.data_ptr() != tensors(student)[name].data_ptr()


def test_the_first_updates_are_a_plain_mean():
    torch.manual_seed(0)
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    history = []
    for step in range(20):
        with torch.no_grad():
            student.weight.normal_()
        history.append(student.weight.detach().clone())
        update_ema(teacher, student, ema_momentum(step))
        assert_close(teacher.weight.detach(), torch.stack(history).mean(0), rtol=1e-5, atol=1e-6)


def test_momentum_grows_from_0_to_its_maximum():
    momenta = [ema_momentum(step, 0.9) for step in range(50)]
    assert momenta[0] == 0
    assert momenta[1] == 0.5
    assert momenta == sorted(momenta)
    assert all(momentum == 0.9 for momentum in momenta[9:])
    assert ema_momentum(7, 0.0) == 0


def test_the_update_is_not_differentiated():
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    update_ema(teacher, student, 0.5)
    assert teacher.weight.grad_fn is None
    assert teacher.weight.requires_grad


def test_networks_that_differ_are_refused():
    for student, named in ((nn.Linear(3, 2, bias=False), "bias"), (nn.Linear(3, 1), "weight")):
        teacher = nn.Linear(3, 2)
        before = teacher.weight.clone()
        with pytest.raises(InputError, match=named):
            update_ema(teacher, student, 0.5)
        assert torch.equal(teacher.weight, before)
