"""torchvision's detectors on COCO, as starts of segmenters that learn masks from boxes.

No mask head is taken over: FCOS and Faster R-CNN have none, and Mask R-CNN's learned from annotated masks.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import (
    FCOS_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from boxteacher.adapter import InputError, SegmenterWeights
from boxteacher_adapters.parts.pretrained import file_at

_BACKBONE = "resnet50"  # of the published detectors
_CATEGORIES = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by COCO's ids, which have gaps
_BATCH_NORM_EPS = 1e-5

# torchvision's prefixes of FCOS, and CondInst's.
_FCOS = {
    "backbone.body.": "backbone.network.",
    "backbone.fpn.": "fpn.",
    "head.classification_head.conv.": "box_head.class_tower.",
    "head.classification_head.cls_logits.": "box_head.class_logits.",
    "head.regression_head.conv.": "box_head.box_tower.",
    "head.regression_head.bbox_reg.": "box_head.distances.",
    "head.regression_head.bbox_ctrness.": "box_head.centerness.",
}
_RCNN = {
    "backbone.body.": "model.backbone.body.network.",
    "backbone.fpn.": "model.backbone.fpn.",
    "rpn.": "model.rpn.",
    "roi_heads.box_": "model.roi_heads.box_",
}
# Names of torchvision before 0.13, which its published files keep.
_FORMER_NAMES = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
)


def coco_file(backbone: str, image_size: int, *, model: str, url: str, smaller_until: int = 0) -> Path:
    """The file of a detector trained on COCO, which is downloaded once and kept in torch's cache.

    Args:
        backbone: name of the segmenter's backbone.
        image_size: longest side of the images in pixels.
        model: name of the segmenter.
        url: URL of the file.
        smaller_until: longest side in pixels up to which the segmenter is built smaller.

    Raises:
        InputError: the detector is built otherwise, or the file cannot be had.
    """
    if backbone != _BACKBONE:
        raise InputError(
            f"there are no COCO weights of {model} on {backbone}: give --backbone {_BACKBONE}, or --weights "
            "imagenet, none or a file"
        )
    if image_size <= smaller_until:
        raise InputError(
            f"the COCO weights of {model} do not fit the smaller network that --image-size {image_size} "
            f"builds: give --image-size above {smaller_until}, or --weights imagenet"
        )
    try:
        return file_at(url)
    except OSError as error:
        raise InputError(
            f"COCO weights of {model} cannot be had ({error}): download them by hand and give them with "
            "--weights FILE, or begin with --weights imagenet or none"
        ) from error


condinst_on_coco = partial(
    coco_file, model="condinst", url=FCOS_ResNet50_FPN_Weights.COCO_V1.url, smaller_until=512
)
mask_rcnn_on_coco = partial(
    coco_file, model="mask_rcnn", url=MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url, smaller_until=512
)
mask_rcnn_v2_on_coco = partial(
    coco_file, model="mask_rcnn_v2", url=MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
)


def recognize_detector(state: dict[str, Tensor], path: Path) -> SegmenterWeights | None:
    """Weights of torchvision's FCOS for CondInst, or of its Faster or Mask R-CNN for Mask R-CNN.

    torchvision counts classes with the background or an unused class 0, and on COCO by its 91 ids; the
    classifiers of the 80 categories are kept.

    Args:
        state: state dict under the names of the file.
        path: path of the file, for messages.

    Returns:
        None for a state dict of another kind.

    Raises:
        InputError: the detector has other layers than those that can be built here.
    """
    if "head.regression_head.bbox_ctrness.weight" in state:
        _check_backbone(state, path, "FCOS")
        return _fcos(state)
    if "roi_heads.box_predictor.cls_score.weight" in state:
        detector = "Mask R-CNN" if "roi_heads.mask_predictor.conv5_mask.weight" in state else "Faster R-CNN"
        _check_backbone(state, path, detector)
        return _rcnn(state, detector)
    return None


def _check_backbone(state: dict[str, Tensor], path: Path, detector: str) -> None:
    last = "backbone.body.layer3.5.conv3.weight"  # in the third stage of a ResNet-50
    if last not in state or last.replace("3.5", "3.6") in state:
        raise InputError(
            f"weights {path} are torchvision's {detector} on another backbone than {_BACKBONE}: give those "
            f"of one on {_BACKBONE}"
        )


def _fcos(state: dict[str, Tensor]) -> SegmenterWeights:
    weights, left_out = _renamed(state, _FCOS)
    kept = _classes(state["head.classification_head.cls_logits.weight"])
    for entry in ("weight", "bias"):
        weights[f"box_head.class_logits.{entry}"] = weights[f"box_head.class_logits.{entry}"][kept]
    # torchvision's locations are the cells' corners, CondInst's their centers, half a stride further right
    # and down: farther from a box's left and top side, nearer to its right and bottom side.
    half = torch.tensor([0.5, 0.5, -0.5, -0.5])
    weights["box_head.distances.bias"] = weights["box_head.distances.bias"] + half
    weights["box_head.scales"] = torch.ones(5)  # which torchvision does not have
    return SegmenterWeights(
        model="condinst",
        backbone=_BACKBONE,
        num_classes=len(kept),
        weights=weights,
        description=f"torchvision's FCOS on {_BACKBONE}, {len(kept)} classes",
        left_out=left_out,
        initial=("box_head.controller.", "mask_branch."),
    )


def _rcnn(state: dict[str, Tensor], detector: str) -> SegmenterWeights:
    weights, left_out = _renamed(state, _RCNN)
    predictor = "model.roi_heads.box_predictor"
    outputs = weights[f"{predictor}.cls_score.weight"]
    kept = [0, *_classes(outputs)]  # 0: background
    for entry in ("weight", "bias"):
        classes, offsets = f"{predictor}.cls_score.{entry}", f"{predictor}.bbox_pred.{entry}"
        weights[classes] = weights[classes][kept]
        weights[offsets] = weights[offsets].unflatten(0, (-1, 4))[kept].flatten(0, 1)
    second = "roi_heads.box_head.fc6.weight" not in state
    if len(outputs) == len(_CATEGORIES) and not second:
        weights |= _without_eps(weights)
    version = " v2" if second else ""
    return SegmenterWeights(
        model="mask_rcnn_v2" if second else "mask_rcnn",
        backbone=_BACKBONE,
        num_classes=len(kept) - 1,
        weights=weights,
        description=f"torchvision's {detector}{version} on {_BACKBONE}, {len(kept) - 1} classes",
        left_out=left_out,
        initial=("model.roi_heads.mask_head.", "model.roi_heads.mask_predictor."),
    )


def _renamed(state: dict[str, Tensor], prefixes: dict[str, str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The entries with one of torchvision's prefixes under our names, and the names of the others."""
    weights, left_out = {}, []
    for key, value in state.items():
        name = key
        for former, now in _FORMER_NAMES:
            name = former.sub(now, name)
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            left_out.append(key)
        else:
            weights[prefixes[prefix] + name.removeprefix(prefix)] = value
    return weights, tuple(left_out)


def _classes(classifier: Tensor) -> list[int]:
    """The outputs of a classifier (outputs, …) that stand for classes."""
    if len(classifier) != len(_CATEGORIES):
        return list(range(1, len(classifier)))
    return [i for i, name in enumerate(_CATEGORIES) if name not in ("__background__", "N/A")]


def _without_eps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gains of the batch norms, such that these compute what they would without an eps.

    torchvision's published Faster and Mask R-CNN, but not their v2, have batch norms without it.
    """
    gains = {}
    for name, variance in weights.items():
        if name.endswith(".running_var"):
            gain = name.replace(".running_var", ".weight")
            variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
            gains[gain] = weights[gain] * (1 + _BATCH_NORM_EPS / variance).sqrt()
    return gains
