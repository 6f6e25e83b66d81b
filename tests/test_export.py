"""Exported files give the segmenter's detections, on images that they were not traced with."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import batched_nms

from boxteacher.cli import main
from boxteacher.engine import export as export_module
from boxteacher.engine.checkpoint import SegmenterInfo, load_checkpoint, save_checkpoint
from boxteacher.engine.export import OUTPUTS, SingleImage
from boxteacher.engine.onnx_operators import onnx_operators
from boxteacher.engine.segmenters import build_segmenter
from boxteacher_adapters.fcos import suppress_in_groups
from boxteacher_adapters.mask2former import Mask2Former
from boxteacher_adapters.parts.backbones import Backbone, build_backbone
from boxteacher_adapters.solov2 import SOLOv2
from tests.engine_support import error_of
from tests.support import seeded_images

Network = Callable[[Tensor], tuple[Tensor, ...]]

SIZE = (64, 96)
BLACK = torch.zeros(3, *SIZE)
needs_exporting_torch = pytest.mark.skipif(
    export_module._is_old_torch(), reason=f"needs torch {export_module._EXPORTING_TORCH}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CondInst that detects objects in patches of color, and none in a black image."""
    torch.manual_seed(0)
    segmenter = build_segmenter("condinst", 3, backbone="resnet18", weights="none", image_size=96).eval()
    head = segmenter.box_head
    nn.init.normal_(head.class_logits.weight, std=0.1)
    nn.init.normal_(head.controller.weight, std=0.02)
    largest: list[Tensor] = []  # class logit of each pyramid level
    hook = head.class_logits.register_forward_hook(lambda module, given, output: largest.append(output.max()))
    with torch.no_grad():
        segmenter([BLACK])
        hook.remove()
        head.class_logits.bias += -3.0 - max(largest)  # sigmoid(-3) = 0.047 is below the threshold of 0.05
    path = tmp_path_factory.mktemp("export") / "last.pt"
    save_checkpoint(path, segmenter, SegmenterInfo("condinst", "resnet18", 96, ["a", "b", "c"], [1, 2, 3]))
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs") / "photograph.png"
    pixels = (patches(5) * 255).to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def patches(seed: int) -> Tensor:
    """An image of soft patches of color."""
    (few,) = seeded_images((4, 6), seed=seed)
    return nn.functional.interpolate(few[None], SIZE, mode="bilinear")[0]


def arguments(checkpoint: Path, output: Path, *more: str) -> list[str]:
    return ["export", str(checkpoint), str(output), "--image-size", *map(str, SIZE), *more]


def load_program(path: Path) -> Network:
    return torch.export.load(path).module()


def load_onnx(path: Path) -> Network:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == list(OUTPUTS)
    return lambda image: tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))


def assert_same_detections(eager: Network, exported: Network, images: list[Tensor]) -> list[int]:
    """Returns the number of detections in each image."""
    counts = []
    for image in images:
        with torch.no_grad():
            expected, actual = eager(image), exported(image)
        for name, mine, theirs in zip(OUTPUTS, expected, actual, strict=True):
            # 100 float32 roundings of a pixel's coordinate, and of a probability.
            assert_close(theirs, mine, rtol=0, atol=1e-3 if name == "boxes" else 1e-4)
        counts.append(len(expected[0]))
    return counts


@needs_exporting_torch
@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "load"), [(".pt2", load_program), (".onnx", load_onnx)])
def test_an_exported_condinst_gives_the_segmenter_s_detections(
    checkpoint, photograph, tmp_path, caplog, suffix, load
):
    output = tmp_path / f"condinst{suffix}"
    with caplog.at_level("INFO"):
        assert main(arguments(checkpoint, output, "--image", str(photograph))) == 0
    assert "largest difference" in caplog.text
    assert list(tmp_path.iterdir()) == [output]
    eager = SingleImage(load_checkpoint(checkpoint)[0])
    first, second, none = assert_same_detections(eager, load(output), [patches(0), patches(1), BLACK])
    assert first > 1
    assert second > 1
    assert none == 0


