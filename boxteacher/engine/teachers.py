"""Sources of pseudo masks by name, which packages register in the entry-point group `boxteacher.teachers`."""

from importlib.metadata import entry_points

import torch

from boxteacher.errors import InputError
from boxteacher.protocol import PseudoMaskSource

GROUP = "boxteacher.teachers"


def build_source(name: str, weights: str, *, dtype: torch.dtype | None = None) -> PseudoMaskSource:
    """Builds the source of pseudo masks that a package registered under `name`.

    The registered function has this signature, because one function may be registered under several names.

    Args:
        name: name of the source.
        weights: folder or name of its weights; empty if none are given.
        dtype: type that the source computes in; None for its own choice.

    Raises:
        InputError: there is no such source, or the source cannot be built.
    """
    found = entry_points(group=GROUP, name=name)
    if not found:
        names = ", ".join(sorted({"ema", *entry_points(group=GROUP).names}))
        raise InputError(f"no teacher {name!r}: take one of {names}")
    source: PseudoMaskSource = next(iter(found)).load()(name, weights, dtype=dtype)
    return source
