"""torchvision's names of the backbone weights in detectron2's, Caffe2's and Swin's own files.

Only the names differ: torchvision merges Swin's patches in the original's order, and its deformable
convolution has detectron2's order of offsets.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_RESNET = re.compile(
    r"(stem|res([2-5])\.(\d+))\.(conv([123])|shortcut|conv2_offset)(\.norm)?\."
    r"(weight|bias|running_mean|running_var|num_batches_tracked)"
)
_CAFFE2 = re.compile(r"(?:res_)?(conv1|res\d_\d+_branch(?:1|2a|2b|2c))_(?:(bn)_)?(w|s|b|rm|riv)")
_CAFFE2_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_ENTRIES = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_BATCH_NORM_EPS = nn.BatchNorm2d(1).eps

_SWIN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"patch_embed\.proj\.(weight|bias)"), lambda m: f"features.0.0.{m[1]}"),
    (re.compile(r"patch_embed\.norm\.(weight|bias)"), lambda m: f"features.0.2.{m[1]}"),
    (
        re.compile(
            r"layers\.(\d)\.blocks\.(\d+)\."
            r"((?:norm[12]|attn\.qkv|attn\.proj)\.(?:weight|bias)|attn\.relative_position_bias_table)"
        ),
        lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.{m[3]}",
    ),
    (
        re.compile(r"layers\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)"),
        lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.mlp.{3 * int(m[3]) - 3}.{m[4]}",
    ),
    (
        re.compile(r"layers\.(\d)\.downsample\.(reduction\.weight|norm\.weight|norm\.bias)"),
        lambda m: f"features.{2 * int(m[1]) + 2}.{m[2]}",
    ),
    (re.compile(r"norm(\d)\.(weight|bias)"), lambda m: f"norms.{m[1]}.{m[2]}"),
)


def resnet_name(key: str) -> str | None:
    """torchvision's name of an entry of detectron2's ResNet (`res4.3.conv2.norm.weight`) or Caffe2's
    (`res4_3_branch2b_bn_s`).

    None for an entry that torchvision's lacks: the classifier, and a bias in the stem, which is nearly zero
    in Caffe2's files and which detectron2 leaves out too.
    """
    match = _RESNET.fullmatch(_detectron2_spelling(key))
    if match is None:
        return None
    _, stage, block, layer, number, norm, entry = match.groups()
    if not norm and entry != "weight" and layer != "conv2_offset":
        return None
    prefix = f"layer{int(stage) - 1}.{block}." if stage else ""
    if layer == "shortcut":
        return f"{prefix}downsample.{1 if norm else 0}.{entry}"
    if layer == "conv2_offset":
        return f"{prefix}conv2.offset.{entry}"
    return f"{prefix}{'bn' if norm else 'conv'}{number}.{entry}"


def _detectron2_spelling(key: str) -> str:
    match = _CAFFE2.fullmatch(key)
    if match is None:
        return key
    place, norm, entry = match.groups()
    stage, _, branch = place.rpartition("_branch")
    layer = f"{stage.replace('_', '.')}.{_CAFFE2_BRANCHES[branch]}" if stage else "stem.conv1"
    return f"{layer}{'.norm' if norm else ''}.{_CAFFE2_ENTRIES[entry]}"


def swin_name(key: str) -> str | None:
    """torchvision's name of an entry of the original Swin (`layers.0.blocks.0.attn.qkv.weight`).

    An output norm `norm2` of the original's detection networks is `norms.2`. None for an entry that
    torchvision's lacks or computes itself: the classifier with its norm, attention masks, position indices.
    """
    for pattern, name in _SWIN:
        match = pattern.fullmatch(key)
        if match is not None:
            return name(match)
    return None


def in_torchvision_names(
    state: Mapping[str, Tensor], rename: Callable[[str], str | None]
) -> dict[str, Tensor]:
    """A backbone's state dict under torchvision's names, which it may have already.

    A batch norm without statistics, as in Caffe2's files, is a scale and a shift: mean 0 and variance 1 − ε
    are added.

    Args:
        state: state dict of a backbone.
        rename: function from a name to torchvision's, `resnet_name` or `swin_name`.
    """
    renamed = {new: value for key, value in state.items() if (new := rename(key)) is not None}
    if not renamed:
        return dict(state)
    for name in [name for name in renamed if re.search(r"(^|\.)(bn\d|downsample\.1)\.weight$", name)]:
        layer, weight = name.removesuffix("weight"), renamed[name]
        renamed.setdefault(f"{layer}running_mean", torch.zeros_like(weight))
        renamed.setdefault(f"{layer}running_var", torch.full_like(weight, 1 - _BATCH_NORM_EPS))
    return renamed
