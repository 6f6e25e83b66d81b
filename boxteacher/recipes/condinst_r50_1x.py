"""CondInst, ResNet-50, 12 epochs; published mask AP: val 32.6, test-dev 32.9."""

from boxteacher.recipes._schedules import COCO, EPOCHS_12, RELEASED_CONDINST, SGD

SETTINGS = {**COCO, **SGD, **EPOCHS_12, **RELEASED_CONDINST, "backbone": "resnet50_caffe"}
