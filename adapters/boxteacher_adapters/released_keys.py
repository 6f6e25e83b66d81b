"""Our names of the weights in AdelaiDet's CondInst, BoxInst, BoxTeacher and SOLOv2."""

import re
from collections.abc import Callable

from boxteacher_adapters.parts.detectron2_names import resnet_name, swin_name

NETWORK = "backbone.network."  # prefix of a backbone's own names here
_BOTTOM_UP = "backbone.bottom_up."  # and in detectron2

_Pattern = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

SCALES = "box_head.scales"  # one number per level there, one vector here

_FCOS_OUTPUTS = {"cls_logits": "class_logits", "bbox_pred": "distances", "ctrness": "centerness"}
_ENTRY = r"\.(weight|bias)"
_CONDINST: tuple[_Pattern, ...] = (
    (
        re.compile(rf"backbone\.fpn_lateral([3-5]){_ENTRY}"),
        lambda m: f"fpn.inner_blocks.{int(m[1]) - 3}.0.{m[2]}",
    ),
    (
        re.compile(rf"backbone\.fpn_output([3-5]){_ENTRY}"),
        lambda m: f"fpn.layer_blocks.{int(m[1]) - 3}.0.{m[2]}",
    ),
    (re.compile(rf"backbone\.top_block\.(p[67]){_ENTRY}"), lambda m: f"fpn.extra_blocks.{m[1]}.{m[2]}"),
    (
        re.compile(rf"proposal_generator\.fcos_head\.(cls|bbox)_tower\.(\d+){_ENTRY}"),
        lambda m: f"box_head.{'class' if m[1] == 'cls' else 'box'}_tower.{m[2]}.{m[3]}",
    ),
    (
        re.compile(rf"proposal_generator\.fcos_head\.(cls_logits|bbox_pred|ctrness){_ENTRY}"),
        lambda m: f"box_head.{_FCOS_OUTPUTS[m[1]]}.{m[2]}",
    ),
    (re.compile(r"proposal_generator\.fcos_head\.scales\.(\d)\.scale"), lambda m: f"{SCALES}.{m[1]}"),
    (re.compile(rf"controller{_ENTRY}"), lambda m: f"box_head.controller.{m[1]}"),
    (re.compile(r"mask_branch\.(?:refine|tower)\..*"), lambda m: m[0]),
)

_SOLOV2: tuple[_Pattern, ...] = (
    (
        re.compile(rf"backbone\.fpn_lateral([2-5]){_ENTRY}"),
        lambda m: f"fpn.inner_blocks.{int(m[1]) - 2}.0.{m[2]}",
    ),
    (
        re.compile(rf"backbone\.fpn_output([2-5]){_ENTRY}"),
        lambda m: f"fpn.layer_blocks.{int(m[1]) - 2}.0.{m[2]}",
    ),
    (
        re.compile(rf"ins_head\.cate_(tower\.\d+|pred){_ENTRY}"),
        lambda m: f"head.category{_after(m[1])}.{m[2]}",
    ),
    (
        re.compile(rf"ins_head\.kernel_(tower\.\d+|pred){_ENTRY}"),
        lambda m: f"head.kernel{_after(m[1])}.{m[2]}",
    ),
    (
        re.compile(rf"mask_head\.convs_all_levels\.(\d)\.conv(\d)\.(\d){_ENTRY}"),
        lambda m: f"mask_branch.levels.{m[1]}.{m[2]}.{m[3]}.{m[4]}",
    ),
    (re.compile(rf"mask_head\.conv_pred\.(\d){_ENTRY}"), lambda m: f"mask_branch.out.{m[1]}.{m[2]}"),
)

# Constants and counters, and a head that exists in training only.
_NOT_NEEDED = re.compile(
    r"mask_head\.(_iter|sizes_of_interest)|pixel_(mean|std)|mask_branch\.(seg_head|logits)\..*"
    r"|backbone\.bottom_up\..*\.(relative_position_index|attn_mask|num_batches_tracked)"
)


def _after(part: str) -> str:
    return "" if part == "pred" else f"_{part}"


def condinst_name(key: str) -> str | None:
    """Our name of an entry of CondInst, BoxInst or one of BoxTeacher's two networks; None if there is none.

    A level's scale is `SCALES` with the level's number.
    """
    return _renamed(key, _CONDINST)


def solov2_name(key: str) -> str | None:
    """Our name of an entry of AdelaiDet's SOLOv2; None if there is none."""
    return _renamed(key, _SOLOV2)


def is_needed(key: str) -> bool:
    """Whether a network needs the entry for detection."""
    return _NOT_NEEDED.fullmatch(key) is None


def _renamed(key: str, patterns: tuple[_Pattern, ...]) -> str | None:
    if key.startswith(_BOTTOM_UP):
        inner = key.removeprefix(_BOTTOM_UP)
        name = resnet_name(inner) or swin_name(inner)
        return name and NETWORK + name
    for pattern, name_of in patterns:
        if match := pattern.fullmatch(key):
            return name_of(match)
    return None
