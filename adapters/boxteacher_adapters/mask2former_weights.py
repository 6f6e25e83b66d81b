"""Weights of `transformers`' Mask2Former, loaded into this one."""

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from boxteacher.adapter import InputError, compare_states
from boxteacher_adapters.mask2former import Mask2Former

logger = logging.getLogger(__name__)

_BACKBONE = "model.pixel_level_module.encoder."
_RENAMED = (  # applied one after another
    (r"^model\.pixel_level_module\.decoder\.encoder\.", "pixel_decoder."),
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^model\.transformer_module\.decoder\.", "decoder."),
    (r"^model\.transformer_module\.", "decoder."),
    (r"^pixel_decoder\.level_embed$", "pixel_decoder.level_embedding"),
    (r"\.input_projections\.", ".projections."),
    (r"\.mask_projection\.", ".mask_features."),
    (r"\.adapter_1\.", ".lateral."),
    (r"\.layer_1\.", ".smooth."),
    (r"\.self_attn\.sampling_offsets\.", ".attention.offsets."),
    (r"\.self_attn\.attention_weights\.", ".attention.weights."),
    (r"\.self_attn\.value_proj\.", ".attention.values."),
    (r"\.self_attn\.output_proj\.", ".attention.output."),
    (r"^(pixel_decoder.*)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"\.self_attn_layer_norm\.", ".self_norm."),
    (r"\.cross_attn_layer_norm\.", ".cross_norm."),
    (r"\.final_layer_norm\.", ".feedforward_norm."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn\.", ".cross_attention."),
    (r"\.fc1\.", ".feedforward.0."),
    (r"\.fc2\.", ".feedforward.2."),
    (r"\.layernorm\.", ".norm."),
    (r"\.queries_embedder\.weight$", ".query_positions"),
    (r"\.queries_features\.weight$", ".query_features"),
    (r"^decoder\.level_embed\.weight$", "decoder.level_embedding"),
    (r"\.mask_predictor\.mask_embedder\.(\d)\.0\.", lambda m: f".mask_embeddings.{2 * int(m[1])}."),
    (r"^class_predictor\.", "decoder.class_logits."),
)
_RENAMED_RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


def load_transformers_weights(model: Mask2Former, state: Mapping[str, Tensor]) -> None:
    """Loads the weights of a `Mask2FormerForUniversalSegmentation` into a `Mask2Former` of the same sizes.

    A ResNet backbone's weights are loaded into torchvision's; the backbone of `model` is left unchanged if it
    is any other, which is logged.

    Args:
        model: network with as many classes, channels, queries and layers as the weights (`decoder_layers`
            there counts one more than here).
        state: the other network's `state_dict()`.

    Raises:
        InputError: an entry is missing, unknown or of another shape; the message names it.
    """
    moved = {
        _renamed(name, _RENAMED): value
        for name, value in state.items()
        if not name.startswith((_BACKBONE, "criterion."))
    }
    moved = _with_joined_projections(moved)
    if f"{_BACKBONE}embedder.embedder.convolution.weight" in state:
        moved |= {
            "backbone.network." + _renamed(name.removeprefix(_BACKBONE), _RENAMED_RESNET): value
            for name, value in state.items()
            if name.startswith(_BACKBONE)
        }
        kept: tuple[str, ...] = ("backbone.mean", "backbone.std")
    else:
        logger.info("the weights' backbone is no ResNet: the model's own is left as it is")
        kept = ("backbone.",)
    _load(model, moved, kept)


def _renamed(name: str, rules: tuple[tuple[str, object], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)  # type: ignore[call-overload]
    return name


def _with_joined_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries with the projections of queries, keys and values in one matrix, as in torch's attention."""
    joined = {name: value for name, value in state.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in state:
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return joined


def _load(model: Mask2Former, moved: dict[str, Tensor], kept: tuple[str, ...]) -> None:
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(kept)}
    if difference := compare_states(wanted, moved):
        raise InputError(
            f"the weights do not fit the model, whose entries differ: {difference}; build Mask2Former with "
            "the weights' classes, channels, queries and layers"
        )
    model.load_state_dict(moved, strict=False)
