"""Mask2Former, ResNet-50, 50 epochs, its paper's schedule; no AP from boxes alone is published."""

SETTINGS = {
    "model": "mask2former",
    "backbone": "resnet50",
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "augmentation": "stronger",
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 1e-4,
    "backbone_lr_factor": 0.1,
    "weight_decay": 0.05,
    "gradient_clip": 0.01,
    "lr_warmup_steps": 0,
    "lr_steps": (327_778, 355_092),
    "steps": 368_750,
}
