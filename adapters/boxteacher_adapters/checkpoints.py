"""Released checkpoints of other code bases, under the names of the networks here."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from boxteacher.adapter import InputError, SegmenterWeights
from boxteacher_adapters.parts.backbones import build_backbone
from boxteacher_adapters.parts.detectron2_names import in_torchvision_names, resnet_name, swin_name
from boxteacher_adapters.parts.weight_files import read_weight_file
from boxteacher_adapters.torchvision_detectors import recognize_detector

SCALES = "box_head.scales"  # of the pyramid's levels: a number each in AdelaiDet, one vector here

_RESNETS = {
    (6, False): "resnet50_caffe",
    (23, False): "resnet101_caffe",
    (23, True): "resnet101_caffe_dcn",
}
_BOX_TEACHER = ("teacher.", "student.")  # prefixes of its two networks, the better one first
_NETWORK = "backbone.network."  # prefix of a backbone's own names here
_BOTTOM_UP = "backbone.bottom_up."  # and in detectron2

# AdelaiDet's prefixes, and ours.
_CONDINST = {
    **{f"backbone.fpn_lateral{3 + i}.": f"fpn.inner_blocks.{i}.0." for i in range(3)},
    **{f"backbone.fpn_output{3 + i}.": f"fpn.layer_blocks.{i}.0." for i in range(3)},
    "backbone.top_block.": "fpn.extra_blocks.",
    "proposal_generator.fcos_head.cls_tower.": "box_head.class_tower.",
    "proposal_generator.fcos_head.bbox_tower.": "box_head.box_tower.",
    "proposal_generator.fcos_head.cls_logits.": "box_head.class_logits.",
    "proposal_generator.fcos_head.bbox_pred.": "box_head.distances.",
    "proposal_generator.fcos_head.ctrness.": "box_head.centerness.",
    "proposal_generator.fcos_head.scales.": f"{SCALES}.",
    "controller.": "box_head.controller.",
    "mask_branch.": "mask_branch.",
}
_SOLOV2 = {
    **{f"backbone.fpn_lateral{2 + i}.": f"fpn.inner_blocks.{i}.0." for i in range(4)},
    **{f"backbone.fpn_output{2 + i}.": f"fpn.layer_blocks.{i}.0." for i in range(4)},
    "ins_head.cate_tower.": "head.category_tower.",
    "ins_head.cate_pred.": "head.category.",
    "ins_head.kernel_tower.": "head.kernel_tower.",
    "ins_head.kernel_pred.": "head.kernel.",
    **{
        f"mask_head.convs_all_levels.{level}.conv{i}.": f"mask_branch.levels.{level}.{i}."
        for level in range(4)
        for i in range(3)
    },
    "mask_head.conv_pred.": "mask_branch.out.",
}
_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "scale")

# Constants and counters, and a head that exists in training only.
_NOT_NEEDED = re.compile(
    r"mask_head\.(_iter|sizes_of_interest)|pixel_(mean|std)|mask_branch\.(seg_head|logits)\..*"
    r"|backbone\.bottom_up\..*\.(relative_position_index|attn_mask|num_batches_tracked)"
)


def read_released(path: str | Path) -> SegmenterWeights | None:
    """Reads AdelaiDet's checkpoint of CondInst, BoxInst, BoxTeacher or SOLOv2, a detector of torchvision, or
    an ImageNet backbone in detectron2's, Caffe2's or Swin's format, recognized by its entries' names.

    Of BoxTeacher's two networks the teacher is taken, which is the better one.

    Returns:
        None for a state dict of another kind.

    Raises:
        InputError: the file cannot be read, its network is not one that can be built here, or an ImageNet
            backbone does not fit.
    """
    return recognize(read_weight_file(path), Path(path))


def recognize(state: dict[str, Tensor], path: Path) -> SegmenterWeights | None:
    """`read_released` for a state dict that has been read already.

    Args:
        state: state dict under the names of the file.
        path: path of the file, for messages.
    """
    network = next((prefix for prefix in _BOX_TEACHER if any(key.startswith(prefix) for key in state)), "")
    own = {key.removeprefix(network): value for key, value in state.items() if key.startswith(network)}
    source = f"BoxTeacher's {network[:-1]}, " if network else ""
    if "proposal_generator.fcos_head.cls_logits.weight" in own and "controller.weight" in own:
        return _model(path, "condinst", own, condinst_name, "proposal_generator.fcos_head.cls_logits", source)
    if "ins_head.cate_pred.weight" in own:
        return _model(path, "solov2", own, solov2_name, "ins_head.cate_pred", source)
    if "res2.0.conv1.weight" in own or "res2_0_branch2a_w" in own:
        return _imagenet_backbone(path, own, resnet_name)
    if "patch_embed.proj.weight" in own and "layers.0.blocks.0.attn.qkv.weight" in own:
        return _imagenet_backbone(path, own, swin_name)
    return recognize_detector(state, path)


def _model(
    path: Path,
    model: str,
    state: dict[str, Tensor],
    name_of: Callable[[str], str | None],
    classifier: str,
    source: str,
) -> SegmenterWeights:
    """A whole segmenter's weights; `classifier` is the layer with one output per class."""
    num_classes = _outputs(state[f"{classifier}.weight"])
    needed = {key: value for key, value in state.items() if not _NOT_NEEDED.fullmatch(key)}
    weights = {name_of(key) or key: value for key, value in needed.items()}
    inner = {key.removeprefix(_NETWORK): value for key, value in weights.items() if key.startswith(_NETWORK)}
    backbone = _backbone_name(path, inner)
    levels = [weights.pop(name) for name in sorted(weights) if name.startswith(f"{SCALES}.")]
    if levels:
        weights[SCALES] = torch.cat([level.flatten() for level in levels])
    return SegmenterWeights(
        model=model,
        backbone=backbone,
        num_classes=num_classes,
        weights=weights,
        description=f"{source}{model} on {backbone}, {num_classes} classes",
        left_out=tuple(key for key in state if key not in needed),
    )


