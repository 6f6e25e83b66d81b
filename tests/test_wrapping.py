"""Networks that cannot be wrapped as they are: compiled, sharded, or with parts that cannot be copied."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from boxteacher import BoxSupervised, BoxTeacher, EMATeacher, ProtocolError
from tests.support import ScriptedSegmenter
from tests.teaching_support import IMAGES, PLAN, TARGETS, numbers


def compiled_in_place(segmenter: nn.Module) -> nn.Module:
    segmenter.compile(backend="eager")
    return segmenter


@pytest.mark.parametrize(
    "compile_network", [lambda model: torch.compile(model, backend="eager"), compiled_in_place]
)
@pytest.mark.parametrize("wrap", [BoxTeacher, BoxSupervised, EMATeacher])
def test_a_compiled_network_is_refused_with_the_remedy(wrap: Any, compile_network: Any):
    compiled = compile_network(ScriptedSegmenter())
    with pytest.raises(ProtocolError, match=r"compiles model\(images\) alone.*model.backbone.compile\(\)"):
        wrap(compiled)


def test_parts_that_are_compiled_in_place_run_compiled():
    calls = 0

    def backend(graph: Any, _: list[Tensor]) -> Any:
        def run(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*inputs)

        return run

    def losses(compiled: bool) -> dict[str, float]:
        torch.manual_seed(0)
        segmenter = ScriptedSegmenter(PLAN)
        if compiled:
            segmenter.cells.compile(backend=backend)
        torch.manual_seed(0)
        return numbers(BoxTeacher(segmenter).train()(IMAGES, TARGETS))

    assert losses(compiled=True) == losses(compiled=False)
    assert calls > 0


def with_cached_activation(segmenter: nn.Module) -> str:
    segmenter.norm.last_output = segmenter.norm.weight * 2
    return "norm.last_output"


def with_lock(segmenter: nn.Module) -> str:
    segmenter.cache = {"lock": threading.Lock()}
    return "cache"


def with_old_weight_norm(segmenter: nn.Module) -> str:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(segmenter.cells)
    return "cells.weight"


@pytest.mark.parametrize("spoil", [with_cached_activation, with_lock, with_old_weight_norm])
def test_an_attribute_that_cannot_be_copied_is_named(spoil: Any):
    segmenter = ScriptedSegmenter()
    name = spoil(segmenter)
    with pytest.raises(ProtocolError, match=rf"cannot be copied .* attribute {name} \(") as caught:
        BoxTeacher(segmenter)
    assert "\n" not in str(caught.value)


def test_an_attribute_that_cannot_be_copied_is_named_by_unwrap():
    model = BoxSupervised(ScriptedSegmenter())
    with_lock(model.student)
    with pytest.raises(ProtocolError, match="attribute cache"):
        model.unwrap()


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    """A device mesh of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("sharded", ["before wrapping", "the student", "the wrapper"])
def test_a_network_that_is_sharded_by_fsdp_is_refused_in_one_line(mesh: Any, sharded: str):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs FSDP2")
    segmenter = ScriptedSegmenter()
    message = r"sharded by FSDP.* train with DistributedDataParallel"
    if sharded == "before wrapping":
        fsdp.fully_shard(segmenter, mesh=mesh)
        with pytest.raises(ProtocolError, match=message):
            BoxTeacher(segmenter)
        return
    model = BoxTeacher(segmenter).train()
    fsdp.fully_shard(model.student if sharded == "the student" else model, mesh=mesh)
    with pytest.raises(ProtocolError, match=message):
        model(IMAGES, TARGETS)
