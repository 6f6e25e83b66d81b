"""Training, evaluation, prediction and export of segmenters, on top of the core."""
