"""Drawn text and interfaces: pages, listings, tables, slides, windows, messages and credits."""

from __future__ import annotations

import cv2
import numpy as np

from dgiqa_stream.errors import ConfigError
from distill.data.codecs import Rgb

Rng = np.random.Generator
Colour = tuple[int, int, int]
_HERSHEY = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX_SMALL,
    cv2.FONT_HERSHEY_COMPLEX | cv2.FONT_ITALIC,
)
_SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ter",
    "un",
    "ve",
    "sta",
    "ing",
    "or",
    "pre",
    "de",
    "Al",
    "co",
    "ny",
)
_SIGNS = ("= ", "(", ") ", "{ ", "} ", "; ", ": ", "-> ", "[0]", "== ", "// ", '"" ')


def pages(rng: Rng, side: int) -> Rgb:
    """Paragraphs from edge to edge in one font."""
    paper, ink = theme(rng)
    page, write = np.full((side, side, 3), paper, np.uint8), _writer(rng)
    px = int(rng.integers(9, 40))
    margin = int(rng.integers(4, side // 8))
    for top in range(margin, side - px, int(px * rng.uniform(1.2, 2.0))):
        if rng.uniform() < 0.9:
            page = write(page, _words(rng, side // px * 2), (margin, top), px, ink)
    return page


def listings(rng: Rng, side: int) -> Rgb:
    """Lines of a program, indented, in a few colours, with their numbers or none."""
    paper, ink = theme(rng)
    page, write = np.full((side, side, 3), paper, np.uint8), _writer(rng)
    px, numbered = int(rng.integers(9, 24)), rng.uniform() < 0.6
    colours = [ink, *(_ink_on(paper, rng) for _ in range(3))]
    depth = 0
    for number, top in enumerate(range(4, side - px, round(1.35 * px))):
        depth = int(np.clip(depth + rng.integers(-1, 2), 0, 6))
        left = (3 * px if numbered else 4) + 2 * px * depth
        if numbered:
            page = write(page, str(number + 1), (2, top), px, colours[-1])
        for _ in range(int(rng.integers(0, 5))):
            token = _words(rng, int(rng.integers(3, 12))) + str(rng.choice(_SIGNS))
            page = write(page, token, (left, top), px, colours[int(rng.integers(4))])
            left += round(0.62 * px * len(token))
    return page


def tables(rng: Rng, side: int) -> Rgb:
    """Numbers and words in rows and columns, ruled or striped."""
    paper, ink = theme(rng)
    page, write = np.full((side, side, 3), paper, np.uint8), _writer(rng)
    px, stripe = int(rng.integers(10, 26)), _shade(paper, ink, 0.12)
    tall, wide, ruled = round(px * 1.7), int(rng.integers(60, 180)), rng.uniform() < 0.5
    for row, top in enumerate(range(0, side, tall)):
        if row % 2:
            page[top : top + tall] = stripe
        if ruled:
            cv2.line(page, (0, top), (side, top), ink, 1)
        for left in range(0, side, wide):
            text = f"{rng.normal(0, 999):.2f}" if row and left else _words(rng, 8)
            page = write(page, text, (left + 4, top + 3), px, ink)
    for left in range(0, side, wide) if ruled else ():
        cv2.line(page, (left, 0), (left, side), ink, 1)
    return page


def slides(rng: Rng, side: int) -> Rgb:
    """A title, points, and boxes on a plain or shaded ground."""
    paper, ink = theme(rng)
    page, write = _shaded(side, paper, _shade(paper, ink, rng.uniform(0, 0.4))), _writer(rng)
    px = int(rng.integers(18, 34))
    page = write(page, _words(rng, 18), (side // 12, side // 14), 2 * px, _ink_on(paper, rng))
    for top in range(side // 4, side - px, round(px * rng.uniform(1.6, 3))):
        cv2.circle(page, (side // 12, top + px // 2), max(2, px // 6), ink, -1, cv2.LINE_AA)
        page = write(page, _words(rng, int(rng.integers(8, 40))), (side // 8, top), px, ink)
    for _ in range(int(rng.integers(0, 4))):
        _box(page, rng, side, _ink_on(paper, rng))
    return page


def windows(rng: Rng, side: int) -> Rgb:
    """An interface: bars, panels, buttons, icons, shaded or plain, with small words."""
    paper, ink = theme(rng)
    page, write = _shaded(side, paper, _shade(paper, ink, rng.uniform(0, 0.5))), _writer(rng)
    for _ in range(int(rng.integers(1, 4))):
        left, top = rng.integers(0, side // 2, 2).tolist()
        wide, tall = rng.integers(side // 3, side, 2).tolist()
        panel, bar = _shade(paper, ink, rng.uniform(0, 0.3)), _ink_on(paper, rng)
        cv2.rectangle(page, (left, top), (left + wide, top + tall), panel, -1)
        cv2.rectangle(page, (left, top), (left + wide, top + 24), bar, -1)
        cv2.rectangle(page, (left, top), (left + wide, top + tall), ink, 1)
        px = int(rng.integers(10, 18))
        page = write(page, _words(rng, 14), (left + 6, top + 4), 14, paper)
        for line in range(top + 34, min(side, top + tall), round(px * rng.uniform(1.5, 3))):
            page = write(page, _words(rng, int(rng.integers(4, 30))), (left + 8, line), px, ink)
    for _ in range(int(rng.integers(2, 16))):
        _icon(page, rng, side)
    return page


def chats(rng: Rng, side: int) -> Rgb:
    """Messages in coloured boxes on either side."""
    paper, ink = theme(rng)
    page, write = np.full((side, side, 3), paper, np.uint8), _writer(rng)
    sides = (_shade(paper, ink, 0.15), _ink_on(paper, rng))
    px, top = int(rng.integers(12, 24)), int(rng.integers(0, 40))
    while top < side:
        lines, mine = int(rng.integers(1, 4)), int(rng.integers(2))
        wide = int(rng.integers(side // 4, round(side * 0.75)))
        left = side - wide - 10 if mine else 10
        low = top + round(lines * px * 1.4) + 10
        cv2.rectangle(page, (left, top), (left + wide, low), sides[mine], -1)
        for n in range(lines):
            words = _words(rng, round(wide / px * 1.6))
            page = write(page, words, (left + 8, top + 5 + round(n * px * 1.4)), px, ink)
        top = low + int(rng.integers(6, 24))
    return page


def credits_(rng: Rng, side: int) -> Rgb:
    """Names in the middle of a dark screen."""
    dark = int(rng.integers(0, 30))
    page, write = np.full((side, side, 3), dark, np.uint8), _writer(rng)
    px, light = int(rng.integers(14, 40)), int(rng.integers(170, 256))
    for top in range(int(rng.integers(10, side // 2)), side - px, round(px * rng.uniform(1.3, 3))):
        text = _words(rng, int(rng.integers(6, 22)))
        left = max(0, side // 2 - round(0.28 * px * len(text)))
        page = write(page, text, (left, top), px, (light, light, light))
    return page


def theme(rng: Rng) -> tuple[Colour, Colour]:
    """Paper and ink: dark on light, light on dark, or two colours that are far apart."""
    light, dark = int(rng.integers(215, 256)), int(rng.integers(0, 60))
    how = rng.uniform()
    if how < 0.35:
        return (light, light, light), (dark, dark, dark)
    if how < 0.6:
        return (dark, dark, dark), (light, light, light)
    paper = _colour(rng)
    return paper, _ink_on(paper, rng)


def _colour(rng: Rng) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _ink_on(paper: Colour, rng: Rng) -> Colour:
    """A colour that differs visibly from the paper."""
    while True:
        ink = _colour(rng)
        if sum(abs(a - b) for a, b in zip(paper, ink, strict=True)) > 240:
            return ink


def _shade(a: Colour, b: Colour, share: float) -> Colour:
    red, green, blue = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _shaded(side: int, top: Colour, bottom: Colour) -> Rgb:
    """From one colour to the other, (side, side, 3)."""
    rows = np.linspace(np.array(top, float), np.array(bottom, float), side)
    return np.repeat(rows[:, None].round().astype(np.uint8), side, 1)


def _box(page: Rgb, rng: Rng, side: int, fill: Colour) -> None:
    left, top = rng.integers(side // 3, side, 2).tolist()
    wide, tall = rng.integers(20, side // 3, 2).tolist()
    cv2.rectangle(page, (left, top), (left + wide, top + tall), fill, int(rng.choice([-1, 2])))


def _icon(page: Rgb, rng: Rng, side: int) -> None:
    """A disc, a square or a triangle of any colour, 8 to 48 px."""
    place = rng.integers(0, side, 2).tolist()
    px, fill = int(rng.integers(4, 24)), _colour(rng)
    how = int(rng.integers(3))
    if how == 0:
        cv2.circle(page, place, px, fill, -1, cv2.LINE_AA)
    elif how == 1:
        cv2.rectangle(page, place, [place[0] + 2 * px, place[1] + px], fill, -1)
    else:
        corners = np.array(place) + rng.integers(-px, px + 1, (3, 2))
        cv2.fillPoly(page, [corners.astype(np.int32)], fill, cv2.LINE_AA)


def _words(rng: Rng, num_letters: int) -> str:
    """Made-up words of syllables, about as many letters as asked for."""
    text = ""
    while len(text) < num_letters:
        text += str(rng.choice(_SYLLABLES)) + (" " if rng.uniform() < 0.4 else "")
    return text[: max(1, num_letters)]


class _Write:
    """Text in one font: one of OpenCV's (single strokes), or Pillow's (outlines)."""

    def __init__(self, hershey: int | None, thickness: int) -> None:
        self.hershey, self.thickness = hershey, thickness

    def __call__(self, page: Rgb, text: str, place: tuple[int, int], px: int, ink: Colour) -> Rgb:
        """The page with a line of text whose top left is ``place`` and whose height is ``px``."""
        if self.hershey is None:
            return _set_in_pillow(page, text, place, px, ink)
        scale = cv2.getFontScaleFromHeight(self.hershey, max(5, round(0.7 * px)), self.thickness)
        base = (place[0], place[1] + px)
        cv2.putText(page, text, base, self.hershey, scale, ink, self.thickness, cv2.LINE_AA)
        return page


def _writer(rng: Rng) -> _Write:
    if rng.uniform() < 0.5:
        return _Write(None, 1)
    return _Write(int(rng.choice(_HERSHEY)), int(rng.choice([1, 1, 2])))


def _set_in_pillow(page: Rgb, text: str, place: tuple[int, int], px: int, ink: Colour) -> Rgb:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as exc:
        raise ConfigError(
            "strange pictures with text are drawn by Pillow: pip install 'dgiqa-stream[report]'"
        ) from exc
    height = min(len(page) - place[1], round(1.5 * px))
    band = Image.fromarray(page[place[1] : place[1] + height])
    ImageDraw.Draw(band).text((place[0], 0), text, fill=ink, font=ImageFont.load_default(px))
    page[place[1] : place[1] + height] = np.asarray(band)
    return page
