"""CondInst, ResNet-101-DCN, 36 epochs; published mask AP: val 37.2, test-dev 37.6."""

SETTINGS = {
    "model": "condinst",
    "backbone": "resnet101_caffe_dcn",
    "mask_samples": 64,
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "augmentation": "stronger",
    "batch_size": 16,
    "optimizer": "sgd",
    "lr": 0.01,
    "weight_decay": 1e-4,
    "gradient_clip": 0.0,  # none
    "lr_warmup_steps": 1000,
    "lr_steps": (210_000, 250_000),
    "steps": 270_000,
    "teacher_size": (800, 1333),
    "quality_at": "image",
}
