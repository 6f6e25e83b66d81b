"""State dicts from files: whose weights they are, and how they differ from what a network needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_NAMED = 3  # entries in a message


@dataclass(frozen=True)
class SegmenterWeights:
    """What a file of weights holds.

    Attributes:
        model: name of the segmenter; None for a backbone alone.
        backbone: name of the backbone.
        num_classes: number of classes; 0 for a backbone alone.
        weights: entries by the names of the segmenter's state dict; a backbone's keep the file's names.
        description: words for messages.
        left_out: names of the file's entries that the network does not need.
        initial: prefixes of the segmenter's entries that keep their initial values.
    """

    model: str | None
    backbone: str
    num_classes: int
    weights: Mapping[str, Tensor]
    description: str
    left_out: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateDifference:
    """Names of entries in which two state dicts differ; false if there are none, and words for a message.

    Attributes:
        missing: entries that are wanted and not given.
        unknown: entries that are given and not wanted.
        reshaped: entries of another shape than wanted.
    """

    missing: Sequence[str]
    unknown: Sequence[str]
    reshaped: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.reshaped)

    def __str__(self) -> str:
        """Such as "2 missing (a, b), 1 of another shape (c)"."""
        named = {"missing": self.missing, "unknown": self.unknown, "of another shape": self.reshaped}
        return ", ".join(
            f"{len(names)} {problem} ({first_names(names)})" for problem, names in named.items() if names
        )


def compare_states(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    optional: Callable[[str], bool] = lambda name: False,
) -> StateDifference:
    """How the entries of two state dicts differ.

    Args:
        wanted: state dict of the network.
        given: state dict to be loaded.
        optional: whether the wanted entry of a name may be missing.
    """
    return StateDifference(
        missing=[name for name in wanted if name not in given and not optional(name)],
        unknown=[name for name in given if name not in wanted],
        reshaped=[name for name in wanted if name in given and given[name].shape != wanted[name].shape],
    )


def first_names(names: Sequence[str]) -> str:
    """The first few names, and whether there are more."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
