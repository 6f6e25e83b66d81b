"""Mask R-CNN, ResNet-50, 12 epochs, detectron2's schedule; no AP from boxes alone is published."""

from boxteacher.recipes._schedules import COCO, EPOCHS_12, SGD

SETTINGS = {
    **COCO,
    **SGD,
    **EPOCHS_12,
    "model": "mask_rcnn",
    "backbone": "resnet50",
    "mask_samples": 64,
    "lr": 0.02,
}