def _imagenet_backbone(
    path: Path, state: dict[str, Tensor], name_of: Callable[[str], str | None]
) -> SegmenterWeights:
    weights = in_torchvision_names(state, name_of)
    backbone = _backbone_name(path, weights)
    fitted = build_backbone(backbone, path).network.state_dict()
    return SegmenterWeights(
        model=None,
        backbone=backbone,
        num_classes=0,
        weights={name: value for name, value in state.items() if name_of(name) in fitted},
        description=f"ImageNet weights of {backbone}",
        left_out=tuple(key for key in state if name_of(key) not in fitted),
    )


def _backbone_name(path: Path, weights: dict[str, Tensor]) -> str:
    """Name of the backbone with these weights, given under torchvision's names."""
    if "features.0.0.weight" in weights:
        width = _outputs(weights["features.0.0.weight"])
        blocks = _count(r"features\.5\.(\d+)\.", weights)
        if (width, blocks) == (128, 18):
            return "swin_b_caffe"
        what = f"a Swin of width {width} with {blocks} blocks in its third stage"
    else:
        blocks = _count(r"layer3\.(\d+)\.", weights)
        deformable = any(".conv2.offset." in name for name in weights)
        name = _RESNETS.get((blocks, deformable))
        if name is not None:
            return name
        kind = "deformable ResNet" if deformable else "ResNet"
        what = f"a {kind} with {blocks} blocks in its third stage"
    raise InputError(
        f"weights {path} are those of {what}: resnet50_caffe, resnet101_caffe, resnet101_caffe_dcn and "
        "swin_b_caffe can be read"
    )


def _outputs(weight: Tensor) -> int:
    return weight.shape[:1].numel()


def _count(pattern: str, weights: dict[str, Tensor]) -> int:
    """Number of different values of the pattern's group in the weights' names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def condinst_name(key: str) -> str | None:
    """Our name of an entry of CondInst, BoxInst or one of BoxTeacher's networks; None if there is none."""
    return _renamed(key, _CONDINST)


def solov2_name(key: str) -> str | None:
    """Our name of an entry of AdelaiDet's SOLOv2; None if there is none."""
    return _renamed(key, _SOLOV2)


def _renamed(key: str, prefixes: Mapping[str, str]) -> str | None:
    if key.startswith(_BOTTOM_UP):
        inner = key.removeprefix(_BOTTOM_UP)
        name = resnet_name(inner) or swin_name(inner)
        return name and _NETWORK + name
    if key.rpartition(".")[2] not in _ENTRIES:
        return None
    return next(
        (ours + key.removeprefix(theirs) for theirs, ours in prefixes.items() if key.startswith(theirs)), None
    )
