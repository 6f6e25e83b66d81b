"""Recipes: the published schedules, and options that override them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boxteacher import InputError
from boxteacher.cli import main
from boxteacher.engine import evaluate as evaluation
from boxteacher.engine import predict as prediction
from boxteacher.engine import train as training
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint
from boxteacher.engine.drawing import write_picture
from boxteacher.engine.optimization import build_optimizer
from boxteacher.engine.options import Option, options_of
from boxteacher.engine.recipes import find_recipe, recipe_names
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.settings import TrainSettings
from tests.engine_support import error_of, log_of

SIDES = (640, 672, 704, 736, 768, 800)
SHORT = {"steps": 90_000, "lr_steps": (60_000, 80_000), "augmentation": "color"}
LONG = {"steps": 270_000, "lr_steps": (210_000, 250_000), "augmentation": "color+blur"}
SGD = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4}
ADAMW = {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05}
PUBLISHED = {
    "condinst_r50_1x": ("resnet50_caffe", SHORT, SGD, "32.6", "32.9"),
    "condinst_r50_3x": ("resnet50_caffe", LONG, SGD, "34.9", "35.0"),
    "condinst_r101_3x": ("resnet101_caffe", LONG, SGD, "36.2", "36.5"),
    "condinst_r101_dcn_3x": ("resnet101_caffe_dcn", LONG, SGD, "37.2", "37.6"),
    "condinst_swin_b_3x": ("swin_b_caffe", LONG, ADAMW, "40.2", "40.5"),
}
OTHERS = {
    "solov2_r50_3x": {"model": "solov2", "backbone": "resnet50_caffe", **SGD, **LONG},
    "mask_rcnn_r50_1x": {"model": "mask_rcnn", **SGD, **SHORT, "lr": 0.02},
    "mask2former_r50_50ep": {
        "model": "mask2former",
        **ADAMW,
        "steps": 368_750,
        "lr_steps": (327_778, 355_092),
        "backbone_lr_factor": 0.1,
        "gradient_clip": 0.01,
    },
}
NAMES = sorted({*PUBLISHED, *OTHERS})


def settings_of(name: str) -> TrainSettings:
    return TrainSettings(**find_recipe(name).settings, data=Path("coco"), output=Path("run"), device="cpu")


def differing(actual: TrainSettings, expected: dict[str, Any]) -> dict[str, Any]:
    return {k: getattr(actual, k) for k, value in expected.items() if getattr(actual, k) != value}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_settings(name):
    backbone, schedule, optimizer, val, test_dev = PUBLISHED[name]
    expected = {"model": "condinst", "backbone": backbone, "mask_samples": 64, **schedule, **optimizer}
    expected |= {"batch_size": 16, "shortest_side": SIDES, "image_size": 1333, "lr_warmup_steps": 1000}
    expected |= {"teacher_size": (800, 1333), "quality_at": "image", "teacher_mode": "train"}
    expected |= {"score_threshold": pytest.approx(0.05**0.5), "decayed": "all", "gradient_clip": 0.0}
    made = settings_of(name)
    assert differing(made, expected) == {}
    assert (made.supervision, made.weights) == ("teacher", "imagenet")
    # Those of the released code, which are the defaults for this number of steps.
    released = {"warmup_steps": 10_000, "pseudo_warmup_steps": 10_000, "momentum": 0.999}
    assert differing(made, released) == {}
    assert find_recipe(name).summary.endswith(f"published mask AP: val {val}, test-dev {test_dev}.")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_segmenter_has_its_own_schedule_and_no_published_ap(name):
    expected = {"backbone": "resnet50", "batch_size": 16, "shortest_side": SIDES, **OTHERS[name]}
    assert differing(settings_of(name), expected) == {}
    assert find_recipe(name).summary.endswith("no AP from boxes alone is published.")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_its_segmenter_and_its_optimizer(name):
    made = settings_of(name)
    # torchvision's Mask R-CNN reads the values of its mean and std, which the meta device does not have.
    with torch.device("cpu" if made.model == "mask_rcnn" else "meta"):
        segmenter = build_segmenter(
            made.model,
            80,
            backbone=made.backbone,
            weights="none",
            image_size=made.image_size,
            mask_samples=made.mask_samples,
        )
    assert getattr(segmenter, "max_samples", 0) == made.mask_samples
    rates = {group["lr"] for group in build_optimizer(segmenter, made).param_groups}
    assert rates == {made.lr, made.lr * made.backbone_lr_factor}


def test_the_list_names_every_recipe_with_its_summary(capsys):
    assert main(["recipes"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == NAMES == recipe_names()
    assert all(summary == find_recipe(name).summary for name, summary in rows)


def test_the_error_for_an_unknown_recipe_lists_all_names(capsys):
    for name in ("condinst_r50_2x", "", "__init__", "condinst_r50_1x.py"):
        message = error_of(["train", "--recipe", name, "--data", "coco"], capsys)
        assert all(known in message for known in (repr(name), *NAMES))
        with pytest.raises(InputError, match="no recipe"):
            find_recipe(name)


def test_changing_a_recipe_s_settings_does_not_change_the_recipe():
    find_recipe("condinst_r50_1x").settings["lr"] = 5.0
    assert find_recipe("condinst_r50_1x").settings["lr"] == 0.01


def test_without_a_recipe_model_and_output_must_be_given(capsys):
    data = ["train", "--data", "coco"]
    assert "--model and --output must be given" in error_of(data, capsys)
    assert "error: --output must be given" in error_of([*data, "--model", "condinst"], capsys)
    assert "error: --model must be given" in error_of([*data, "--output", "run"], capsys)
    assert "error: --data must be given" in error_of(["train", "--recipe", "condinst_r50_1x"], capsys)


count = st.integers(1, 10**6)
SPECIAL_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "device": st.just("cpu"),
    "lr_steps": st.sets(count, max_size=3).map(sorted).map(tuple),
    "teacher_size": st.just(()) | st.tuples(count, count).map(sorted).map(tuple),
}


def values_of(option: Option) -> st.SearchStrategy[Any]:
    if option.name in SPECIAL_VALUES:
        return SPECIAL_VALUES[option.name]
    low, high = max(option.minimum, option.above + 1e-6, -1e6), min(option.maximum, 1e6)
    kinds = {
        int: st.integers(math.ceil(low), math.floor(high)),
        float: st.floats(low, high),
        str: st.sampled_from(["condinst", "my_own"]),
        Path: st.sampled_from([Path("a"), Path("a b/c.pth")]),
    }
    one = st.sampled_from(option.choices) if option.choices else st.nothing()
    if option.kind is not None:
        one |= kinds[option.kind]
    return st.lists(one, max_size=4).map(tuple) if option.is_tuple else one


VALUES = {option.name: values_of(option) for option in options_of(TrainSettings)}


@settings(max_examples=150, deadline=None)
@given(name=st.none() | st.sampled_from(NAMES), changes=st.fixed_dictionaries({}, optional=VALUES))
def test_options_override_the_recipe_or_the_defaults_and_nothing_else(name, changes):
    """With a recipe, and without one."""
    required = {"data": Path("coco")} if name else {"data": Path(), "model": "x", "output": Path("run")}
    changes = {**required, **changes}
    arguments = ["train", *(["--recipe", name] if name else [])]
    for field, value in changes.items():
        texts = value if isinstance(value, tuple) else [value]
        arguments += ["--" + field.replace("_", "-"), *map(str, texts)]
    seen: list[TrainSettings] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", seen.append)
        assert main(arguments) == 0
    recipe = {**find_recipe(name).settings, "output": Path("runs") / name} if name else {}
    assert [asdict(made) for made in seen] == [asdict(TrainSettings(**{**recipe, **changes}))]


def test_a_recipe_and_data_are_the_whole_command(shapes, tmp_path, monkeypatch):
    """With tiny settings; the run is in `runs/NAME` and can be evaluated."""
    monkeypatch.chdir(tmp_path)
    tiny = "--backbone resnet18 --steps 2 --batch-size 1 --weights none --workers 0"
    tiny += " --image-size 96 --shortest-side 56 64"
    arguments = ["train", "--recipe", "condinst_r50_1x", "--data", str(shapes), *tiny.split()]
    assert main([*arguments, "--device", "cpu"]) == 0
    run = tmp_path / "runs" / "condinst_r50_1x"
    made_with = json.loads((run / "settings.json").read_text())
    expected = {"model": "condinst", "optimizer": "sgd", "lr": 0.01, "lr_steps": [60_000, 80_000]}
    expected |= {"steps": 2, "batch_size": 1, "shortest_side": [56, 64], "augmentation": "color"}
    assert {key: made_with[key] for key in expected} == expected
    assert [line["lr"] for line in log_of(run)] == pytest.approx([1e-5, 2e-5])
    assert main(["evaluate", str(run / "last.pt"), "--data", str(shapes), "--workers", "0"]) == 0
    assert json.loads((run / "metrics.json").read_text())["segm"]["AP"] >= 0
    assert load_checkpoint(run / "last.pt")[1].shortest_side == 64


class SeesSizes(torch.nn.Module):
    """Detects nothing and records the sizes of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.seen |= {tuple(image.shape) for image in images}
        masks = [torch.zeros(0, 1, *image.shape[1:]) for image in images]
        none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        return [{**none, "masks": mask} for mask in masks]


@pytest.mark.parametrize(
    ("shortest_side", "size"), [(48, (3, 48, 72)), (80, (3, 64, 96)), (None, (3, 64, 96))]
)
def test_evaluation_and_prediction_use_the_shortest_side_of_the_checkpoint(
    tmp_path, monkeypatch, shortest_side, size
):
    """An image of 120 × 80 pixels, and a longest side of at most 96."""
    (tmp_path / "val").mkdir()
    write_picture(tmp_path / "val" / "1.png", torch.zeros(3, 80, 120, dtype=torch.uint8))
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 80, "width": 120}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "val.json").write_text(json.dumps(content))
    segmenter = SeesSizes()
    info = SegmenterInfo("any", "any", 96, ["thing"], [1], shortest_side=shortest_side)
    for command in (evaluation, prediction):
        monkeypatch.setattr(command, "load_checkpoint", lambda path: (segmenter, info))
    evaluation.evaluate(tmp_path / "last.pt", tmp_path, device="cpu", workers=0)
    assert segmenter.seen == {size}
    segmenter.seen.clear()
    prediction.predict(tmp_path / "last.pt", [tmp_path / "val" / "1.png"], tmp_path / "out", device="cpu")
    assert segmenter.seen == {size}
