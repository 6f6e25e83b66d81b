"""Downloaded weight files are read without running anything that they name."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boxteacher.engine.checkpoint import is_checkpoint, load_checkpoint
from boxteacher.errors import InputError
from boxteacher_adapters.parts.weight_files import read_weight_file
from tests.engine_support import error_of

ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "big_endian": np.arange(3, dtype=">i4"),
    "half": np.array([0.5, 2], dtype=np.float16),
    "scalar": np.float32(3),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [dict, lambda d: {"model": OrderedDict(d), "__author__": "x"}])
def test_a_pickle_of_arrays_is_read_in_every_protocol(tmp_path, protocol, wrap):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(wrap(ARRAYS), protocol=protocol))
    read = read_weight_file(path)
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(read[name].numpy(), array)


def test_a_pickle_of_arrays_by_python_2_is_read(tmp_path):
    """Python 2 wrote bytes as text, and numpy's module under its former name."""
    data = struct.pack("<2f", 1.5, -2.0)  # bytes that are not ASCII
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01K\x02\x85" + dtype + b"\x89U\x08" + data + b"tb"
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02}U\x07conv1_w" + array + state + b"s.")
    assert read_weight_file(path)["conv1_w"].tolist() == [1.5, -2.0]


def test_torch_s_files_are_read_in_both_formats_and_unwrapped(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3)}
    for zipped in (True, False):
        path = tmp_path / "weights.pth"
        content = {"state_dict": state, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert torch.equal(read_weight_file(path)["w"], state["w"])


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


class Expression(Command):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.witness)!r}, 'w')",)


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def compressed(archive: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return file.getvalue()


def npy_of(thing: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([thing], dtype=object), allow_pickle=True)
    return file.getvalue()


TENSOR = {"w": torch.zeros(100)}
HOSTILE: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a command": (".pkl", lambda w: pickle.dumps(Command(w))),
    "a command among arrays": (".pkl", lambda w: pickle.dumps({"model": {**ARRAYS, "x": Expression(w)}})),
    "a command in an array": (".pkl", lambda w: pickle.dumps({"a": np.array([Expression(w)], dtype=object)})),
    "a command for torch": (".pth", lambda w: saved({"model": TENSOR, "x": Command(w)})),
    "a command in a zip": (".pkl", lambda w: saved({"model": {"x": Expression(w)}})),
    "a command in torch's older format": (
        ".pth",
        lambda w: saved({"x": Command(w)}, _use_new_zipfile_serialization=False),
    ),
    "a plain pickle": (".pth", lambda w: pickle.dumps({"x": Command(w)})),
    "an array of objects": (".pth", lambda w: npy_of(Command(w))),
    "numpy.load": (".pkl", lambda w: f"cnumpy\nload\n(S'{w}'\ntR.".encode()),
    "a part of something admitted": (".pkl", lambda w: b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93."),
    "a changed constructor": (".pkl", lambda w: b"ccollections\nOrderedDict\n(dS'x'\nI1\nsb."),
    "a table of two thousand million objects": (".pkl", lambda w: b"\x80\x02}r\xff\xff\xff\x7f."),
    "a text longer than the file": (".pkl", lambda w: b"\x80\x04\x8e" + struct.pack("<Q", 2**45) + b"a."),
    "an array larger than its bytes": (
        ".pkl",
        lambda w: pickle.dumps({"w": np.zeros(3, np.float32)}, 2).replace(
            b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"
        ),
    ),
    "an array that is a bytearray": (".pkl", lambda w: b"\x80\x05\x96" + struct.pack("<Q", 1) + b"a."),
    "a tensor larger than the file": (".pth", lambda w: saved({"w": torch.zeros(1).expand(10**12)})),
    "an archive that inflates": (".pth", lambda w: compressed(saved({"w": torch.zeros(10**6)}))),
    "a tensor without numbers": (".pth", lambda w: saved({"w": torch.zeros(9, device="meta")})),
    "a module": (".pth", lambda w: saved(torch.nn.Linear(2, 2))),
    "a list": (".pth", lambda w: saved([torch.zeros(2)])),
    "settings": (".pkl", lambda w: pickle.dumps({"w": np.zeros(2), "lr": 0.1})),
    "nothing in a dict": (".pth", lambda w: saved({})),
    "nothing": (".pkl", lambda w: b""),
    "nothing for torch": (".pth", lambda w: b""),
    "text": (".pkl", lambda w: b"version https://git-lfs.github.com/spec/v1\n"),
    "text for torch": (".pth", lambda w: b"version https://git-lfs.github.com/spec/v1\n"),
    "a truncated pickle": (".pkl", lambda w: pickle.dumps(ARRAYS)[:-20]),
    "a truncated archive": (".pth", lambda w: saved(TENSOR)[:-200]),
    "an archive truncated to its beginning": (".pth", lambda w: saved(TENSOR)[:300]),
    "arrays of an archive": (".pth", lambda w: compressed(saved(TENSOR))[:-1]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_broken_file_runs_nothing_and_writes_nothing(kind, tmp_path, capsys):
    suffix, content = HOSTILE[kind]
    folder, witness = tmp_path / "files", tmp_path / "witness"
    folder.mkdir()
    source = folder / f"weights{suffix}"
    source.write_bytes(content(witness))
    with pytest.raises(InputError):
        read_weight_file(source)
    error = error_of(["convert", str(source), str(folder / "out.pt")], capsys)
    assert str(source) in error
    assert not witness.exists()
    assert list(folder.iterdir()) == [source]


def test_an_unsafe_reader_would_create_the_witness_file(tmp_path):
    pickle.loads(pickle.dumps(Command(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


def test_the_error_names_the_forbidden_function(tmp_path):
    for name, content in (("a.pkl", pickle.dumps(Command(tmp_path))), ("a.pth", saved(Command(tmp_path)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"asks for (posix|nt)\.system"):
            read_weight_file(tmp_path / name)


def test_a_compressed_archive_is_refused_before_torch_opens_it(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_bytes(compressed(saved({"format": "boxteacher segmenter 1", "w": torch.zeros(10**6)})))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was reached"))
    assert not is_checkpoint(path)
    for read in (load_checkpoint, read_weight_file):
        with pytest.raises(InputError):
            read(path)


def test_arrays_that_share_bytes_may_not_be_larger_than_the_file(tmp_path):
    """Of forty arrays with the same bytes, each is smaller than the file, but not all together."""
    array = np.zeros(10_000, np.float32)
    ((frombuffer, (buffer, *rest)),) = [array.__reduce_ex__(5)[:2]]
    data = bytes(buffer)

    class Sharing:
        def __reduce__(self) -> Any:
            return frombuffer, (data, *rest)

    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({f"w{i}": Sharing() for i in range(40)}, protocol=5))
    assert path.stat().st_size < 2 * array.nbytes
    with pytest.raises(InputError, match="larger than the file"):
        read_weight_file(path)
    path.write_bytes(pickle.dumps({"w": Sharing()}, protocol=5))
    assert read_weight_file(path)["w"].shape == (10_000,)