def small_solov2(body: Backbone) -> SOLOv2:
    segmenter = SOLOv2(
        body,
        2,
        **dict.fromkeys(("channels", "head_channels", "mask_channels", "num_kernels"), 32),
        num_convs=1,
        grids=(8, 6, 4, 3, 2),
    )
    nn.init.normal_(segmenter.head.category.weight, std=0.1)
    nn.init.zeros_(segmenter.head.category.bias)
    nn.init.normal_(segmenter.head.kernel.weight, std=0.1)
    return segmenter


def small_mask2former(body: Backbone) -> Mask2Former:
    return Mask2Former(body, 2, channels=32, num_queries=8, encoder_layers=1, decoder_layers=1)


@needs_exporting_torch
@pytest.mark.slow
@pytest.mark.parametrize("build", [small_solov2, small_mask2former])
def test_other_segmenters_can_be_traced(build):
    torch.manual_seed(0)
    network = SingleImage(build(build_backbone("resnet18", "none", strides=(4, 8, 16, 32))).eval())
    with torch.no_grad():
        traced = torch.export.export(network, (BLACK,), strict=False).module()
    assert min(assert_same_detections(network, traced, [patches(0), patches(1)])) > 1


def test_an_exported_state_dict_loads_into_a_new_segmenter(checkpoint, photograph, tmp_path, caplog):
    output = tmp_path / "weights.pt"
    with caplog.at_level("INFO"):
        assert main(arguments(checkpoint, output, "--image", str(photograph))) == 0
    assert "boxes 0.0e+00, labels 0.0e+00, scores 0.0e+00, masks 0.0e+00" in caplog.text
    trained, _ = load_checkpoint(checkpoint)
    fresh = build_segmenter("condinst", 3, backbone="resnet18", weights="none", image_size=96).eval()
    fresh.load_state_dict(torch.load(output, weights_only=True))
    with torch.no_grad():
        (expected,), (actual,) = trained([patches(0)]), fresh([patches(0)])
    assert len(expected["boxes"]) > 1
    assert all(torch.equal(actual[name], expected[name]) for name in OUTPUTS)


def test_a_check_without_detections_logs_a_warning(checkpoint, tmp_path, caplog):
    Image.new("RGB", (96, 64)).save(tmp_path / "black.png")
    assert main(arguments(checkpoint, tmp_path / "weights.pt", "--image", str(tmp_path / "black.png"))) == 0
    assert "--image" in caplog.text


def test_a_segmenter_that_cannot_be_traced_is_named_in_one_line(tmp_path, capsys):
    segmenter = build_segmenter("mask_rcnn", 2, backbone="resnet18", weights="none", image_size=96)
    checkpoint = tmp_path / "last.pt"
    save_checkpoint(checkpoint, segmenter, SegmenterInfo("mask_rcnn", "resnet18", 96, ["a", "b"], [1, 2]))
    message = error_of(arguments(checkpoint, tmp_path / "model.pt2"), capsys)
    assert "MaskRCNNProvider" in message
    assert message.endswith("export weights as .pt")
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda boxes, labels, scores, masks: (boxes, labels, scores + 0.01, masks), "scores 1.0e-02"),
        (lambda boxes, labels, scores, masks: (boxes + 2, labels, scores, masks), "boxes 2.0e+00"),
        (lambda boxes, labels, scores, masks: (boxes, labels + 1, scores, masks), "labels 1.0e+00"),
        (lambda boxes, labels, scores, masks: (boxes, labels, scores, masks / 0), "masks"),
        (lambda *found: tuple(each[1:] for each in found), "objects"),
    ],
)
def test_a_file_with_other_detections_is_not_kept(
    checkpoint, photograph, tmp_path, capsys, monkeypatch, damage, named
):
    def write(network, size, path):
        path.write_bytes(b"wrong")
        return lambda image: damage(*network(image))

    monkeypatch.setitem(export_module._WRITERS, ".pt2", write)
    message = error_of(arguments(checkpoint, tmp_path / "model.pt2", "--image", str(photograph)), capsys)
    assert named in message
    assert list(tmp_path.iterdir()) == []


