"""A simulated device that counts synchronizations, for machines without a GPU.

Its tensors are computed on the CPU but report the device "meta". Python gets their values only through
operations that would synchronize with a real device, each of which is counted.
"""

import sys
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

import boxteacher

DEVICE = torch.device("meta")
_PACKAGE = Path(boxteacher.__file__).parent
_SIZE_DEPENDS_ON_VALUES = (
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
)
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceTensor(Tensor):
    """A tensor on the simulated device, with its values on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} got a simulated tensor outside of SimulatedDevice")


class SimulatedDevice(TorchDispatchMode):
    """Context that simulates the device and counts synchronizations by file of the package and operation."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronizations: Counter[tuple[str, str]] = Counter()
        self._constructors = _Constructors(self)

    def __enter__(self) -> "SimulatedDevice":
        self._constructors.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constructors.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        reads = tree_any(_is_simulated, (args, kwargs))
        wanted = kwargs.get("device")
        writes = reads if wanted is None else torch.device(wanted) == DEVICE
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if (reads and _needs_values(func, args, kwargs)) or (reads != writes and _copies(func, kwargs)):
            self.count(func.overloadpacket.__name__)
        args, kwargs = tree_map_only(DeviceTensor, attrgetter("values"), (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, DeviceTensor, result) if writes else result

    def count(self, operation: str) -> None:
        """Counts a synchronization by the file of the package that caused it."""
        frame = sys._getframe()
        while frame.f_back and _PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        self.synchronizations[Path(frame.f_code.co_filename).name, operation] += 1


class _Constructors(TorchFunctionMode):
    """`torch.tensor` and `new_tensor` copy Python's numbers, which synchronizes."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and _is_simulated(args[0]):
            kwargs = {"dtype": args[0].dtype, **kwargs, "device": DEVICE}
            func, args = torch.tensor, args[1:]
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            self._device.count("tensor")
            return DeviceTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _needs_values(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.overloadpacket.__name__
    if name in _INDEXED:
        return any(index is not None and _index_synchronizes(index) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "copy_":
        return _is_simulated(args[0]) != _is_simulated(args[1]) and not (len(args) > 2 and args[2])
    return name in ("_local_scalar_dense", "equal", "allclose", "is_nonzero", *_SIZE_DEPENDS_ON_VALUES)


def _copies(func: Any, kwargs: Any) -> bool:
    return func.overloadpacket.__name__ == "_to_copy" and not kwargs.get("non_blocking")


def _index_synchronizes(index: Tensor) -> bool:
    """A boolean index must be counted, an index on the CPU must be copied."""
    return index.dtype in (torch.bool, torch.uint8) or not _is_simulated(index)


def _is_simulated(value: Any) -> bool:
    return isinstance(value, DeviceTensor)
