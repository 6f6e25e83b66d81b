"""torchvision's detectors as starts: what is taken over computes what it computes in torchvision."""

import logging
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FCOS_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOS

from boxteacher import BoxSupervised, InputError
from boxteacher.engine.convert import coco_categories
from boxteacher.engine.weights import COCO_GROUP, build_with_weights, fill
from boxteacher_adapters.checkpoints import recognize
from boxteacher_adapters.condinst import build_condinst
from boxteacher_adapters.mask_rcnn import MaskRCNNProvider, build_mask_rcnn, build_mask_rcnn_v2
from boxteacher_adapters.torchvision_detectors import coco_file
from tests.backbone_support import with_statistics
from tests.engine_support import error_of, train_arguments
from tests.support import seeded_images, target

State = dict[str, Tensor]

PATH = Path("detector.pth")
IMAGES = seeded_images((64, 96))
SIZE = {"min_size": 64, "max_size": 96}  # torchvision resizes to this, which the image has
COCO_IDS = list(coco_categories())
COCO_FILE = FCOS_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[1]
CLASSIFIER = ["box_head.class_logits.weight", "box_head.class_logits.bias"]


def as_published(network: nn.Module) -> State:
    """A state dict as torchvision's files have it: frozen batch norms, and names from before version 0.13."""
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    former = {}
    for key, value in state.items():
        key = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.(weight|bias)$", r"\1.\2", key)
        key = re.sub(r"(rpn\.head\.conv)\.0\.0\.", r"\1.", key)
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", key)
        former[key] = value
    assert former.keys() != state.keys()
    return former


@pytest.fixture(scope="module")
def fcos() -> FCOS:
    torch.manual_seed(0)
    network = with_statistics(fcos_resnet50_fpn(weights=None, weights_backbone=None, min_size=128)).eval()
    nn.init.constant_(network.head.regression_head.bbox_reg.bias, 4.0)  # strides
    nn.init.normal_(network.head.classification_head.cls_logits.bias)
    return network


