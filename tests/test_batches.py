"""The batches of a run depend on its seed and the position in the run alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from boxteacher.data import InstanceDataset
from boxteacher.engine.batches import SeededSamples, sample_order, training_batches, training_data
from boxteacher.engine.settings import TrainSettings

STEPS = 6

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def settings(data: Path, **changes: Any) -> TrainSettings:
    """Six steps of three images: two epochs and a quarter of the eight images."""
    options = {"steps": STEPS, "batch_size": 3, "image_size": 64, "workers": 0, "device": "cpu", **changes}
    return TrainSettings("condinst", data, Path(), **options)


def batches(data: InstanceDataset, start: int = 0, **changes: Any) -> list[Any]:
    made = settings(Path(), **changes)
    return list(training_batches(data, made, start=start))


def equal(ours: Any, theirs: Any) -> bool:
    """Whether nested lists and dicts hold the same, tensors to the last bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


@pytest.fixture(scope="module")
def data(shapes: Path) -> InstanceDataset:
    return training_data(settings(shapes))


@pytest.fixture(scope="module")
def stream(data: InstanceDataset) -> list[Any]:
    return batches(data)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(data, stream, workers):
    assert len(stream) == STEPS
    assert equal(batches(data, workers=workers), stream)


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (4, 3), (STEPS, 0)])
def test_batches_from_a_later_step_equal_the_rest_of_the_whole_run(data, stream, start, workers):
    """Step 1 is in the middle of an epoch."""
    assert equal(batches(data, start=start, workers=workers), stream[start:])


def test_a_longer_run_has_the_batches_of_a_shorter_one_first(data, stream):
    assert equal(batches(data, steps=STEPS + 2)[:STEPS], stream)


def test_batches_differ_between_seeds_and_samples_between_epochs(data, stream):
    other = batches(data, seed=1)
    assert not any(equal(ours, theirs) for ours, theirs in zip(stream, other, strict=True))
    samples: dict[str, list[Any]] = {}
    for images, targets in stream:
        for image, target in zip(images, targets, strict=True):
            samples.setdefault(target["file_name"], []).append(image)
    assert any(not equal(first, second) for first, second, *_ in samples.values())


def test_every_epoch_has_each_image_once_in_another_order():
    places = list(sample_order(8, 0, range(24)))
    assert [position for position, _ in places] == list(range(24))
    orders = [[index for _, index in places[k : k + 8]] for k in (0, 8, 16)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_seeds_differ_beyond_the_32_bits_that_torch_s_generator_takes():
    orders = [tuple(sample_order(50, seed, range(50))) for seed in (0, 1, 2**32, 2**32 + 1)]
    assert len(set(orders)) == 4


def test_loading_a_sample_changes_no_global_generator(data, monkeypatch):
    """`torch.manual_seed` would also seed the GPU's generator, which the student's augmentation uses."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded the GPU"))
    state = torch.random.get_rng_state()
    SeededSamples(data, seed=0)[5, 2]
    assert torch.equal(torch.random.get_rng_state(), state)
