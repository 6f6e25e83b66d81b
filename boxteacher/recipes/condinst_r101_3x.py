"""CondInst, ResNet-101, 36 epochs; published mask AP: val 36.2, test-dev 36.5."""

from boxteacher.recipes._schedules import COCO, EPOCHS_36, RELEASED_CONDINST, SGD

SETTINGS = {**COCO, **SGD, **EPOCHS_36, **RELEASED_CONDINST, "backbone": "resnet101_caffe"}
