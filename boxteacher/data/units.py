"""Signs that the boxes of an annotation file are not x, y, width, height in pixels."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from boxteacher.data.problems import Problem

_TOLERANCE = 1.0  # pixels by which a rounded box may end beyond its image


class BoxUnits:
    """Counts a file's boxes, as annotated, of which most can hardly be meant so."""

    def __init__(self) -> None:
        self.boxes = self.tiny = self.beyond = 0

    def add(self, box: Sequence[float], height: int, width: int) -> None:
        """Counts the box x, y, width, height of an image of `height` × `width` pixels."""
        x, y, box_width, box_height = box
        self.boxes += 1
        self.tiny += 0 < box_width <= 1 and 0 < box_height <= 1
        self.beyond += x + box_width > width + _TOLERANCE or y + box_height > height + _TOLERANCE

    def problems(self, file: Path) -> Iterator[Problem]:
        """Warnings about the boxes of a file, whatever its format."""
        if 2 * self.tiny > self.boxes:
            what = f"{self.tiny} of {self.boxes} boxes are at most one pixel wide and high"
            remedy = "if they are shares of the image, 0 to 1, multiply them by its width and height"
            yield Problem(file, "", what, remedy, "warning")
        if 2 * self.beyond > self.boxes:
            what = f"{self.beyond} of {self.boxes} boxes end beyond the right or bottom edge of their image"
            remedy = "if they are corners x0, y0, x1, y1, write them as x, y, width, height"
            yield Problem(file, "", what, remedy, "warning")
