"""ONNX translations of torch operators that torch's exporter lacks."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import INT64, opset18

op: Any = opset18  # typed for ONNX values, but takes Python numbers too


def onnx_operators() -> dict[Callable[..., Any], Callable[..., Any]]:
    """A `custom_translation_table` for `torch.onnx.export`."""
    return {
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.aten.searchsorted.Tensor: _searchsorted,
    }


def _stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort` with its keyword `stable`; of equal values, ONNX's TopK gives the earlier first."""
    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))  # (1,)
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def _searchsorted(sorted_sequence: Any, self: Any) -> Any:
    """`torch.searchsorted` of values (M,) in a sequence (N,), at its defaults: the number of smaller ones."""
    less = op.Less(op.Unsqueeze(sorted_sequence, [0]), op.Unsqueeze(self, [1]))  # (M, N)
    return op.ReduceSum(op.Cast(less, to=INT64.dtype), [1], keepdims=0)
