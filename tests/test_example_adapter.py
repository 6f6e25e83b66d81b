"""examples/write_an_adapter.py: an adapter that passes the kit, and a script that runs."""

import re
import sys

import pytest

from boxteacher.testing import check_provider
from boxteacher_adapters.parts.backbones import build_backbone
from tests.example_support import EXAMPLE, TinyBackbone, load_example


def test_its_segmenter_can_be_taught():
    segmenter = load_example().PrototypeSegmenter(TinyBackbone(), 1, channels=24)
    check_provider(segmenter, num_classes=1)


def test_it_trains_and_prints_coco_s_tables(tmp_path, monkeypatch, capsys):
    example = load_example()
    monkeypatch.setattr(example, "build_backbone", lambda name: build_backbone("resnet18", "none"))
    draw = example.write_shapes
    monkeypatch.setattr(example, "write_shapes", lambda folder: draw(folder, train=8, val=4, size=64))
    monkeypatch.setattr(sys, "argv", ["write_an_adapter.py", "--data", str(tmp_path / "s"), "--steps", "3"])
    example.main()
    printed = capsys.readouterr().out
    assert printed.index("Masks") < printed.index("Boxes")
    assert (
        len(re.findall(r"Average Precision +\(AP\) @\[ IoU=0.50:0.95 \| area=   all .* = 0.\d+", printed))
        == 2
    )


@pytest.mark.parametrize("name", ["boxteacher.adapters", "boxteacher.segmenters", "check_provider"])
def test_the_guide_tells_of_every_way_in(name):
    guide = (EXAMPLE.parents[1] / "docs" / "write_an_adapter.md").read_text()
    assert name in guide
