"""CondInst, Swin-B, 36 epochs; published mask AP: val 40.2, test-dev 40.5."""

from boxteacher.recipes._schedules import ADAMW, COCO, EPOCHS_36, RELEASED_CONDINST

SETTINGS = {**COCO, **ADAMW, **EPOCHS_36, **RELEASED_CONDINST, "backbone": "swin_b_caffe"}
