"""Parts of segmenters: backbones and their weights, and what several segmenters share."""
