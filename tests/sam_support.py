"""Tiny SAM networks of `transformers` with random weights, and a scripted decoder for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers: Any = pytest.importorskip(
    "transformers", minversion="4.56", reason="transformers 4.56 or newer (boxteacher[sam]) is not installed"
)

SIZE = 64  # pixels of the networks' square input
KINDS = ["sam", "sam2", "sam-hq"]

_VISION = {
    **{"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": SIZE, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1]},
    **{"num_pos_feats": 8, "mlp_dim": 16},
}
_PROMPTS = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4}
_DECODER = {
    **{"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "iou_head_hidden_dim": 16,
}


def tiny_network(kind: str) -> Any:
    """A network of 20 to 90 thousand random weights that are large enough for masks of some shape."""
    torch.manual_seed(0)
    network = {"sam": _sam, "sam2": _sam2, "sam-hq": _sam_hq}[kind]()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "shared" not in name:
                parameter.normal_(std=0.5)
    return network.eval()


def _sam() -> Any:
    return transformers.SamModel(
        transformers.SamConfig(
            vision_config=_VISION, prompt_encoder_config=_PROMPTS, mask_decoder_config=_DECODER
        )
    )


def _sam_hq() -> Any:
    return transformers.SamHQModel(
        transformers.SamHQConfig(
            vision_config=_VISION,
            prompt_encoder_config=_PROMPTS,
            mask_decoder_config={**_DECODER, "vit_dim": 16},
        )
    )


def _sam2() -> Any:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    return transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config={**_PROMPTS, "patch_size": 16},
            mask_decoder_config=_DECODER,
        )
    )


Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From boxes (n, 4) and pixels (3, s, s) of the input to logits (n, 4, l, l) and predicted IoU (n, 4)."""


class ScriptedDecoder(nn.Module):
    """In the place of a network's mask decoder, it draws masks, and records what it was asked.

    Attributes:
        pixels: (3, s, s) of each encoded image.
        boxes: (n, 4) of each call, in pixels of the input.
        prompts: dtype of the embedded prompts of each call.
    """

    def __init__(self, network: Any, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.pixels: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.prompts: list[torch.dtype] = []
        for name in ("conv_s0", "conv_s1"):  # SAM 2's encoder uses these of its decoder
            if hasattr(network.mask_decoder, name):
                setattr(self, name, getattr(network.mask_decoder, name))
        network.vision_encoder.register_forward_pre_hook(self._see, with_kwargs=True)
        network.prompt_encoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        network.mask_decoder = self

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        (pixels,) = args or (kwargs["pixel_values"],)
        self.pixels.append(pixels[0])

    def _ask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.boxes.append(kwargs["input_boxes"][0])

    def forward(self, *, multimask_output: bool, **kwargs: Any) -> tuple[Any, ...]:
        self.prompts.append(kwargs["sparse_prompt_embeddings"].dtype)
        logits, iou = self.draw(self.boxes[-1], self.pixels[-1])
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        found = (logits[None, :, chosen], iou[None, :, chosen])
        return (*found, None, None) if hasattr(self, "conv_s0") else found


def filled_boxes(boxes: Tensor, length: int = SIZE) -> Tensor:
    """Logits (n, length, length), 8 in the cells whose centers lie in a box of the input and −8 elsewhere."""
    center = (torch.arange(length) + 0.5) * (SIZE / length)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # (n, 1) each
    columns, rows = (center > x0) & (center < x1), (center > y0) & (center < y1)
    return (rows[:, :, None] & columns[:, None, :]).float() * 16 - 8
