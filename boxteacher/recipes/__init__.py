"""Settings of whole runs on COCO, one run per file; `boxteacher.engine.recipes` finds them by name."""
