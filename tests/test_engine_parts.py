"""Small parts of the engine."""

from pathlib import Path

import pytest
import torch

from boxteacher import InputError
from boxteacher.engine.devices import pick_device, to_device
from boxteacher.engine.files import write_atomically


def test_a_crash_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("first"))

    def crash(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, crash)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_picked_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=name) as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_all_tensors_of_a_batch_are_moved_to_a_device():
    images, targets = to_device(
        [torch.zeros(3, 4, 4)], [{"boxes": torch.zeros(1, 4), "image_id": 5}], torch.device("meta")
    )
    assert images[0].device.type == targets[0]["boxes"].device.type == "meta"
    assert targets[0]["image_id"] == 5
