"""CondInst, ResNet-101-DCN, 36 epochs; published mask AP: val 37.2, test-dev 37.6."""

from boxteacher.recipes._schedules import COCO, EPOCHS_36, RELEASED_CONDINST, SGD

SETTINGS = {**COCO, **SGD, **EPOCHS_36, **RELEASED_CONDINST, "backbone": "resnet101_caffe_dcn"}
