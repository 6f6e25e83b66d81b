"""examples/write_an_adapter.py: an adapter that passes the kit, and a script that runs."""

import re
import sys

import pytest

import boxteacher.adapter
from boxteacher.testing import check_provider
from boxteacher_adapters.parts.backbones import build_backbone
from tests.example_support import EXAMPLE, TinyBackbone, load_example


def test_its_segmenter_passes_the_kit():
    segmenter = load_example().PrototypeSegmenter(TinyBackbone(), 1, channels=24)
    check_provider(segmenter, num_classes=1)


def test_it_trains_and_prints_coco_s_tables(tmp_path, monkeypatch, capsys):
    example = load_example()
    monkeypatch.setattr(example, "build_backbone", lambda name: build_backbone("resnet18", "none"))
    write_shapes = example.write_shapes
    monkeypatch.setattr(example, "write_shapes", lambda folder: write_shapes(folder, train=8, val=4, size=64))
    monkeypatch.setattr(sys, "argv", ["write_an_adapter.py", "--data", str(tmp_path / "s"), "--steps", "3"])
    example.main()
    printed = capsys.readouterr().out
    assert printed.index("Masks") < printed.index("Boxes")
    assert (
        len(re.findall(r"Average Precision +\(AP\) @\[ IoU=0.50:0.95 \| area=   all .* = 0.\d+", printed))
        == 2
    )


@pytest.mark.parametrize(
    "name", [*boxteacher.adapter.__all__, "boxteacher.adapters", "boxteacher.segmenters", "check_provider"]
)
def test_the_guide_names_every_part_of_the_interface(name):
    guide = (EXAMPLE.parents[1] / "docs" / "write_an_adapter.md").read_text()
    assert re.search(rf"\b{re.escape(name)}\b", guide)
