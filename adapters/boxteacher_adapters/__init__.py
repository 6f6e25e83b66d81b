"""Segmenters that `BoxTeacher` can teach, one module each, on torchvision's parts."""
