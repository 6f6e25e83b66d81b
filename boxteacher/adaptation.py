"""Finds the adapter of a model that does not follow `PseudoMaskProvider` by itself."""

from importlib.metadata import entry_points
from typing import Any

from torch import nn

from boxteacher.errors import ProtocolError
from boxteacher.validation import check_provider_methods

GROUP = "boxteacher.adapters"


def as_provider(model: nn.Module) -> nn.Module:
    """The model itself if it follows `PseudoMaskProvider`, or its type's adapter around it.

    Packages register adapters through the entry-point group `boxteacher.adapters`: an entry's name is the
    dotted name of a type, its value a callable that takes a model of that type and returns a provider that
    keeps it as `.model`. Of a model's base classes the nearest that is registered counts. A model that has
    either method of `PseudoMaskProvider` is not wrapped, so that an incomplete one is told what it lacks.

    Raises:
        ProtocolError: neither the model nor an adapter has every part of the protocol, and the message names
            it; or the model was compiled as a whole.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ProtocolError(
            "torch.compile(model) or model.compile() compiles model(images) alone, which training never "
            "calls: give the model itself, and compile its parts in place, such as model.backbone.compile()"
        )
    provider = model
    if not (hasattr(model, "forward_teacher") or hasattr(model, "forward_student")):
        adapter = _registered_adapter(type(model))
        provider = model if adapter is None else adapter(model)
    check_provider_methods(provider)
    return provider


def _registered_adapter(kind: type) -> Any:
    for base in kind.__mro__:
        for entry in entry_points(group=GROUP, name=f"{base.__module__}.{base.__qualname__}"):
            return entry.load()
    return None