@pytest.fixture(scope="module")
def cache(fcos: FCOS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch's cache with the detector where the published one would be."""
    root = tmp_path_factory.mktemp("cache")
    folder = root / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(as_published(fcos), folder / COCO_FILE)
    return root


@torch.no_grad()
def test_condinst_from_fcos_predicts_the_classes_boxes_and_centerness_of_torchvision(
    fcos, cache, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(cache))
    ours = build_with_weights("condinst", 80, backbone="resnet50", weights="coco", image_size=800).eval()
    # On images of other sizes torchvision's coarse locations are not a stride apart.
    images = seeded_images((128, 128))
    resized, _ = fcos.transform(images)
    pyramid = list(fcos.backbone(resized.tensors).values())
    theirs = fcos.head(pyramid)
    (anchors,) = fcos.anchor_generator(resized, pyramid)
    features = ours._features(images)
    predictions, locations = features.predictions, features.locations

    def close(actual: Tensor, expected: Tensor) -> None:
        assert float(expected.std()) > 0.05
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    close(predictions.class_logits, theirs["cls_logits"][..., COCO_IDS])
    close(predictions.centerness, theirs["bbox_ctrness"][..., 0])
    sides = predictions.distances[0] * locations.stride[:, None]
    boxes = torch.cat([locations.centers - sides[:, :2], locations.centers + sides[:, 2:]], 1)
    expected = fcos.head.box_coder.decode(theirs["bbox_regression"][0], anchors)
    assert (theirs["bbox_regression"] > 0.5).all()  # a location of ours is inside their box
    assert_close(boxes, expected, rtol=1e-4, atol=1e-2)


def test_other_classes_get_a_new_classifier_and_the_log_names_all_that_is_new(
    fcos, cache, monkeypatch, caplog
):
    """The same from the file itself as from --weights coco."""
    monkeypatch.setenv("TORCH_HOME", str(cache))
    caplog.set_level(logging.INFO)
    file = cache / "hub" / "checkpoints" / COCO_FILE
    segmenters = [
        build_with_weights("condinst", 2, backbone="resnet50", weights=weights, image_size=800)
        for weights in ("coco", file)
    ]
    states = [each.state_dict() for each in segmenters]
    new = [name for name in states[0] if name.startswith(("box_head.controller", "mask_branch", *CLASSIFIER))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name not in new)
    # torchvision has neither scales nor a mean and std in its state dict.
    computed = {"box_head.scales", "backbone.mean", "backbone.std"}
    moved = {n for n in states[0] if n not in new and n not in computed and "num_batches" not in n}
    assert len(moved) == len(as_published(fcos)) - len(CLASSIFIER)
    assert_close(states[0]["box_head.class_logits.bias"].sigmoid(), torch.full((2,), 0.01))
    lines = [line for line in caplog.messages if "initialized anew" in line]
    assert lines == 2 * [
        "not loaded from it but initialized anew: box_head.controller, mask_branch, "
        f"{', '.join(CLASSIFIER)} (it has 80 classes, the data 2)"
    ]
    frozen = {name for name, p in segmenters[0].named_parameters() if not p.requires_grad}
    assert "backbone.network.layer4.2.bn3.weight" in frozen
    assert all(name.startswith("backbone.") for name in frozen)


def test_a_detector_of_a_user_has_one_class_less_than_outputs():
    network = FCOS(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 4)
    state = network.state_dict() | {"backbone.body.layer3.5.conv3.weight": torch.zeros(1)}
    found = recognize(state, PATH)
    assert found.description == "torchvision's FCOS on resnet50, 3 classes"
    expected = network.head.classification_head.cls_logits.weight[1:]
    assert torch.equal(found.weights["box_head.class_logits.weight"], expected)


RCNNS: dict[str, tuple[Callable[..., Any], Callable[..., MaskRCNNProvider]]] = {
    "mask_rcnn": (maskrcnn_resnet50_fpn, build_mask_rcnn),
    "mask_rcnn_v2": (maskrcnn_resnet50_fpn_v2, build_mask_rcnn_v2),
}


@pytest.fixture(scope="module", params=RCNNS)
def rcnn(request: pytest.FixtureRequest) -> tuple[Any, State]:
    """A Mask R-CNN as torchvision builds it from its published file, and that file's entries."""
    torch.manual_seed(0)
    build, _ = RCNNS[request.param]
    network = with_statistics(build(weights=None, weights_backbone=None))
    # So little variance that an eps would change the norm by half.
    norm = network.backbone.body.layer2[0].bn1
    norm.running_var.mul_(1e-5)
    norm.weight.data.mul_(3e-3)
    state = as_published(network) if request.param == "mask_rcnn" else network.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state))
        return build(weights="COCO_V1", **SIZE).eval(), dict(state)


@torch.no_grad()
def test_mask_rcnn_from_coco_finds_the_objects_of_torchvision(rcnn):
    theirs, state = rcnn
    released = recognize(state, PATH)
    ours = RCNNS[released.model][1](80, weights="none").eval()
    initial = {key: value.clone() for key, value in ours.state_dict().items() if "roi_heads.mask" in key}
    assert fill(ours, 80, released, PATH) == []

    inputs = ours._inputs(IMAGES)
    resized, _ = theirs.transform(IMAGES)
    features = theirs.backbone(resized.tensors)
    proposals = [torch.tensor([[3.0, 5.0, 40.0, 60.0], [20.0, 8.0, 95.0, 50.0]])]
    pooled = theirs.roi_heads.box_roi_pool(features, proposals, resized.image_sizes)
    class_logits, offsets = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
    our_logits, our_offsets = ours._boxes(inputs, proposals)
    outputs = [0, *COCO_IDS]
    pairs = [
        *zip(inputs.features.values(), features.values(), strict=True),
        *zip(
            (value for values in ours.model.rpn.head(list(inputs.features.values())) for value in values),
            (value for values in theirs.rpn.head(list(features.values())) for value in values),
            strict=True,
        ),
        (our_logits, class_logits[:, outputs]),
        (our_offsets, offsets.unflatten(1, (-1, 4))[:, outputs].flatten(1)),
    ]
    for actual, expected in pairs:
        assert float(expected.std()) > 0 or expected.numel() == 1
        assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # The heads that learned from annotated masks are left out, and masks begin as filled boxes.
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in initial.items())
    assert all("roi_heads.mask" in key for key in released.left_out)


def test_faster_rcnn_is_read_as_mask_rcnn_without_its_mask_head(rcnn):
    _, state = rcnn
    with_masks = recognize(state, PATH)
    without = recognize({key: value for key, value in state.items() if "roi_heads.mask" not in key}, PATH)
    assert without.description == with_masks.description.replace("Mask R-CNN", "Faster R-CNN")
    assert without.weights.keys() == with_masks.weights.keys()
    assert with_masks.left_out
    assert without.left_out == ()


