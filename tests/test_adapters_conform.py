"""Every adapter of this package passes the kit that others are given."""

from collections.abc import Callable

import pytest
from torch import nn

from boxteacher.testing import check_provider
from boxteacher_adapters.condinst import build_condinst
from boxteacher_adapters.mask2former import build_mask2former
from boxteacher_adapters.mask_rcnn import build_mask_rcnn
from boxteacher_adapters.solov2 import build_solov2


@pytest.mark.parametrize(
    "build",
    [
        build_mask2former,
        pytest.param(build_condinst, marks=pytest.mark.slow),
        pytest.param(build_solov2, marks=pytest.mark.slow),
        pytest.param(build_mask_rcnn, marks=pytest.mark.slow),
    ],
)
def test_the_adapter_conforms(build: Callable[..., nn.Module]) -> None:
    check_provider(build(3, backbone="resnet18", weights="none", image_size=128))
