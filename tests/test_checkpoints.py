"""Released weights of other code bases: recognized, renamed, converted."""

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from boxteacher.cli import main
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.convert import coco_categories
from boxteacher.engine.segmenters import build_segmenter
from boxteacher.engine.weights import build_with_weights, fill
from boxteacher.errors import InputError
from boxteacher_adapters.checkpoints import recognize
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.weight_files import read_weight_file
from tests.engine_support import edited, error_of, log_of, train_arguments
from tests.released_support import is_computed, only, released_shapes, stand_in_checkpoint
from tests.support import reference

# Recognizing.


PATH = Path("released.pth")
ON_META = pytest.mark.filterwarnings("ignore:.*to a meta parameter:UserWarning")
KINDS = {
    "r50": "BoxTeacher's teacher, condinst on resnet50_caffe, 80 classes",
    "r101": "BoxTeacher's teacher, condinst on resnet101_caffe, 80 classes",
    "r101_dcn": "BoxTeacher's teacher, condinst on resnet101_caffe_dcn, 80 classes",
    "swin-base": "BoxTeacher's teacher, condinst on swin_b_caffe, 80 classes",
    "solov2_r50": "solov2 on resnet50_caffe, 80 classes",
}


def weightless(name: str) -> dict[str, torch.Tensor]:
    """Entries of a released checkpoint that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in released_shapes(name).items()}


@ON_META
@pytest.mark.parametrize("name", KINDS)
def test_every_entry_of_a_released_checkpoint_is_loaded(name):
    state = weightless(name)
    released = recognize(state, PATH)
    assert released.description == KINDS[name]
    with torch.device("meta"):
        segmenter = build_segmenter(
            released.model, 80, backbone=released.backbone, weights="none", image_size=1333
        )
    assert fill(segmenter, 80, released, PATH) == []
    mine = [key for key in state if not key.startswith("student.")]
    scales = [key for key in mine if ".scales." in key]
    assert len(released.weights) + len(released.left_out) == len(mine) - len(scales) + bool(scales)
    assert all(is_computed(key) or key == "mask_head._iter" for key in released.left_out)


def test_a_released_checkpoint_lacks_only_computed_entries():
    """The batch norms' counters, and the mean and std of the preprocessing."""
    released = recognize(weightless("r50"), PATH)
    wanted = build_segmenter("condinst", 80, backbone="resnet50_caffe", weights="none", image_size=1333)
    lacking = wanted.state_dict().keys() - released.weights.keys()
    counters = {name for name in lacking if name.endswith("num_batches_tracked")}
    assert lacking - counters == {"backbone.mean", "backbone.std"}


def test_a_student_alone_and_a_plain_condinst_are_recognized():
    student = only("student", released_shapes("r50"))
    entries = {key: torch.zeros(()).expand(shape) for key, shape in student.items()}
    assert recognize(entries, PATH).description.startswith("BoxTeacher's student, condinst")
    plain = {key.removeprefix("student."): value for key, value in entries.items()}
    assert recognize(plain, PATH).description == "condinst on resnet50_caffe, 80 classes"


@ON_META
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("teacher.controller.bias"), r"1 missing \(box_head\.controller\.bias\)"),
        (
            lambda s: s.update({"teacher.controller.gain": torch.zeros(1)}),
            r"1 unknown \(controller\.gain\)",
        ),
        (
            lambda s: s.update({"teacher.controller.bias": torch.zeros(9)}),
            r"1 of another shape \(box_head\.controller\.bias\)",
        ),
        (
            lambda s: [s.pop(key) for key in list(s) if "teacher.mask_branch.refine.2" in key],
            r"5 missing \(mask_branch.refine.2.0.weight, mask_branch.refine.2.1.weight, .*, …\)",
        ),
    ],
)
def test_entries_that_do_not_fit_are_named(change, message):
    state = weightless("r50")
    change(state)
    with torch.device("meta"):
        segmenter = build_segmenter(
            "condinst", 80, backbone="resnet50_caffe", weights="none", image_size=1333
        )
    with pytest.raises(InputError, match=message):
        fill(segmenter, 80, recognize(state, PATH), PATH)


def test_backbones_that_cannot_be_built_are_named():
    state = weightless("r50")
    for key in [key for key in state if "res4.5." in key]:
        del state[key]
    with pytest.raises(InputError, match="a ResNet with 5 blocks in its third stage"):
        recognize(state, PATH)


# Converting and training.


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": stand_in_checkpoint(only("teacher", released_shapes("r50")))}, path)
    return path


def test_a_converted_checkpoint_has_the_original_s_scores(teacher_file, tmp_path, capsys):
    out = tmp_path / "out.pt"
    assert main(["convert", str(teacher_file), str(out)]) == 0
    line = capsys.readouterr().out.strip()
    assert KINDS["r50"] in line
    assert "366 entries, and 2 that the network does not need" in line
    segmenter, info = load_checkpoint(out)
    assert (info.model, info.backbone, info.image_size, info.shortest_side) == (
        "condinst",
        "resnet50_caffe",
        1333,
        800,
    )
    assert dict(zip(info.category_ids, info.class_names, strict=True)) == coco_categories()
    expected, pixels = reference("forward_r50"), reference("forward_solov2_r50")
    with torch.no_grad():
        (found,) = segmenter([pixels("image_0") / 255])
    assert_close(found["scores"][:30], expected("teacher_0_scores"), rtol=1e-3, atol=0)
    error = error_of(["convert", str(teacher_file), str(out)], capsys)
    assert f"{out} exists" in error
    assert "already" in error_of(["convert", str(out), str(tmp_path / "again.pt")], capsys)


