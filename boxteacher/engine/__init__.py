"""Training, evaluation and prediction: plain users of the core."""
