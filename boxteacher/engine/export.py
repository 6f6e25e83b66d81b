"""Export of a trained segmenter to a file that needs no BoxTeacher, checked against the segmenter."""

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torchvision.transforms.v2.functional import resize

from boxteacher.data.images import read_image
from boxteacher.engine.checkpoint import load_checkpoint
from boxteacher.engine.files import check_new_file, write_atomically, write_tensors
from boxteacher.errors import InputError

logger = logging.getLogger(__name__)

OUTPUTS = ("boxes", "labels", "scores", "masks")

# Sums in another order change a probability by 1e-6 to 1e-5. Boxes that are the extents of masks change by
# whole pixels, where a pixel's probability is nearly ½.
_MAX_DIFFERENCE = {"boxes": 1.0, "labels": 0.0, "scores": 1e-3, "masks": 1e-3}

# Earlier ones cannot trace CondInst, and the earliest take no ONNX translations of operators.
_EXPORTING_TORCH = "2.8"

_Outputs = tuple[Tensor, ...]  # those that `OUTPUTS` names
_Network = Callable[[Tensor], _Outputs]


class SingleImage(nn.Module):
    """A segmenter as a function of one tensor.

    Args:
        segmenter: segmenter in evaluation mode.
    """

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.eval()

    def forward(self, image: Tensor) -> _Outputs:
        """Boxes (K, 4), labels (K,), scores (K,) and masks (K, 1, H, W) in [0, 1] of an image (3, H, W)."""
        (detections,) = self.segmenter([image])
        return tuple(detections[name] for name in OUTPUTS)


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    image: str | Path | None = None,
) -> Path:
    """Exports a checkpoint's segmenter in the format of the output's suffix, and checks the file.

    `.pt` is the plain state dict. `.pt2` is a program of `torch.export` and `.onnx` an ONNX model: both take
    an image (3, H, W) of one size, RGB in [0, 1], and return the four tensors of `SingleImage`. The file is
    loaded again and compared with the segmenter on one image; the largest difference is logged.

    Args:
        checkpoint: file that `train` wrote.
        output: file to write; it must not exist.
        image_size: height and width in pixels; a square of the checkpoint's longest side if not given.
        image: image file to check with, resized to `image_size`; random pixels if not given.

    Returns:
        `output`.

    Raises:
        InputError: an argument cannot be used, the segmenter cannot be exported in that format, or the file's
            detections differ from the segmenter's; no file is left.
    """
    output = Path(output)
    _check_output(output)
    segmenter, info = load_checkpoint(checkpoint)
    network = SingleImage(segmenter)
    size = image_size or (info.image_size, info.image_size)
    if image is None:
        pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    else:
        pixels = resize(read_image(image), list(size))

    def write(temporary: Path) -> None:
        reloaded = _WRITERS[output.suffix](network, size, temporary)
        with torch.no_grad():
            _compare(network(pixels), reloaded(pixels), output)

    write_atomically(output, write)
    return output


def _check_output(output: Path) -> None:
    if output.suffix not in _WRITERS:
        raise InputError(f"{output}: no format {output.suffix!r}: end it in {', '.join(_WRITERS)}")
    check_new_file(output)
    missing = [
        name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None
    ]
    if output.suffix == ".onnx" and missing:
        raise InputError(f"{output} needs {', '.join(missing)}: install boxteacher[export], or write a .pt2")
    if output.suffix == ".onnx" and _is_old_torch():
        raise InputError(
            f"{output} needs torch {_EXPORTING_TORCH} or later, and this is {torch.__version__}: install "
            "a later one, or write weights as .pt"
        )


def _is_old_torch() -> bool:
    return TorchVersion(torch.__version__) < _EXPORTING_TORCH


def _write_state(network: SingleImage, size: tuple[int, int], path: Path) -> _Network:
    write_tensors(path, network.segmenter.state_dict())
    reloaded = copy.deepcopy(network)
    reloaded.segmenter.load_state_dict(torch.load(path, weights_only=True))
    return reloaded


def _write_program(network: SingleImage, size: tuple[int, int], path: Path) -> _Network:
    program = _trace(network, size)
    buffer = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(network: SingleImage, size: tuple[int, int], path: Path) -> _Network:
    import onnxruntime

    from boxteacher.engine.onnx_operators import onnx_operators

    program = _trace(network, size)
    try:
        with _quiet():
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=list(OUTPUTS),
                custom_translation_table=onnx_operators(),
            )
        translated.save(path, external_data=False)
        session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except OSError:  # of the file
        raise
    except Exception as error:  # exporter and runtime raise errors of many types for a missing operator
        raise InputError(
            f"{_name(network)} cannot be exported to ONNX ({_summary(error)}): export .pt2, or weights as .pt"
        ) from error
    return lambda image: tuple(map(torch.from_numpy, session.run(list(OUTPUTS), {"image": image.numpy()})))


_WRITERS: dict[str, Callable[[SingleImage, tuple[int, int], Path], _Network]] = {
    ".pt": _write_state,
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}


def _trace(network: SingleImage, size: tuple[int, int]) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(network, (torch.zeros(3, *size),), strict=False)
    except Exception as error:  # tracing raises errors of many types
        later = f"install torch {_EXPORTING_TORCH} or later, or " if _is_old_torch() else ""
        raise InputError(
            f"{_name(network)} cannot be traced ({_summary(error)}): {later}export weights as .pt"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracers' warnings and logs, which hold whole graphs; errors are raised."""
    silenced = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(silenced)


def _name(network: SingleImage) -> str:
    return type(network.segmenter).__name__


def _summary(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _compare(expected: _Outputs, actual: _Outputs, output: Path) -> None:
    """Logs the largest differences; raises InputError if one is too large."""
    count = len(expected[0])
    if len(actual[0]) != count:
        raise InputError(
            f"{output} detects {len(actual[0])} objects, the segmenter {count}: nothing was written; check "
            "with another --image, or export weights as .pt"
        )
    if not count:
        logger.warning("%s: no object was detected to compare: check with --image PHOTOGRAPH", output)
        return
    order = _counterparts(expected, actual)
    differences = {
        name: float((mine - theirs[order]).abs().max())
        for name, mine, theirs in zip(OUTPUTS, expected, actual, strict=True)
    }
    listed = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    if not all(differences[name] <= maximum for name, maximum in _MAX_DIFFERENCE.items()):
        raise InputError(
            f"{output} differs from the segmenter by {listed}: nothing was written; check with another "
            "--image, or export weights as .pt"
        )
    logger.info("%s: %d objects compared, largest difference: %s", output, count, listed)


def _counterparts(expected: _Outputs, actual: _Outputs) -> Tensor:
    """The actual detection (K,) int64 closest to each expected one: nearly equal scores may swap places."""
    mine, theirs = (
        torch.cat([boxes, labels[:, None], scores[:, None]], 1)
        for boxes, labels, scores, _ in (expected, actual)
    )
    return torch.cdist(mine, theirs, p=torch.inf).argmin(1)
