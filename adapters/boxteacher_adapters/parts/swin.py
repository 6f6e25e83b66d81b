"""Swin transformers: torchvision's, and the Swin-B of the released BoxTeacher."""

from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlock,
    shifted_window_attention,
)

from boxteacher_adapters.parts.detectron2_names import in_torchvision_names, swin_name
from boxteacher_adapters.parts.pretrained import CAFFE, IMAGENET, PretrainedNetwork, weights_at

TORCHVISION_SWINS = ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")
CAFFE_SWINS = ("swin_b_caffe",)
_SWIN_B_URL = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth"
)
_PATCH = 4
# The patches, the first stage and the step to the second, which the released BoxTeacher does not train.
_EARLY = ("features.0.", "features.1.", "features.2.")
_NOT_IN_CLASSIFIERS = ("norms.", "relative_position_index", "relative_coords_table")


def torchvision_swin(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    """One of torchvision's Swin transformers, with a norm on each of its maps.

    Args:
        name: name among `TORCHVISION_SWINS`.
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.
    """
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    network = SwinFeatures(torchvision.models.get_model(name, weights=None), strides)
    return PretrainedNetwork(
        network,
        network.channels,
        IMAGENET,
        early=_EARLY,
        download=partial(weights.get_state_dict, progress=True),
        left_over=network.beyond,
        initial=_NOT_IN_CLASSIFIERS,
    )


def caffe_swin(name: str, strides: tuple[int, ...]) -> PretrainedNetwork:
    """The Swin-B of the released BoxTeacher, for BGR images in [0, 255] without their mean.

    Its ImageNet weights are Swin's own, which were trained on RGB images with ImageNet's mean and scale: take
    it for the released checkpoint, and `swin_b` for a new training. Weights may have torchvision's or the
    original's names.

    Args:
        name: `swin_b_caffe`.
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.
    """
    swin = SwinTransformer(
        patch_size=[_PATCH, _PATCH],
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=[7, 7],
        stochastic_depth_prob=0.2,
        block=partial(SwinTransformerBlock, attn_layer=AlwaysShiftedAttention),
    )
    network = SwinFeatures(swin, strides)
    return PretrainedNetwork(
        network,
        network.channels,
        CAFFE,
        early=_EARLY,
        download=partial(weights_at, _SWIN_B_URL),
        own_names=partial(in_torchvision_names, rename=swin_name),
        left_over=network.beyond,
        initial=_NOT_IN_CLASSIFIERS,
    )


class SwinFeatures(nn.Module):
    """A Swin transformer's maps at several strides, each with a layer norm of its own.

    Args:
        swin: torchvision's transformer with patches of 4 × 4 pixels.
        strides: strides of the maps, among 4, 8, 16 and 32, in ascending order.

    Attributes:
        channels: numbers of channels of the maps.
        beyond: prefixes of entries that weights may hold beside these: other maps' and a head's.
    """

    def __init__(self, swin: SwinTransformer, strides: tuple[int, ...]) -> None:
        super().__init__()
        stages = [(4, 8, 16, 32).index(stride) for stride in strides]
        needed = 2 * stages[-1] + 2  # the patches, then each stage behind the step that leads to it
        self.features = swin.features[:needed]
        unused = (f"features.{i}." for i in range(needed, len(swin.features)))
        self.beyond = ("norms.", "norm.", "head.", *unused)
        width = swin.features[0][0].out_channels
        self.channels = tuple(width * 2**stage for stage in stages)
        self.norms = nn.ModuleDict({str(stage): nn.LayerNorm(width * 2**stage) for stage in stages})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) of any size to maps (B, D_i, ⌈H / stride⌉, ⌈W / stride⌉)."""
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)  # (B, h, w, D)
            stage, is_step = divmod(i - 1, 2)
            if not is_step and str(stage) in self.norms:
                maps.append(self.norms[str(stage)](x).permute(0, 3, 1, 2).contiguous())
        return maps


class AlwaysShiftedAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Window attention that shifts its windows on maps of any size, as the original's detectors do.

    Where a map is no larger than a window, torchvision leaves the shift out. The shifted window holds the
    same cells, but those before the shift do not attend to those behind it, which this mask adds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to the same shape."""
        bias = self.get_relative_position_bias()  # (1, heads, cells, cells)
        return shifted_window_attention(
            x,
            self.qkv.weight,
            self.proj.weight,
            bias + self._mask_of_small_maps(x),
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )

    def _mask_of_small_maps(self, x: Tensor) -> Tensor:
        """Attention mask (cells, cells) of the shifts that torchvision leaves out: 0, or −100 across one."""
        rows, columns = (  # rows and columns of a window before a shift that is left out, (side,) bool each
            torch.arange(window, device=x.device) < (shift if size <= window else 0)
            for size, window, shift in zip(x.shape[1:3], self.window_size, self.shift_size, strict=True)
        )
        part = (2 * rows[:, None] + columns[None, :]).flatten()  # (cells,)
        return -100.0 * (part[:, None] != part[None, :]).to(x.dtype)
