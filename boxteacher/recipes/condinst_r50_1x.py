"""CondInst, ResNet-50, 12 epochs; published mask AP: val 32.6, test-dev 32.9."""

SETTINGS = {
    "model": "condinst",
    "backbone": "resnet50_caffe",
    "mask_samples": 64,
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "augmentation": "strong",
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.01,
    "weight_decay": 1e-4,
    "gradient_clip": 0.0,  # none
    "lr_warmup_steps": 1000,
    "lr_steps": (60_000, 80_000),
    "steps": 90_000,
    "teacher_size": (800, 1333),
    "quality_at": "image",
}
