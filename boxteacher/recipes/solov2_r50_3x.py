"""SOLOv2, ResNet-50, 36 epochs, its paper's schedule; no AP from boxes alone is published."""

SETTINGS = {
    "model": "solov2",
    "backbone": "resnet50_caffe",
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
}
