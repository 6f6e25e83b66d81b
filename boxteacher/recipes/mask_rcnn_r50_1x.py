"""Mask R-CNN, ResNet-50, 12 epochs, detectron2's schedule; no AP from boxes alone is published."""

SETTINGS = {
    "model": "mask_rcnn",
    "backbone": "resnet50",
    "mask_samples": 64,
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "augmentation": "strong",
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.02,
    "weight_decay": 1e-4,
    "gradient_clip": 0.0,  # none
    "lr_warmup_steps": 1000,
    "lr_steps": (60_000, 80_000),
    "steps": 90_000,
}
