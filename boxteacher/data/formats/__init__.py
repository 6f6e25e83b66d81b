"""Readers of annotation files, one format each, that give a `DataIndex` and the problems they found."""