def test_detections_in_another_order_are_accepted(checkpoint, photograph, tmp_path, monkeypatch):
    def write(network, size, path):
        path.write_bytes(b"right")
        return lambda image: tuple(each.flip(0) for each in network(image))

    monkeypatch.setitem(export_module._WRITERS, ".pt2", write)
    assert main(arguments(checkpoint, tmp_path / "model.pt2", "--image", str(photograph))) == 0


def test_bad_input_is_named_in_one_line_and_leaves_no_file(checkpoint, tmp_path, capsys, monkeypatch):
    def message(source: Path, output: Path) -> str:
        text = error_of(arguments(source, output), capsys)
        assert str(output if source == checkpoint else source) in text
        return text

    unknown = message(checkpoint, tmp_path / "model.tflite")
    assert ".pt, .pt2, .onnx" in unknown
    assert "make it" in message(checkpoint, tmp_path / "nowhere" / "model.pt")

    kept = tmp_path / "kept.pt"
    kept.write_bytes(b"mine")
    assert "exists" in message(checkpoint, kept)
    assert kept.read_bytes() == b"mine"
    message(kept, tmp_path / "model.pt")
    message(tmp_path / "gone.pt", tmp_path / "model.pt")

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest),
    )
    without = message(checkpoint, tmp_path / "model.onnx")
    assert "onnxruntime: install boxteacher[export]" in without
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize(("version", "refused"), [("2.4.0", True), ("2.6.0+cpu", True), ("2.14.1", False)])
def test_onnx_names_the_torch_that_it_needs(checkpoint, tmp_path, capsys, monkeypatch, version, refused):
    monkeypatch.setattr(torch, "__version__", version)
    if refused:
        message = error_of(arguments(checkpoint, tmp_path / "model.onnx"), capsys)
        assert f"needs torch {export_module._EXPORTING_TORCH} or later, and this is {version}" in message
    else:
        export_module._check_output(tmp_path / "model.onnx")


class _Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, group: Tensor) -> Tensor:
        return suppress_in_groups(boxes, scores, group, 0.6)


@needs_exporting_torch
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")  # torchvision's
@pytest.mark.parametrize("count", [0, 1, 400])
def test_traced_suppression_is_that_of_torchvision(count):
    generator = torch.Generator().manual_seed(0)
    corner = 60 * torch.rand(count, 2, generator=generator) - 30
    boxes = torch.cat([corner, corner + 20 + 10 * torch.rand(count, 2, generator=generator)], 1)
    scores, group = torch.rand(count, generator=generator), torch.arange(count) % 3
    expected = batched_nms(boxes, scores, group, 0.6)
    program = torch.export.export(_Suppress(), (boxes, scores, group)).module()
    assert torch.equal(program(boxes, scores, group), expected)
    assert count < 2 or len(expected) < count


class _Order(nn.Module):
    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        down = values.argsort(dim=1, descending=True, stable=True)
        up = values[:, :2].sort(dim=0, stable=True)
        row = values[0].sort().values
        return down, up.values, up.indices, torch.searchsorted(row, row)


@needs_exporting_torch
def test_onnx_operators_equal_torch_s_also_for_ties(tmp_path):
    values = torch.tensor([[2.0, 1, 2, 0, 1, 2], [5, 5, 5, 5, 5, 5], [0, 1, 0, 1, 0, 1]])
    program = torch.export.export(_Order(), (values,))
    torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=onnx_operators()).save(
        tmp_path / "order.onnx"
    )
    session = onnxruntime.InferenceSession(tmp_path / "order.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    for expected, actual in zip(_Order()(values), found, strict=True):
        assert torch.equal(torch.from_numpy(actual), expected)
