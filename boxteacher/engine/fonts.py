"""Class names in any script, as the fonts of this system can show them."""

import logging
import unicodedata
from functools import cache

from PIL import ImageFont

logger = logging.getLogger(__name__)

FONT_SIZE = 14

# PIL finds them in the folders of Linux, macOS and Windows.
_SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJK-VF.ttc",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Nirmala.ttc",
    "Nirmala.ttf",
    "LeelawUI.ttf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "unifont.otf",
    "unifont.ttf",
)
_NO_CHARACTER = "\U0010ffff"
_SCORE = "0.123456789"  # some fonts of one script lack digits

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def font_and_names(class_names: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The font that has the letters of most names, and the names as they can be shown with it.

    A name with other letters becomes "class LABEL", which is logged.

    Returns:
        File name of the font, None for PIL's own, which has little more than ASCII; and a name per class.
    """
    composed = [unicodedata.normalize("NFC", name) for name in class_names]
    best, shown = None, _shown(ImageFont.load_default(), composed)
    for file in _SYSTEM_FONTS:
        if all(shown):
            break
        try:
            shown_by_file = _shown(ImageFont.truetype(file, FONT_SIZE), composed)
        except OSError:  # this system has no such font
            continue
        if sum(shown_by_file) > sum(shown):
            best, shown = file, shown_by_file
    rows = enumerate(zip(composed, shown, strict=True))
    names = [name if is_shown else f"class {label}" for label, (name, is_shown) in rows]
    replaced = [f"{new} for {old!r}" for new, old in zip(names, composed, strict=True) if new != old]
    if replaced:
        logger.warning(
            "no font found here has the letters of all classes, so pictures show %s: "
            "install DejaVu, Noto Sans CJK or Unifont",
            ", ".join(replaced),
        )
    return best, names


def _shown(font: _Font, names: list[str]) -> list[bool]:
    """Whether the font has all letters of each name, and the digits of its score."""
    missing = _glyph(font, _NO_CHARACTER)
    letters = set("".join([*names, _SCORE]))
    has = {letter: letter.isspace() or _glyph(font, letter) != missing for letter in letters}
    return [all(has[letter] for letter in name + _SCORE) for name in names]


def _glyph(font: _Font, letter: str) -> bytes | None:
    """Pixels of a letter, or of the font's placeholder; None if PIL draws neither."""
    try:
        return bytes(font.getmask(letter))
    except UnicodeEncodeError:  # from PIL's bitmap font
        return None