def test_torchvision_s_own_faster_rcnn_is_read():
    with torch.device("meta"):
        state = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).state_dict()
        ours = build_mask_rcnn(4, weights="none").state_dict()
    found = recognize(state, PATH)
    assert (found.model, found.num_classes) == ("mask_rcnn", 4)
    lacking = {key for key in ours.keys() - found.weights.keys() if "num_batches_tracked" not in key}
    assert all(key.startswith(found.initial) or key.startswith("model.backbone.body.") for key in lacking)


def test_mask_rcnn_v2_learns_also_from_an_image_without_boxes():
    torch.manual_seed(0)
    model = build_mask_rcnn_v2(2, backbone="resnet18", weights="none")
    model.model.rpn._post_nms_top_n["training"] = 8
    model.model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
    wrapper = BoxSupervised(model, warmup_steps=0).train()
    losses = wrapper(seeded_images((64, 64), (64, 64)), [target((8, 8, 40, 50)), target()])
    sum(losses.values()).backward()
    gradients = [p.grad for name, p in model.named_parameters() if "mask_head" in name]
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)


# What cannot be used.


def test_combinations_without_coco_weights_are_refused_before_any_download(
    shapes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for more, message in (
        (
            ["--model", "solov2", "--backbone", "resnet50"],
            "no COCO weights for solov2: take --model condinst",
        ),
        ([], "no COCO weights of condinst on resnet18: give --backbone resnet50"),
        (["--backbone", "resnet50"], "--image-size 64 builds: give --image-size above 512"),
        (["--model", "mask_rcnn", "--backbone", "resnet50"], "give --image-size above 512"),
    ):
        arguments = train_arguments(shapes, tmp_path / "run", "--weights", "coco", *more)
        assert message in error_of(arguments, capsys)
    assert not (tmp_path / "run").exists()


def test_without_a_network_the_error_names_the_file_to_fetch(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_with_weights("mask_rcnn_v2", 2, backbone="resnet50", weights="coco", image_size=256)
    message = str(caught.value)
    assert "\n" not in message
    assert "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth" in message
    assert "no network" in message
    assert "--weights FILE" in message


def test_a_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    source = tmp_path / "detector-0123abcd.pth"
    source.write_bytes(b"half a file")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match=r"invalid hash value .*--weights FILE"):
        coco_file("resnet50", 800, model="condinst", url=source.as_uri())
    assert not list((tmp_path / "home").rglob("*.pth"))


def test_files_that_do_not_fit_are_named_in_one_line(fcos, cache, shapes, tmp_path, capsys):
    file = cache / "hub" / "checkpoints" / COCO_FILE
    for more, message in (
        (["--model", "mask_rcnn", "--backbone", "resnet50"], "give --model condinst --backbone resnet50"),
        (
            ["--backbone", "resnet50_caffe"],
            "not condinst on resnet50_caffe: give --model condinst --backbone",
        ),
        (["--backbone", "resnet50"], "give the --image-size, above 512 for released ones"),
    ):
        arguments = train_arguments(shapes, tmp_path / "run", "--weights", str(file), *more)
        assert message in error_of(arguments, capsys)
    error = error_of(["convert", str(file), str(tmp_path / "out.pt")], capsys)
    assert "has no masks for condinst: give it to `boxteacher train --weights`" in error
    assert not (tmp_path / "out.pt").exists()

    state = as_published(fcos)
    del state["head.regression_head.conv.3.weight"]
    with torch.device("meta"):
        segmenter = build_condinst(80, weights="none")
    with pytest.raises(InputError, match=r"1 missing \(box_head\.box_tower\.3\.weight\)"):
        fill(segmenter, 80, recognize(state, PATH), PATH)


def test_a_detector_on_another_backbone_is_refused():
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    with pytest.raises(InputError, match="torchvision's FCOS on another backbone than resnet50: give those"):
        recognize(FCOS(body, 3).state_dict(), PATH)


def test_every_start_is_one_of_a_segmenter():
    from importlib.metadata import entry_points

    segmenters = entry_points(group="boxteacher.segmenters").names
    assert {"condinst", "mask_rcnn", "mask_rcnn_v2"} <= entry_points(group=COCO_GROUP).names <= segmenters
