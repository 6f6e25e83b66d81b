"""Readers of annotation files, one format each, that return a `DataIndex` and the problems found."""
