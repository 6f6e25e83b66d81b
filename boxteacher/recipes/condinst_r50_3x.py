"""CondInst, ResNet-50, 36 epochs; published mask AP: val 34.9, test-dev 35.0."""

from boxteacher.recipes._schedules import COCO, EPOCHS_36, RELEASED_CONDINST, SGD

SETTINGS = {**COCO, **SGD, **EPOCHS_36, **RELEASED_CONDINST, "backbone": "resnet50_caffe"}
