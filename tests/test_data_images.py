"""Image files: reading in any mode, and detection of damaged files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from boxteacher.data.images import check_images, read_image
from boxteacher.errors import InputError

HEIGHT, WIDTH = 24, 40


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8))


def problem(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    """The problem of `path`, checked together with a valid image."""
    valid = path.with_name("valid.png")
    noise(3, 5).save(valid)
    none, found = check_images([valid, path], [(3, 5), size])
    assert none is None
    assert "\n" not in str(found)
    return str(found)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    if mode == "1":
        ramp = (ramp > 127).astype(np.uint8) * 255
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    loaded = read_image(path)
    assert loaded.dtype == torch.float32
    assert loaded.is_contiguous()
    expected = torch.from_numpy(ramp).expand(3, -1, -1) / 255
    # JPEG is lossy.
    assert_close(loaded, expected, atol=0.03 if mode == "CMYK" else 1e-6, rtol=0)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "b.jpg"
    noise(HEIGHT, WIDTH).save(path, exif=exif)
    assert read_image(path).shape == (3, HEIGHT, WIDTH)
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "gone.png").startswith(f"{tmp_path / 'gone.png'}: no such image")


def test_a_size_other_than_the_record_s_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "b.jpg"
    noise(HEIGHT, WIDTH - 1).save(path)
    message = problem(path)
    assert message.startswith(str(path))
    assert f"{WIDTH - 1}x{HEIGHT}" in message
    assert f"{WIDTH}x{HEIGHT}" in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_images_are_found_by_the_check(tmp_path: Path, kind: str, share: float) -> None:
    # Larger than the tail that the check reads, as photographs are.
    buffer = io.BytesIO()
    noise(200, 300).save(buffer, format=kind)
    path = tmp_path / "photograph"
    path.write_bytes(buffer.getvalue())
    assert check_images([path], [(200, 300)]) == [None]
    path.write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    assert problem(path, (200, 300)).startswith(f"{path}: cannot be read as an image")


def test_an_image_damaged_in_the_middle_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(HEIGHT, WIDTH).save(path)
    content = bytearray(path.read_bytes())
    content[80:120] = bytes(40)
    path.write_bytes(content)
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        read_image(path)
