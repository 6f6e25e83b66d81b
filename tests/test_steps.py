"""The teacher is updated once per optimizer step that changed the weights, in any training loop."""

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher, InputError, ProtocolError
from boxteacher.ema import StepCounter
from boxteacher.supervision import TrainingWrapper
from tests.support import ScriptedSegmenter, script, seeded_images, target


def small_teacher(momentum: float = 0.999) -> BoxTeacher:
    torch.manual_seed(0)
    plan = script((0, (0, 0, 30, 30), 0.9), level=2.0)
    segmenter = ScriptedSegmenter(plan)
    teacher = EMATeacher(segmenter, momentum=momentum)
    return BoxTeacher(segmenter, teacher=teacher, warmup_steps=4, augmentation=nn.Identity()).train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def total_loss(model: TrainingWrapper, seed: int = 0) -> torch.Tensor:
    losses = model(seeded_images((32, 32), seed=seed), [target((0, 0, 30, 30))])
    return torch.stack(list(losses.values())).sum()


def step(model: TrainingWrapper, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    total_loss(model, seed).backward()
    optimizer.step()


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def teacher_weights(model: BoxTeacher) -> torch.Tensor:
    model.synchronize()
    return weights(model.teacher)


def test_reading_optimizer_steps_does_not_update_the_teacher():
    model = small_teacher(momentum=0.0)
    before = weights(model.teacher)
    step(model, sgd(model))
    assert model.optimizer_steps == model.optimizer_steps == 1
    assert torch.equal(weights(model.teacher), before)
    model.synchronize()
    assert model.optimizer_steps == 1
    assert torch.equal(weights(model.teacher), weights(model.student))


def test_optimizer_steps_are_counted():
    model = small_teacher()
    optimizer = sgd(model)
    for number in range(1, 5):
        step(model, optimizer)
        assert model.optimizer_steps == number
    assert model.optimizer_steps == 4


def test_the_teacher_is_the_average_of_the_student_s_weights_from_the_first_on():
    model = small_teacher()
    optimizer = sgd(model)
    history = [weights(model.student)]
    for number in range(5):
        step(model, optimizer, seed=number)
        history.append(weights(model.student))
    # Up to 999 steps the average is a plain one.
    assert_close(teacher_weights(model), torch.stack(history).mean(0), rtol=1e-5, atol=1e-6)
    assert (teacher_weights(model) - history[-1]).abs().max() > 1e-4


def test_the_teacher_of_a_step_averages_the_steps_before_it():
    """During the second step the teacher is the mean of the student before and after the first step."""
    model = small_teacher()
    optimizer = sgd(model)
    before = weights(model.student)
    step(model, optimizer)
    mean = (before + weights(model.student)) / 2
    optimizer.zero_grad()
    total_loss(model).backward()
    assert_close(teacher_weights(model), mean, rtol=1e-6, atol=1e-7)
    optimizer.step()
    assert (teacher_weights(model) - mean).abs().max() > 1e-4


def test_buffers_are_averaged_too():
    model = small_teacher(momentum=0.0)
    step(model, sgd(model))
    model.synchronize()
    assert torch.equal(model.teacher.model.norm.running_mean, model.student.norm.running_mean)
    assert model.teacher.model.norm.num_batches_tracked == 1


def test_gradient_accumulation_is_one_step():
    model = small_teacher(momentum=0.0)
    optimizer = sgd(model)
    before = teacher_weights(model)
    for _ in range(3):
        total_loss(model).backward()
        assert torch.equal(teacher_weights(model), before)
        assert model.optimizer_steps == 0
    optimizer.step()
    assert model.optimizer_steps == 1
    assert torch.equal(teacher_weights(model), weights(model.student))


def fused_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)


@pytest.mark.parametrize("make_optimizer", [sgd, fused_adam])
def test_a_step_that_a_scaler_skips_is_not_counted(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
):
    model = small_teacher()
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    teacher, student = teacher_weights(model), weights(model.student)

    def scaled_step(gradient: float | None) -> None:
        optimizer.zero_grad()
        scaler.scale(total_loss(model)).backward()
        if gradient is not None:
            model.student.cells.weight.grad[0, 0, 0, 0] = gradient
        scaler.step(optimizer)
        scaler.update()

    for bad in (float("inf"), float("nan")):
        scaled_step(bad)
        assert model.optimizer_steps == 0
        assert torch.equal(weights(model.student), student)
        assert torch.equal(teacher_weights(model), teacher)
    scaled_step(None)
    assert model.optimizer_steps == 1
    assert not torch.equal(teacher_weights(model), teacher)


def test_two_optimizers_over_one_student_make_one_step():
    model = small_teacher()
    first = torch.optim.SGD(model.student.cells.parameters(), lr=0.1)
    second = torch.optim.AdamW(model.student.logit.parameters(), lr=0.1)
    for number in (1, 2):
        total_loss(model).backward()
        first.step()
        assert model.optimizer_steps == number
        second.step()
        assert model.optimizer_steps == number


