"""Copies of networks, and what in a network cannot be copied."""

import copy
from typing import TypeVar

from torch import nn

from boxteacher.errors import ProtocolError

_Network = TypeVar("_Network", bound=nn.Module)


def copy_network(network: _Network) -> _Network:
    """A deep copy.

    Raises:
        ProtocolError: the network cannot be copied; the message names the attribute that is the reason.
    """
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever an attribute's own type raises
        name, cause = _first_failure(network) or ("of unknown name", error)
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ProtocolError(
            f"{type(network).__name__} cannot be copied because of its attribute {name} ({reason}): keep "
            "tensors in parameters and buffers (weight_norm of torch.nn.utils.parametrizations does), and "
            "make caches, locks and files where they are used"
        ) from error


def _first_failure(network: nn.Module) -> tuple[str, Exception] | None:
    """The first attribute of any submodule whose copy fails, by its dotted name, and the error."""
    for prefix, module in network.named_modules():
        children = {"_modules", "_parameters", "_buffers"}
        attributes = {name: value for name, value in vars(module).items() if name not in children}
        for name, value in {**attributes, **module._parameters, **module._buffers}.items():
            try:
                copy.deepcopy(value)
            except Exception as error:  # noqa: BLE001, whatever its type raises
                return f"{prefix}.{name}".lstrip("."), error
    return None
