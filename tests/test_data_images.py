"""Image files: reading in any mode, and detection of damaged files."""

import io
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from boxteacher.data.images import check_images, read_image, stored_name
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


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The upright view (H', W', 3) of stored pixels (H, W, 3), after EXIF's definition."""
    rows_first = pixels if orientation < 5 else pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return rows_first[::rows, ::columns]


def save_oriented(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, exif=exif, **lossless)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_unless_its_record_has_the_size_as_stored(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    pixels = np.asarray(noise(HEIGHT, WIDTH))
    path = tmp_path / f"photograph{suffix}"
    save_oriented(path, pixels, orientation)
    turned = upright(pixels, orientation)
    assert_close(read_image(path), as_tensor(turned))
    assert_close(read_image(path, turned.shape[:2]), as_tensor(turned))
    problems = check_images([path] * 2, [turned.shape[:2], (HEIGHT, WIDTH)])
    if orientation in (1, 5, 6, 7, 8):  # without a doubt, whichever of its views was annotated
        assert_close(read_image(path, (HEIGHT, WIDTH)), as_tensor(pixels))
        assert problems == [None, None]
    else:
        assert all("turned by its EXIF orientation" in str(each) for each in problems)
        assert [each and each.severity for each in problems] == ["warning", "warning"]


def test_a_photograph_is_turned(tmp_path: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # at the left, thus at the top of the upright view
    path = tmp_path / "photograph.jpg"
    save_oriented(path, pixels, 6)
    assert check_images([path] * 2, [(WIDTH, HEIGHT), (HEIGHT, WIDTH)]) == [None, None]
    assert_close(read_image(path), as_tensor(upright(pixels, 6)), atol=0.02, rtol=0)
    assert_close(read_image(path, (HEIGHT, WIDTH)), as_tensor(pixels), atol=0.02, rtol=0)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_square_is_said(tmp_path: Path, orientation: int) -> None:
    pixels = np.asarray(noise(WIDTH, WIDTH))
    path = tmp_path / "square.png"
    save_oriented(path, pixels, orientation)
    assert "turned by its EXIF orientation" in problem(path, (WIDTH, WIDTH))
    assert_close(read_image(path, (WIDTH, WIDTH)), as_tensor(upright(pixels, orientation)))


def test_no_remedy_swaps_width_and_height(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    assert "'width'" not in problem(path, (WIDTH, HEIGHT))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL says so itself
@pytest.mark.parametrize(
    "damage", [b"MM\x00", b"Exif\x00\x00", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff"]
)
def test_damaged_exif_data_turns_nothing(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jpg"
    noise(HEIGHT, WIDTH).save(path, exif=damage)
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]
    assert read_image(path).shape == (3, HEIGHT, WIDTH)


def tiff(samples: bytes, bits: tuple[int, ...], sample_format: int, compression: int = 1) -> bytes:
    """A TIFF of one strip with HEIGHT × WIDTH pixels, little-endian."""
    entries = [
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (259, 3, 1, compression),
        (262, 3, 1, 2 if len(bits) > 1 else 1),
    ]
    count = 9
    after = 8 + 2 + 12 * count + 4
    lone = len(bits) == 1
    entries += [(258, 3, len(bits), bits[0] if lone else after), (273, 4, 1, after + 2 * len(bits))]
    entries += [(277, 3, 1, len(bits)), (279, 4, 1, len(samples)), (339, 3, 1, sample_format)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\x00" + struct.pack("<IH", 8, count) + directory + bytes(4)
    return head + struct.pack(f"<{len(bits)}H", *bits) + samples


def packed_12_bits(values: np.ndarray) -> bytes:
    first, second = values.reshape(-1, 2).astype(np.uint32).T
    both = first << 12 | second
    return np.stack([both >> 16, both >> 8 & 255, both & 255], 1).astype(np.uint8).tobytes()


RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))


@pytest.mark.parametrize("white", [1, 255, 4095, 65535])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32])
def test_the_file_s_maximum_tells_which_value_is_white(tmp_path: Path, white: int, dtype: type) -> None:
    if white == 1 and dtype is not np.float32:
        return
    path = tmp_path / "a.tif"
    Image.fromarray((RAMP * white).astype(dtype)).save(path)
    # Whole numbers are rounded down.
    tolerance = 1e-6 if dtype is np.float32 else 1 / white
    assert_close(read_image(path), torch.from_numpy(RAMP).float().expand(3, -1, -1), atol=tolerance, rtol=0)
    (found,) = check_images([path], [(HEIGHT, WIDTH)])
    assert (found is None) == (white in (1, 65535))
    assert found is None or (f"exceeds {white}" in str(found) and found.severity == "warning")


@pytest.mark.parametrize("brightest", [1.0, 0.05])
def test_a_tiff_of_12_bits_needs_no_maximum(tmp_path: Path, brightest: float) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(packed_12_bits(RAMP * 4095 * brightest), (12,), 1))
    expected = torch.from_numpy(RAMP).float().expand(3, -1, -1) * brightest
    assert_close(read_image(path), expected, atol=1 / 4095, rtol=0)
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]