def test_steps_over_other_parameters_are_not_counted():
    model = small_teacher()
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert model.optimizer_steps == 0


def test_two_models_count_their_own_steps():
    one, two = small_teacher(), small_teacher()
    first, second = sgd(one), sgd(two)
    step(one, first)
    step(two, second)
    step(two, second)
    assert (one.optimizer_steps, two.optimizer_steps) == (1, 2)


def pickled(model: BoxTeacher) -> BoxTeacher:
    return pickle.loads(pickle.dumps(model))


def saved(model: BoxTeacher) -> BoxTeacher:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_counts_its_own_steps(copied: Callable[[BoxTeacher], BoxTeacher]):
    model = small_teacher()
    optimizer = sgd(model)
    step(model, optimizer)
    twin = copied(model)
    assert twin.optimizer_steps == 1
    assert torch.equal(teacher_weights(twin), teacher_weights(model))
    step(model, optimizer)
    assert (model.optimizer_steps, twin.optimizer_steps) == (2, 1)
    twin_optimizer = sgd(twin)
    for _ in range(2):
        step(twin, twin_optimizer)
    assert (model.optimizer_steps, twin.optimizer_steps) == (2, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_includes_the_last_step(copied: Callable[[BoxTeacher], BoxTeacher]):
    model = small_teacher(momentum=0.0)
    step(model, sgd(model))
    twin = copied(model)
    assert twin.optimizer_steps == 1
    assert torch.equal(teacher_weights(twin), weights(twin.student))


def test_a_model_that_is_no_longer_used_is_freed():
    model = small_teacher()
    step(model, sgd(model))
    student, teacher = weakref.ref(model.student), weakref.ref(model.teacher)
    del model
    gc.collect()
    assert student() is None
    assert teacher() is None


def test_a_counter_may_outlive_its_module():
    module = nn.Linear(2, 2)
    counter = StepCounter(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    del module
    gc.collect()
    other = nn.Linear(2, 2)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert counter.advance()
    assert not counter.advance()


def test_a_run_resumed_from_a_state_dict_equals_the_uninterrupted_run():
    model = small_teacher()
    optimizer = sgd(model)
    for number in range(3):
        step(model, optimizer, seed=number)
    state = copy.deepcopy(model.state_dict())
    resumed = small_teacher()
    resumed.load_state_dict(state)
    assert resumed.optimizer_steps == 3
    resumed_optimizer = sgd(resumed)
    for number in range(3, 6):
        step(model, optimizer, seed=number)
        step(resumed, resumed_optimizer, seed=number)
    assert resumed.optimizer_steps == model.optimizer_steps == 6
    assert torch.equal(weights(resumed.student), weights(model.student))
    assert torch.equal(teacher_weights(resumed), teacher_weights(model))


def test_a_state_dict_includes_the_last_step():
    model = small_teacher(momentum=0.0)
    step(model, sgd(model))
    state = model.state_dict()
    for name, value in model.student.state_dict().items():
        assert torch.equal(state[f"teacher.model.{name}"], value)


def test_a_state_dict_is_loaded_with_weights_only():
    model = small_teacher()
    step(model, sgd(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = small_teacher()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.optimizer_steps == 1


def test_loading_a_state_dict_discards_earlier_steps():
    model = small_teacher()
    state = copy.deepcopy(model.state_dict())
    step(model, sgd(model))
    model.load_state_dict(state)
    assert model.optimizer_steps == 0
    assert torch.equal(teacher_weights(model), weights(model.student))


def test_training_continues_after_evaluation_in_inference_mode():
    model = small_teacher()
    optimizer = sgd(model)
    step(model, optimizer)
    with torch.inference_mode():
        model.eval()(seeded_images((32, 32)))
    assert model.optimizer_steps == 1
    step(model.train(), optimizer)
    assert model.optimizer_steps == 2
    assert not any(parameter.is_inference() for parameter in model.parameters())


class MasterWeights:
    """An optimizer of another library: it steps over copies of the weights, then writes them back."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.copies = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self.optimizer = torch.optim.SGD(self.copies, lr=0.01)

    @torch.no_grad()
    def step(self) -> None:
        for weight, copied in zip(self.weights, self.copies, strict=True):
            copied.grad = weight.grad
        self.optimizer.step()
        for weight, copied in zip(self.weights, self.copies, strict=True):
            weight.copy_(copied)


def test_steps_that_are_told_are_counted_and_move_the_teacher():
    model = small_teacher()
    optimizer = MasterWeights(model.student)
    history = [weights(model.student)]
    for number in range(1, 4):
        total_loss(model).backward()
        optimizer.step()
        assert model.optimizer_steps == number - 1  # nothing announces the step
        model.optimizer_stepped()
        assert model.optimizer_steps == number
        history.append(weights(model.student))
    assert_close(teacher_weights(model), torch.stack(history).mean(0), rtol=1e-5, atol=1e-6)


def test_telling_a_step_that_was_seen_changes_nothing():
    model = small_teacher()
    step(model, sgd(model))
    model.optimizer_stepped()
    assert model.optimizer_steps == 1


def test_telling_a_step_that_was_counted_counts_another():
    model = small_teacher()
    step(model, sgd(model))
    model.state_dict()
    model.optimizer_stepped()
    assert model.optimizer_steps == 2


def test_a_count_that_is_written_to_the_buffer_is_read():
    """As DistributedDataParallel does that wraps a model after its first batch."""
    model = small_teacher()
    step(model, sgd(model))
    model.step_count.fill_(2)
    assert model.optimizer_steps == 3
    assert model.warmup(8) == 0.5
    total_loss(model)
    assert model.step_count == model.optimizer_steps == 3


@pytest.mark.parametrize("wrapper", [BoxTeacher, BoxSupervised])
def test_losses_without_any_step_are_warned_of_once(wrapper: type[TrainingWrapper], caplog, monkeypatch):
    monkeypatch.setattr("boxteacher.supervision._BATCHES_WITHOUT_STEP", 4)
    model = wrapper(ScriptedSegmenter()).train()
    optimizer = MasterWeights(model.student)
    for _ in range(10):
        total_loss(model)
        optimizer.step()
    (record,) = caplog.records
    assert "no optimizer step was seen in 4 batches" in record.getMessage()
    assert "optimizer_stepped()" in record.getMessage()


def test_losses_with_steps_and_losses_that_are_only_looked_at_are_not_warned_of(caplog, monkeypatch):
    monkeypatch.setattr("boxteacher.supervision._BATCHES_WITHOUT_STEP", 4)
    model = small_teacher()
    optimizer = sgd(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for _ in range(3):  # gradients are accumulated
                total_loss(model)
            optimizer.step()
        with torch.no_grad():
            for _ in range(5):
                total_loss(model)
    assert not caplog.records


def test_a_momentum_of_1_freezes_the_teacher():
    model = small_teacher(momentum=1.0)
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    optimizer = sgd(model)
    for number in range(3):
        step(model, optimizer, seed=number)
    model.synchronize()
    assert model.optimizer_steps == 3
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())


def test_the_count_is_a_buffer_that_may_be_copied_to_another_process():
    model, other = small_teacher(), small_teacher()
    assert other.optimizer_steps == 0
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
    model.synchronize()
    buffers = dict(model.named_buffers())
    assert buffers["step_count"] == 3
    with torch.no_grad():  # as DistributedDataParallel does before the first batch
        for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    total_loss(other)
    assert other.optimizer_steps == 3
    assert other.warmup(8) == 0.5
    step(other, sgd(other))
    other.synchronize()
    assert other.step_count == other.optimizer_steps == 4


def test_a_state_dict_of_before_the_count_was_a_buffer_is_loaded():
    model = small_teacher()
    step(model, sgd(model))
    state = model.state_dict()
    state["_extra_state"] = state.pop("step_count") + 6
    other = small_teacher()
    other.load_state_dict(state)
    assert other.optimizer_steps == 7


class WithLoRA(nn.Module):
    """A layer with a low-rank addition, as peft injects it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, bias=False)
        self.lora_B = nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("change", ["LoRA", "another head", "a layer less"])
def test_a_student_that_is_changed_after_wrapping_is_named_in_one_line(change: str):
    model = small_teacher()
    teacher = weights(model.teacher)
    student = model.student
    if change == "LoRA":
        student.cells, named = WithLoRA(student.cells), "cells.base_layer.weight"
    elif change == "another head":
        student.logit, named = nn.Conv2d(8, 1, 3, padding=1), r"1 of another shape \(logit.weight\)"
    else:
        student.norm, named = nn.Identity(), "norm.weight"
    step(model, sgd(model))
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^the student was changed after.*{named}.*") as caught:
            total_loss(model)
        assert "\n" not in str(caught.value)
    assert torch.equal(weights(model.teacher), teacher)


def test_a_new_layer_of_the_same_shapes_moves_the_average_from_the_old_one():
    model = small_teacher()
    step(model, sgd(model))
    model.synchronize()
    old = model.teacher.model.logit.weight.detach().clone()
    model.student.logit = nn.Conv2d(8, 1, 1)
    step(model, sgd(model))
    model.synchronize()
    new = model.student.logit.weight.detach()
    assert_close(model.teacher.model.logit.weight.detach(), old.lerp(new, 1 / 3))


def test_a_student_that_is_replaced_after_wrapping_is_refused_in_one_line():
    model = small_teacher()
    model.student = ScriptedSegmenter()
    with pytest.raises(ProtocolError, match=r"student was replaced after it was wrapped: wrap the new one"):
        total_loss(model)


def test_a_student_that_is_changed_before_wrapping_trains():
    segmenter = ScriptedSegmenter()
    segmenter.cells = WithLoRA(segmenter.cells)
    model = BoxTeacher(segmenter, warmup_steps=0).train()
    before = weights(model.student)
    step(model, sgd(model))
    assert_close(teacher_weights(model), (before + weights(model.student)) / 2)
