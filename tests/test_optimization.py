"""The optimizers and schedules of a run, against closed forms."""

import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from boxteacher import InputError
from boxteacher.engine.optimization import build_optimizer, build_schedule
from boxteacher.engine.settings import TrainSettings


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Conv2d(2, 2, 1)
        self.anchors = nn.Parameter(torch.ones(2, 4))
        self.names = nn.Embedding(2, 3)


def made(**values: Any) -> TrainSettings:
    return TrainSettings("tiny", Path(), Path(), device="cpu", **values)


def rates(values: TrainSettings, steps: int) -> list[float]:
    """Learning rate of each step."""
    optimizer = build_optimizer(Tiny(), values)
    schedule = build_schedule(optimizer, values)
    taken = []
    for _ in range(steps):
        taken.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return taken


def closed_form(values: TrainSettings, step: int) -> float:
    """Factor of the learning rate of a step, counted from 0."""
    warmup = values.lr_warmup_steps
    rise = min(1.0, (step + 1) / max(1, warmup))
    if values.lr_steps:
        return rise * 0.1 ** bisect_right(values.lr_steps, step)
    angle = math.pi * max(0, step - warmup) / max(1, values.steps - warmup)
    return rise * 0.5 * (1 + math.cos(angle))


@settings(max_examples=50, deadline=None)
@given(
    warmup=st.integers(0, 90),
    milestones=st.sets(st.integers(1, 70), max_size=3).map(sorted).map(tuple),
    optimizer=st.sampled_from(["sgd", "adamw"]),
)
@example(warmup=0, milestones=(), optimizer="sgd")
@example(warmup=1, milestones=(), optimizer="sgd")
def test_learning_rates_are_those_of_the_closed_form(warmup, milestones, optimizer):
    values = made(lr=0.01, steps=80, optimizer=optimizer, lr_warmup_steps=warmup, lr_steps=milestones)
    expected = [0.01 * closed_form(values, step) for step in range(80)]
    assert rates(values, 80) == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_backbone_s_rate_follows_the_same_schedule():
    values = made(lr=0.01, steps=20, lr_warmup_steps=4, backbone_lr_factor=0.1)
    optimizer = build_optimizer(Tiny(), values)
    schedule = build_schedule(optimizer, values)
    for step in range(20):
        head, _, body, _ = schedule.get_last_lr()
        assert (head, body) == pytest.approx((0.01 * closed_form(values, step), head / 10), rel=1e-12)
        optimizer.step()
        schedule.step()


def test_without_warm_up_the_first_rate_is_the_peak_rate():
    assert rates(made(lr=0.25, lr_warmup_steps=0, lr_steps=(2,)), 4) == [0.25, 0.25, 0.025, 0.025]


@pytest.mark.parametrize(("steps", "expected"), [(10, 1), (1000, 50), (100_000, 500)])
def test_the_warm_up_scales_with_the_run(steps, expected):
    assert made(steps=steps).lr_warmup_steps == expected
    assert rates(made(lr=1.0, steps=steps), 1) == [pytest.approx(1 / expected)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_weights_of_linear_and_convolutional_layers_decay(optimizer):
    """Without gradient, a step multiplies a weight by 1 − lr · decay, with the backbone's own lr."""
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    values = made(optimizer=optimizer, lr=0.5, weight_decay=0.25, backbone_lr_factor=0.5)
    build_optimizer(model, values).step()
    left = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert left == {
        "backbone.0.weight": [1 - 0.5 * 0.5 * 0.25],
        "backbone.0.bias": [1.0],
        "backbone.1.weight": [1.0],
        "backbone.1.bias": [1.0],
        "head.weight": [1 - 0.5 * 0.25],
        "head.bias": [1.0],
        "anchors": [1.0],
        "names.weight": [1.0],
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_all_parameters_decay_if_asked(optimizer):
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, made(optimizer=optimizer, lr=0.5, weight_decay=0.25, decayed="all")).step()
    assert all(torch.equal(p, torch.full_like(p, 1 - 0.5 * 0.25)) for p in model.parameters())


def test_sgd_has_the_momentum_of_the_published_schedules():
    """Under a constant gradient of 1 the steps are lr · (1, 1 + 0.9, …)."""
    model = nn.Conv2d(1, 1, 1)
    optimizer = build_optimizer(model, made(optimizer="sgd", lr=1.0, weight_decay=0.0))
    with torch.no_grad():
        model.weight.zero_()
    for expected in (-1.0, -2.9, -5.61):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_frozen_parameters_are_not_optimized():
    model = Tiny()
    model.backbone.requires_grad_(False)
    optimizer = build_optimizer(model, made())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_backbone_rate_without_a_backbone_is_refused():
    with pytest.raises(InputError, match=r"backbone_lr_factor is 0\.1.*tiny.*leave") as caught:
        build_optimizer(nn.Conv2d(3, 3, 1), made(backbone_lr_factor=0.1))
    assert "\n" not in str(caught.value)


def test_milestones_that_are_never_reached_are_warned_of(caplog):
    build_schedule(build_optimizer(Tiny(), made()), made(steps=20, lr_steps=(20, 30)))
    assert "never falls" in caplog.text
    caplog.clear()
    build_schedule(build_optimizer(Tiny(), made()), made(steps=20, lr_steps=(19, 30)))
    assert not caplog.text
