"""Weights that others saved, read without running anything that their files name."""

import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boxteacher.adapter import InputError, read_torch_file

_WRAPPERS = ("model", "state_dict", "blobs")  # detectron2's and Swin's, timm's, Caffe2's
_DTYPE_CODES = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


def read_weight_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch saved, or of a pickle of numpy arrays (`*.pkl`).

    A dict that holds the state dict under "model", "state_dict" or "blobs" is unwrapped. Torch's files are
    read with `weights_only`; a pickle by an unpickler that knows arrays, numbers, text and containers.

    Raises:
        InputError: the file does not exist, is truncated, names code to run, or holds anything but one tensor
            per name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path} do not exist: check the path, or give 'imagenet' or 'none'")
    try:
        content = _read_pickle(path) if path.suffix == ".pkl" else read_torch_file(path)
    except Exception as error:  # a broken or hostile byte raises whatever it leads to
        raise InputError(
            f"weights {path} cannot be read ({_reason(error)}): give a state dict that torch saved, or a "
            ".pkl of numpy arrays"
        ) from error
    while isinstance(content, dict) and (wrapped := [key for key in _WRAPPERS if _holds(content, key)]):
        content = content[wrapped[0]]
    if not isinstance(content, dict) or not content:
        raise InputError(f"weights {path} hold no state dict: give one tensor per parameter name")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        tensor: Any = value.tensor if isinstance(value, _Array) else value
        if not isinstance(name, str) or not _is_plain(tensor):
            raise InputError(
                f"weights {path} hold no state dict: entry {str(name)[:80]!r} is no plain tensor; give one "
                "tensor per parameter name"
            )
        state[name] = tensor
    return state


def _holds(content: dict[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), dict)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with all of its numbers in the file, rather than a few of them repeated."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _reason(error: Exception) -> str:
    text = str(error)
    if refused := re.search(r"GLOBAL (\w+(?:\.\w+)*)", text):
        return f"it asks for {refused[1]}, which is not a tensor"
    # Before and after the reason, torch advises to trust the file.
    reason = text.partition("WeightsUnpickler error: ")[2] or text
    return (reason.splitlines() or [""])[0][:120] or type(error).__name__


def _read_pickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        return read_torch_file(path)
    with path.open("rb") as file:
        _check_memo(file)
        file.seek(0)
        return _ArrayUnpickler(file, _Budget(2 * path.stat().st_size)).load()


def _check_memo(file: Any) -> None:
    """Raises UnpicklingError for an object's number beyond their count, up to which memory is allocated."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise pickle.UnpicklingError("it numbers more objects than it has")


class _Budget:
    """Number of bytes that may still be allocated, for arrays and text no larger than the file."""

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError("its arrays are larger than the file")


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of numpy's arrays and containers of them.

    numpy's own constructors are not called with the file's arguments: stand-ins check these first, so that an
    array is never larger than its bytes in the file.
    """

    def __init__(self, file: Any, budget: _Budget) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote arrays as text
        self._constructors = _constructors(budget)

    def find_class(self, module: str, name: str) -> Any:
        constructor = self._constructors.get((module.replace("numpy._core", "numpy.core"), name))
        if constructor is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")
        return constructor


class _Constructor:
    """A stand-in for a function or class that pickles of arrays name; it can be called and nothing else."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a constructor")


class _Dict(dict[Any, Any]):
    """An OrderedDict; attributes, such as torch's note of versions, are left out."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A dtype of numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _DTYPE_CODES:
            raise pickle.UnpicklingError(f"it holds arrays of {str(code)[:20]!r}, which are not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array; `tensor` is None until its bytes are read."""

    tensor: Tensor | None = None

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, data = state
        self.fill(data, dtype, shape, column_major)

    def fill(self, data: Any, dtype: Any, shape: Any, column_major: Any) -> "_Array":
        """Sets `tensor`; raises UnpicklingError unless the bytes fill the shape."""
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("it holds an array that is not made of numbers")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise pickle.UnpicklingError("it holds an array of no shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise pickle.UnpicklingError("it holds an array whose bytes do not fill its shape")
        self._budget.spend(len(raw))
        array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if column_major else "C")
        self.tensor = torch.from_numpy(array.astype(dtype.dtype.newbyteorder("="), order="C"))
        return self


def _encode(budget: _Budget, text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something that is not bytes")
    budget.spend(len(text))
    return text.encode("latin1")


def _constructors(budget: _Budget) -> dict[tuple[str, str], _Constructor]:
    array = _Constructor(lambda *_: _Array(budget))
    return {
        ("collections", "OrderedDict"): _Constructor(_Dict),
        ("numpy", "ndarray"): array,
        ("numpy", "dtype"): _Constructor(_Dtype),
        ("numpy.core.multiarray", "_reconstruct"): array,
        ("numpy.core.multiarray", "scalar"): _Constructor(
            lambda dtype, data: _Array(budget).fill(data, dtype, (), False)
        ),
        ("numpy.core.numeric", "_frombuffer"): _Constructor(
            lambda data, dtype, shape, order: _Array(budget).fill(data, dtype, shape, order == "F")
        ),
        # How Python 3 writes bytes for Python 2.
        ("_codecs", "encode"): _Constructor(partial(_encode, budget)),
    }
