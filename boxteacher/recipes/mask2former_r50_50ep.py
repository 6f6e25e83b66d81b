"""Mask2Former, ResNet-50, 50 epochs, its paper's schedule; no AP from boxes alone is published."""

from boxteacher.recipes._schedules import ADAMW, COCO

SETTINGS = {
    **COCO,
    **ADAMW,
    "model": "mask2former",
    "backbone": "resnet50",
    "augmentation": "color+blur",
    "backbone_lr_factor": 0.1,
    "gradient_clip": 0.01,
    "lr_warmup_steps": 0,
    "lr_steps": (327_778, 355_092),
    "steps": 368_750,
}
