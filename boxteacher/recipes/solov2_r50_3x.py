"""SOLOv2, ResNet-50, 36 epochs, its paper's schedule; no AP from boxes alone is published."""

from boxteacher.recipes._schedules import COCO, EPOCHS_36, SGD

SETTINGS = {**COCO, **SGD, **EPOCHS_36, "model": "solov2", "backbone": "resnet50_caffe", "mask_samples": 64}