@pytest.mark.parametrize(
    "values",
    [
        np.float32(RAMP * 1.5),  # 0…1 with overshoot, or 0…255 and black?
        np.float32(RAMP * 0.01),
        np.float32(RAMP * 70000),
        np.float32(RAMP - 0.5),
        np.where(RAMP > 0.5, np.float32(np.nan), np.float32(1)),
        np.where(RAMP > 0.5, np.float32(np.inf), np.float32(1)),
        np.uint16(RAMP * 3),
        np.int32(RAMP > 0.5),
        np.int32(RAMP * 255) - 10,
        np.int32(RAMP * 100_000),
    ],
    ids=["overshoot", "dark", "large", "negative", "nan", "infinite", "levels", "mask", "signed", "counts"],
)
def test_values_that_do_not_tell_what_is_white_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    message = problem(path)
    assert message.startswith(f"{path}: its values, ")
    assert "save 8 bits" in message
    with pytest.raises(InputError, match="save 8 bits"):
        read_image(path)


def test_a_black_image_is_black(tmp_path: Path) -> None:
    for dtype in (np.float32, np.uint16, np.int32):
        path = tmp_path / f"{np.dtype(dtype)}.tif"
        Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype)).save(path)
        assert not read_image(path).any()


def test_colors_of_16_bits_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    colors = np.repeat(RAMP[..., None], 3, 2)
    path.write_bytes(tiff((colors * 65535).astype("<u2").tobytes(), (16, 16, 16), 1))
    assert_close(read_image(path), torch.from_numpy(RAMP).float().expand(3, -1, -1), atol=1 / 255, rtol=0)
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]
    path.write_bytes(tiff((colors * 4095).astype("<u2").tobytes(), (16, 16, 16), 1))
    assert "do not exceed 4095" in problem(path)
    with pytest.raises(InputError, match="do not exceed 4095"):
        read_image(path)


def png_of_16_bits(colors: np.ndarray) -> bytes:
    """A PNG of colors (H, W, 3), or with alpha (H, W, 4), which PIL reads but does not write."""
    height, width, channels = colors.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colors)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def tiff_of_16_bits(colors: np.ndarray) -> bytes:
    return tiff(colors.astype("<u2").tobytes(), (16, 16, 16), 1)


def compressed_tiff_of_16_bits(colors: np.ndarray) -> bytes:
    return tiff(zlib.compress(colors.astype("<u2").tobytes()), (16, 16, 16), 1, compression=8)


@pytest.mark.parametrize(
    ("encode", "channels"),
    [(png_of_16_bits, 3), (png_of_16_bits, 4), (tiff_of_16_bits, 3), (compressed_tiff_of_16_bits, 3)],
)
def test_black_colors_of_16_bits_are_black_and_values_below_256_are_refused(
    tmp_path: Path, encode: Callable[[np.ndarray], bytes], channels: int
) -> None:
    """Of both, the upper 8 bits are 0."""
    path = tmp_path / "a.img"
    colors = np.zeros((HEIGHT, WIDTH, channels), dtype=np.uint16)
    colors[..., 3:] = 65535
    path.write_bytes(encode(colors))
    assert not read_image(path).any()
    assert check_images([path], [(HEIGHT, WIDTH)]) == [None]
    colors[5, 7, 1] = 200
    path.write_bytes(encode(colors))
    assert "do not exceed 4095" in problem(path)
    with pytest.raises(InputError, match="do not exceed 4095"):
        read_image(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_called_so(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.where(RAMP > 0.5, np.float32(value), np.float32(1))).save(path)
    assert "some of them NaN or infinite" in problem(path)


@pytest.mark.parametrize("bits", [(64,), (32, 32, 32)])
def test_a_tiff_that_pil_cannot_read_is_refused_with_a_remedy(tmp_path: Path, bits: tuple[int, ...]) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(bytes(HEIGHT * WIDTH * sum(bits) // 8), bits, 3))
    assert "8-bit PNG" in problem(path)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_a_name_is_found_however_its_letters_are_composed(tmp_path: Path, on_disk: str, given: str) -> None:
    name = "Tür/Schlüssel 개 1.png"
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir()
    noise(3, 5).save(path)
    assert (tmp_path / stored_name(tmp_path, unicodedata.normalize(given, name))).samefile(path)


def test_a_name_that_the_disk_lacks_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("gone.png", "fäh.png", "\0ä", "ä" * 200):
        assert stored_name(tmp_path, name) == name


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
