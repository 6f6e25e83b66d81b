"""Models that do not follow the protocol find the adapter that a package registered for their type."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from torch import nn

import boxteacher.adaptation
from boxteacher import BoxSupervised, BoxTeacher, ProtocolError
from boxteacher.adaptation import as_provider
from tests.support import ScriptedSegmenter, seeded_images, target


class Foreign(nn.Module):
    """Knows nothing of the protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ScriptedSegmenter()


class Descendant(Foreign):
    pass


class Adapter(ScriptedSegmenter):
    def __init__(self, model: Foreign) -> None:
        super().__init__()
        self.model = model


class OtherAdapter(Adapter):
    pass


def register(monkeypatch: pytest.MonkeyPatch, **adapters: str) -> None:
    entries = EntryPoints(
        EntryPoint(f"{__name__}.{name}", f"{__name__}:{value}", boxteacher.adaptation.GROUP)
        for name, value in adapters.items()
    )
    monkeypatch.setattr(boxteacher.adaptation, "entry_points", lambda **wanted: entries.select(**wanted))


def test_the_adapter_of_a_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Foreign="Adapter")
    model = Foreign()
    provider = as_provider(model)
    assert type(provider) is Adapter
    assert provider.model is model


def test_the_nearest_base_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Foreign="Adapter")
    assert type(as_provider(Descendant())) is Adapter
    register(monkeypatch, Foreign="Adapter", Descendant="OtherAdapter")
    assert type(as_provider(Descendant())) is OtherAdapter
    assert type(as_provider(Foreign())) is Adapter


def test_a_model_that_follows_the_protocol_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Adapter="OtherAdapter")
    model = Adapter(Foreign())
    assert as_provider(model) is model
    assert BoxTeacher(model).student is model


def test_without_an_adapter_the_message_says_what_is_missing() -> None:
    with pytest.raises(
        ProtocolError, match=r"Foreign cannot be taught: it lacks .*forward_teacher.*boxteacher\.adapters"
    ):
        BoxTeacher(Foreign())


def test_a_model_with_an_adapter_is_taught_and_unwrapped_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Foreign="Adapter")
    given = Foreign()
    for supervision in (BoxTeacher, BoxSupervised):
        model = supervision(given)
        losses = model(seeded_images((32, 48)), [target((4, 4, 28, 28))])
        assert all(torch.isfinite(loss) for loss in losses.values())
        unwrapped = model.unwrap()
        assert type(unwrapped) is Foreign
        assert unwrapped is not given
        for key, value in unwrapped.state_dict().items():
            assert torch.equal(value, given.state_dict()[key])
