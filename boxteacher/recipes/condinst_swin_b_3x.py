"""CondInst, Swin-B, 36 epochs; published mask AP: val 40.2, test-dev 40.5."""

SETTINGS = {
    "model": "condinst",
    "backbone": "swin_b_caffe",
    "mask_samples": 64,
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "augmentation": "stronger",
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.05,
    "lr_warmup_steps": 1000,
    "lr_steps": (210_000, 250_000),
    "steps": 270_000,
    "teacher_size": (800, 1333),
    "quality_at": "image",
}
