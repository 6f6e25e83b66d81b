"""Settings that several recipes share: image sizes, optimizers, schedules, the released code's teacher."""

COCO = {
    "image_size": 1333,
    "shortest_side": (640, 672, 704, 736, 768, 800),
    "batch_size": 16,
    "rounds": 0,
    "ellipse_steps": 0,
    "refinement": "none",
}

SGD = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4, "gradient_clip": 0.0}  # 0: no clipping
ADAMW = {"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05}

EPOCHS_12 = {
    "lr_warmup_steps": 1000,
    "lr_steps": (60_000, 80_000),
    "steps": 90_000,
    "augmentation": "color",
}
EPOCHS_36 = {
    "lr_warmup_steps": 1000,
    "lr_steps": (210_000, 250_000),
    "steps": 270_000,
    "augmentation": "color+blur",
}

RELEASED_CONDINST = {
    "model": "condinst",
    "mask_samples": 64,
    "teacher_size": (800, 1333),
    "teacher_mode": "train",
    "quality_at": "image",
    "score_threshold": 0.05**0.5,  # of √(class · centerness)
    "decayed": "all",
    "gradient_clip": 0.0,
}
