"""Training through the command line, on real files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from boxteacher import BoxTeacher, InputError
from boxteacher.cli import main
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint
from boxteacher.engine.segmenters import build_segmenter, segmenter_names
from boxteacher.engine.settings import TrainSettings
from boxteacher.engine.train import supervise
from boxteacher.supervision import BoxSupervised, MaskSupervised
from tests.engine_support import (
    edited,
    error_of,
    log_of,
    train_arguments,
    without_masks,
)
from tests.teaching_support import teacher_of

SEGMENTER = build_segmenter("condinst", 2, backbone="resnet18", weights="none", image_size=64)
HALVES = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).repeat(1, 16, 16)
HALVES[..., 8:] = torch.tensor([0.6, 0.3, 0.1]).view(3, 1, 1)


def test_a_run_writes_a_checkpoint_its_settings_and_a_line_per_step(run, shapes):
    assert {"last.pt", "settings.json", "log.jsonl"} <= {path.name for path in run.iterdir()}
    assert not list(run.glob("*.partial"))
    made_with = json.loads((run / "settings.json").read_text())
    assert made_with["data"] == str(shapes)
    assert (made_with["steps"], made_with["batch_size"], made_with["seed"]) == (3, 2, 0)
    assert made_with["torch"] == torch.__version__
    lines = log_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"classification", "box", "centerness", "projection", "pairwise", "pixel", "affinity", "ellipse"}
    for line in lines:
        losses = {k: v for k, v in line.items() if k.startswith("loss_")}
        assert set(losses) == {f"loss_{name}" for name in names}
        assert line["loss"] == pytest.approx(sum(losses.values()), rel=1e-4)
        assert line["pseudo_masks"] >= 0
        assert 0 <= line["confidence"] <= 1


def test_the_checkpoint_holds_the_teacher_after_the_last_step(shapes, tmp_path):
    assert main([*train_arguments(shapes, tmp_path), "--steps", "1"]) == 0
    torch.manual_seed(0)  # the run's seed, so that its network began with these weights
    untrained = build_segmenter("condinst", 4, backbone="resnet18", weights="none", image_size=64)
    trained, _ = load_checkpoint(tmp_path / "last.pt")
    moved = [
        not torch.equal(ours, theirs)
        for ours, theirs in zip(trained.parameters(), untrained.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) // 2


def test_the_checkpoint_loads_with_weights_only_and_builds_its_segmenter(run):
    segmenter, info = load_checkpoint(run / "last.pt")
    assert info == SegmenterInfo(
        "condinst",
        "resnet18",
        64,
        ["disc", "triangle", "star", "cross"],
        [1, 2, 3, 4],
        refinement="color",
    )
    assert not segmenter.training
    assert type(segmenter).__name__ == "CondInst"
    content = torch.load(run / "last.pt", weights_only=True)
    assert content["weights"].keys() == segmenter.state_dict().keys()


@pytest.mark.parametrize("supervision", ["teacher", "box"])
def test_training_from_boxes_is_the_same_to_the_bit_without_masks(shapes, run, tmp_path, supervision):
    stripped = edited(shapes, tmp_path / "stripped", "train", without_masks)
    assert main(train_arguments(stripped, tmp_path / "without", "--supervision", supervision)) == 0
    if supervision == "teacher":
        reference = run
    else:
        reference = tmp_path / "with"
        assert main(train_arguments(shapes, reference, "--supervision", supervision)) == 0
    assert log_of(tmp_path / "without") == log_of(reference)
    ours, theirs = (
        torch.load(folder / "last.pt", weights_only=True)["weights"]
        for folder in (tmp_path / "without", reference)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_seed_determines_a_run_and_another_seed_does_not(shapes, run, tmp_path):
    for seed in (0, 1):
        assert main(train_arguments(shapes, tmp_path / str(seed), "--seed", str(seed))) == 0
    assert log_of(tmp_path / "0") == log_of(run)
    assert log_of(tmp_path / "1") != log_of(run)


def test_mask_supervision_reads_masks(shapes, tmp_path, capsys):
    assert main(train_arguments(shapes, tmp_path / "run", "--supervision", "mask", "--steps", "1")) == 0
    (line,) = log_of(tmp_path / "run")
    assert line["loss_mask"] > 0
    assert "loss_projection" not in line
    stripped = edited(shapes, tmp_path / "stripped", "train", without_masks)
    message = error_of(train_arguments(stripped, tmp_path / "other", "--supervision", "mask"), capsys)
    assert "segmentation" in message


def test_momentum_and_warm_ups_scale_with_the_number_of_steps():
    def model_of(steps: int, supervision: str = "teacher", **more: Any) -> Any:
        made = TrainSettings(
            "condinst", Path(), Path(), "resnet18", supervision=supervision, steps=steps, **more
        )
        segmenter = build_segmenter("condinst", 2, backbone="resnet18", weights="none", image_size=64)
        return supervise(segmenter, made)

    short, long = model_of(500, rounds=0), model_of(90_000, rounds=0)
    assert isinstance(short, BoxTeacher)
    assert (short.teacher.momentum, short.warmup_steps, short.pseudo_warmup_steps) == (0.98, 100, 500)
    assert (long.teacher.momentum, long.warmup_steps, long.pseudo_warmup_steps) == (0.999, 10_000, 10_000)
    given = model_of(500, momentum=0.0, warmup_steps=0, pseudo_warmup_steps=7)
    assert (given.teacher.momentum, given.warmup_steps, given.pseudo_warmup_steps) == (0, 0, 7)
    assert type(model_of(500, "box")) is BoxSupervised
    assert model_of(500, "box").warmup_steps == 100
    assert type(model_of(500, "mask")) is MaskSupervised


@pytest.mark.parametrize("name", ["condinst", "solov2", "mask_rcnn"])
def test_mask_samples_reach_the_segmenters_that_sample_masks(name):
    def built(**more: Any) -> Any:
        return build_segmenter(name, 2, backbone="resnet18", weights="none", image_size=64, **more)

    assert built(mask_samples=3).max_samples == 3
    assert built().max_samples == built(mask_samples=0).max_samples > 3


def test_mask_samples_for_a_segmenter_that_does_not_sample_are_refused(shapes, tmp_path, capsys):
    arguments = [*train_arguments(shapes, tmp_path / "run"), "--model", "mask2former", "--mask-samples", "8"]
    message = error_of(arguments, capsys)
    assert all(part in message for part in ("mask_samples is 8", "mask2former", "leave it out"))


def test_the_augmentation_option_selects_color_jitter_and_blur():
    def views(augmentation: Any) -> list[torch.Tensor]:
        made = TrainSettings("condinst", Path(), Path(), augmentation=augmentation)
        torch.manual_seed(0)
        return supervise(SEGMENTER, made).augmentation([HALVES] * 40)

    def blurred(view: torch.Tensor) -> bool:
        """Whether a half is not uniform: color jitter keeps it so, blur does not."""
        return any(float(half.flatten(1).std(1).max()) > 1e-4 for half in view.split(8, 2))

    assert all(torch.equal(view, HALVES) for view in views("none"))
    assert not any(map(blurred, views("color")))
    assert len({float(view[0, 0, 0]) for view in views("color")}) > 20
    assert 10 <= sum(map(blurred, views("color+blur"))) <= 30  # 20 ± 3 standard deviations


def weights_before_training() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    segmenter = build_segmenter("condinst", 4, backbone="resnet18", weights="none", image_size=64)
    return {name: parameter.detach().clone() for name, parameter in segmenter.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_a_step_of_sgd_has_the_length_of_the_clipped_gradient_times_lr(shapes, tmp_path, clip):
    more = "--supervision box --steps 1 --optimizer sgd --lr 0.1 --lr-warmup-steps 0 --weight-decay 0"
    arguments = [*train_arguments(shapes, tmp_path), *more.split(), "--gradient-clip", str(clip)]
    assert main(arguments) == 0
    (line,) = log_of(tmp_path)
    assert line["gradient_norm"] > 0.1
    after = torch.load(tmp_path / "last.pt", weights_only=True)["weights"]
    before = weights_before_training()
    moved = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    # In float32, changes of 1e-5 and less of weights of about 1 are rounded to about 1 %, independently.
    expected = 0.1 * (clip or line["gradient_norm"])
    assert math.sqrt(moved) == pytest.approx(expected, rel=1e-2)


def test_a_batch_of_one_image_of_one_cell_is_refused(shapes, tmp_path, capsys):
    arguments = [
        *train_arguments(shapes, tmp_path),
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--image-size",
        "32",
    ]
    assert main(arguments) == 2
    assert "give two images, or one of more than 32 pixels" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "--batch-size", "2"]) == 0


def test_a_registered_segmenter_is_found_by_its_name():
    assert "condinst" in segmenter_names()
    with pytest.raises(InputError, match=r"no model 'condinsd'.*condinst"):
        build_segmenter("condinsd", 2, backbone="resnet18", weights="none", image_size=64)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    shapes, tmp_path, capsys, monkeypatch
):
    forward = BoxTeacher.forward

    def poisoned(self: BoxTeacher, *args: Any) -> Any:
        losses = forward(self, *args)
        if self.training and self.optimizer_steps == 2:
            losses["loss_pixel"] = losses["loss_pixel"] * math.nan
        return losses

    monkeypatch.setattr(BoxTeacher, "forward", poisoned)
    message = error_of(train_arguments(shapes, tmp_path / "run"), capsys, code=3)
    assert "loss_pixel" in message
    assert "nan" in message
    assert "step 3" in message
    assert message.count(".png") == 2
    segmenter, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(p).all() for p in segmenter.parameters())
    assert len(log_of(tmp_path / "run")) == 2


def test_a_gradient_that_is_not_finite_does_not_change_the_weights(shapes, tmp_path, capsys, monkeypatch):
    forward = BoxTeacher.forward

    def poisoned(self: BoxTeacher, *args: Any) -> Any:
        losses = forward(self, *args)
        if self.training and self.optimizer_steps == 2:
            scale = next(p for p in self.student.parameters() if p.requires_grad).sum()
            losses["loss_pixel"] = losses["loss_pixel"] + (scale * 0).sqrt()  # finite, its gradient is not
        return losses

    monkeypatch.setattr(BoxTeacher, "forward", poisoned)
    message = error_of(train_arguments(shapes, tmp_path / "run"), capsys, code=3)
    assert "gradient_norm" in message
    segmenter, _ = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(p).all() for p in segmenter.parameters())


def test_settings_json_holds_resolved_defaults(run):
    settings = json.loads((run / "settings.json").read_text())
    expected = {"lr_warmup_steps": 1, "warmup_steps": 0, "pseudo_warmup_steps": 0, "momentum": 0.0}
    assert {name: settings[name] for name in expected} == expected
    assert settings["device"] == "cpu"
    assert None not in settings.values()


def test_a_diverging_run_stops(shapes, tmp_path, capsys):
    arguments = train_arguments(shapes, tmp_path / "run", "--lr", "1e30", "--steps", "8")
    message = error_of(arguments, capsys, code=3)
    assert "loss_" in message or "gradient_norm" in message
    path = tmp_path / "run" / "last.pt"
    if path.exists():
        segmenter, _ = load_checkpoint(path)
        assert all(torch.isfinite(p).all() for p in segmenter.parameters())


def test_the_weights_of_a_checkpoint_are_saved_by_safetensors(run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = torch.load(run / "last.pt", weights_only=True)["weights"]
    safetensors.save_file(weights, tmp_path / "weights.safetensors")
    loaded = safetensors.load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_the_state_of_a_wrapper_is_saved_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = teacher_of()
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    other = teacher_of()
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert other.optimizer_steps == 0
