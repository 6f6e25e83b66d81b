"""Segmenters for `BoxTeacher`, one module each, on torchvision's parts."""