def test_coco_has_80_categories_with_gaps_between_their_ids():
    categories = coco_categories()
    assert len(categories) == 80
    assert set(range(1, 91)) - set(categories) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    known = {1: "person", 13: "stop sign", 37: "sports ball", 63: "couch", 78: "microwave", 90: "toothbrush"}
    assert {i: categories[i] for i in known} == known


def test_another_number_of_classes_keeps_all_but_the_classifier(teacher_file, caplog):
    caplog.set_level(logging.INFO)
    options = {"backbone": "resnet50_caffe", "weights": teacher_file, "image_size": 1333}
    whole = recognize(read_weight_file(teacher_file), teacher_file).weights
    segmenter = build_with_weights("condinst", 3, **options)
    entries = segmenter.state_dict()
    anew = {"box_head.class_logits.weight", "box_head.class_logits.bias"}
    assert all(torch.equal(entries[name], value) for name, value in whole.items() if name not in anew)
    assert len(entries["box_head.class_logits.bias"]) == 3
    new = "box_head.class_logits.weight, box_head.class_logits.bias (it has 80 classes, the data 3)"
    assert f"initialized anew: {new}" in caplog.text
    # As with ImageNet weights, the first layers and all batch norms of the backbone are frozen.
    frozen = {name for name, p in segmenter.named_parameters() if not p.requires_grad}
    assert "backbone.network.conv1.weight" in frozen
    assert "backbone.network.layer4.2.bn3.weight" in frozen
    assert all(name.startswith("backbone.") for name in frozen)


def test_weights_of_another_model_or_size_are_refused(teacher_file, shapes, tmp_path, capsys):
    for more, message in (
        (["--model", "solov2"], "not solov2 on resnet50_caffe: give --model condinst"),
        (
            ["--backbone", "resnet18"],
            "not condinst on resnet18: give --model condinst --backbone resnet50_caffe",
        ),
        ([], r"of another shape (fpn.inner_blocks.0.0.weight, "),  # a small network
    ):
        arguments = ["--backbone", "resnet50_caffe", "--weights", str(teacher_file), *more]
        error = error_of(train_arguments(shapes, tmp_path / "run", *arguments), capsys)
        assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_can_start_from_a_checkpoint(run, shapes, tmp_path, capsys):
    """With the same classes everything is loaded, so its first loss is lower."""
    again = tmp_path / "again"
    assert main(train_arguments(shapes, again, "--weights", str(run / "last.pt"))) == 0
    fresh, learned = (log_of(folder)[0]["loss_classification"] for folder in (run, again))
    assert learned < fresh

    def another_class(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 99, "name": "another"})

    data = edited(
        edited(shapes, tmp_path / "a", "train", another_class), tmp_path / "b", "val", another_class
    )
    arguments = train_arguments(data, tmp_path / "more", "--weights", str(run / "last.pt"))
    assert main(arguments) == 0
    before, after = load_checkpoint(run / "last.pt")[0], load_checkpoint(tmp_path / "more" / "last.pt")[0]
    assert len(after.box_head.class_logits.bias) == len(before.box_head.class_logits.bias) + 1


def test_an_imagenet_backbone_is_converted(tmp_path, capsys):
    inner = "teacher.backbone.bottom_up."
    shapes = {key: shape for key, shape in released_shapes("r50").items() if key.startswith(inner)}
    arrays = {key.removeprefix(inner): v.numpy() for key, v in stand_in_checkpoint(shapes).items()}
    arrays |= {"linear.weight": np.zeros((1000, 2048), np.float32), "linear.bias": np.zeros(1000, np.float32)}
    source, out = tmp_path / "R-50.pkl", tmp_path / "out.pt"
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "MSRA"}, protocol=4))
    assert main(["convert", str(source), str(out)]) == 0
    line = capsys.readouterr().out
    assert "ImageNet weights of resnet50_caffe" in line
    assert "2 that the network does not need (linear.weight, linear.bias)" in line
    # torchvision's ResNet has another preprocessing, so it must refuse these weights.
    with pytest.raises(InputError, match="are not those of resnet50"):
        build_backbone("resnet50", out)
    direct, converted = (build_backbone("resnet50_caffe", path).state_dict() for path in (source, out))
    assert all(torch.equal(converted[name], value) for name, value in direct.items())
    assert np.array_equal(direct["network.layer1.0.conv1.weight"].numpy(), arrays["res2.0.conv1.weight"])


def test_a_missing_output_folder_is_named_before_the_conversion(teacher_file, tmp_path, capsys):
    out = tmp_path / "nowhere" / "out.pt"
    assert f"there is no folder {out.parent}" in error_of(["convert", str(teacher_file), str(out)], capsys)


def test_unknown_and_missing_files_are_refused(tmp_path, capsys):
    path = tmp_path / "resnet18.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)}, path)
    assert "none of the released weights" in error_of(["convert", str(path), str(tmp_path / "o.pt")], capsys)
    assert "do not exist" in error_of(["convert", str(tmp_path / "no.pth"), str(tmp_path / "o.pt")], capsys)
