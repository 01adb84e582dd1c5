"""The drawn pictures of the narrated kitchen: eight objects, six verbs, one frame at a time.

Objects are shapes with a colour, verbs are motions with a prop (knife, pot, pan ...). Both fill most of the middle
square of the picture, which is what a centre crop keeps. Sprites are drawn once a step, four times too large, and
scaled down for clean edges; a frame only moves them, so that 320x240 costs about a millisecond.

Lengths are in hundredths of the picture height (`unit`), angles in degrees, times in seconds since the step began.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

OBJECTS = ("tomato", "carrot", "cheese", "broccoli", "fish", "onion", "egg", "bread")
VERBS = ("wash", "chop", "stir", "season", "flip", "bake")

_OVERSAMPLE = 4
_NUM_TURNS = 36  # rotated copies of a sprite; ten degrees apart

_ROW_TOP = 78  # hundredths of the height; the scene is above, a row of the object below
_MIDDLE = 42  # of the scene

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one step differs from others of its verb and object."""

    shift_x: float = 0.0
    """Offset of the scene from the middle, in hundredths of the height."""
    shift_y: float = 0.0
    size: float = 1.0
    speed: float = 1.0
    phase: float = 0.0
    """Where in its cycle the motion begins, 0..1."""
    tilt_deg: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Look:
        """Small variation: +-5 % of the height, +-8 % of size, +-15 % of speed, +-12 degrees."""
        return cls(
            shift_x=rng.uniform(-5, 5),
            shift_y=rng.uniform(-3, 3),
            size=rng.uniform(0.92, 1.08),
            speed=rng.uniform(0.85, 1.15),
            phase=rng.uniform(0, 1),
            tilt_deg=rng.uniform(-12, 12),
        )


class Sprite:
    """An RGBA picture drawn on a [-1, 1] square, y down; `turned` gives it at any angle."""

    def __init__(self, draw: Callable[[Pen], None], *, pixels: int, tilt_deg: float = 0.0) -> None:
        large = Image.new("RGBA", (pixels * _OVERSAMPLE, pixels * _OVERSAMPLE))
        draw(Pen(large))
        self._upright = large.rotate(tilt_deg, Image.Resampling.BILINEAR).resize((pixels, pixels), Image.Resampling.BOX)
        self._turned: dict[int, Image.Image] = {0: self._upright}

    def turned(self, angle_deg: float) -> Image.Image:
        turn = round(angle_deg / 360 * _NUM_TURNS) % _NUM_TURNS
        if turn not in self._turned:
            self._turned[turn] = self._upright.rotate(turn * 360 / _NUM_TURNS, Image.Resampling.BILINEAR)
        return self._turned[turn]


class Pen:
    """ImageDraw on [-1, 1] coordinates."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)
        self._half = image.width / 2

    def _at(self, *values: float) -> list[float]:
        return [(value + 1) * self._half for value in values]

    def disc(self, x: float, y: float, rx: float, ry: float | None = None, *, fill: Colour) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse(self._at(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def shape(self, *points: tuple[float, float], fill: Colour) -> None:
        self._draw.polygon([(self._at(x)[0], self._at(y)[0]) for x, y in points], fill=fill)

    def block(self, x0: float, y0: float, x1: float, y1: float, *, radius: float = 0.0, fill: Colour) -> None:
        self._draw.rounded_rectangle(self._at(x0, y0, x1, y1), radius=radius * self._half, fill=fill)

    def line(self, *points: tuple[float, float], width: float, fill: Colour) -> None:
        self._draw.line(
            [(self._at(x)[0], self._at(y)[0]) for x, y in points],
            fill=fill,
            width=round(width * self._half),
            joint="curve",
        )


def _tomato(pen: Pen) -> None:
    pen.disc(0, 0.08, 0.92, 0.86, fill=(214, 32, 36))
    pen.disc(-0.34, -0.22, 0.2, 0.14, fill=(244, 110, 100))
    for angle in range(0, 360, 60):
        a = math.radians(angle)
        tip = (0.42 * math.cos(a), -0.62 + 0.2 * math.sin(a))
        pen.shape((-0.08, -0.66), tip, (0.08, -0.58), fill=(46, 125, 50))
    pen.line((0, -0.62), (0.06, -0.92), width=0.1, fill=(46, 125, 50))


def _carrot(pen: Pen) -> None:
    for x in (-0.3, 0.0, 0.3):
        pen.line((0, -0.5), (x, -0.98), width=0.16, fill=(67, 160, 71))
    pen.disc(0, -0.36, 0.66, 0.3, fill=(245, 124, 0))
    pen.shape((-0.66, -0.36), (0.66, -0.36), (0.1, 0.98), (-0.1, 0.98), fill=(245, 124, 0))
    for y, reach in ((-0.2, 0.44), (0.12, 0.3), (0.45, 0.18)):
        pen.line((-reach, y), (0, y + 0.03), width=0.05, fill=(200, 88, 0))


def _cheese(pen: Pen) -> None:
    pen.shape((-0.95, 0.1), (0.7, -0.75), (0.95, 0.1), fill=(255, 236, 110))
    pen.shape((-0.95, 0.1), (0.95, 0.1), (0.95, 0.8), (-0.95, 0.8), fill=(253, 208, 23))
    for x, y, r in ((-0.55, 0.42, 0.17), (0.1, 0.3, 0.12), (0.5, 0.58, 0.2), (-0.1, 0.65, 0.1), (0.4, -0.22, 0.12)):
        pen.disc(x, y, r, fill=(214, 160, 0))


def _broccoli(pen: Pen) -> None:
    pen.block(-0.2, 0.1, 0.2, 0.97, radius=0.1, fill=(156, 204, 101))
    pen.line((-0.12, 0.45), (-0.5, 0.15), width=0.2, fill=(156, 204, 101))
    pen.line((0.12, 0.45), (0.5, 0.15), width=0.2, fill=(156, 204, 101))
    florets = ((-0.58, -0.05), (0.58, -0.05), (-0.38, -0.48), (0.38, -0.48), (0, -0.6), (0, -0.08))
    for x, y in florets:
        pen.disc(x, y, 0.38, fill=(27, 110, 40))
    for x, y in florets:
        pen.disc(x - 0.08, y - 0.1, 0.17, fill=(56, 150, 62))


def _fish(pen: Pen) -> None:
    pen.shape((0.4, 0), (0.98, -0.55), (0.85, 0), (0.98, 0.55), fill=(13, 71, 161))
    pen.shape((-0.2, -0.4), (0.15, -0.8), (0.4, -0.3), fill=(13, 71, 161))
    pen.disc(-0.2, 0, 0.78, 0.52, fill=(30, 118, 233))
    pen.disc(-0.2, 0.22, 0.6, 0.26, fill=(130, 190, 250))
    pen.disc(-0.62, -0.12, 0.12, fill=(255, 255, 255))
    pen.disc(-0.64, -0.12, 0.06, fill=(10, 20, 40))


def _onion(pen: Pen) -> None:
    pen.shape((-0.3, -0.5), (0, -0.98), (0.3, -0.5), fill=(142, 36, 170))
    for rx, fill in ((0.88, (123, 31, 162)), (0.64, (171, 71, 188)), (0.4, (123, 31, 162)), (0.18, (206, 147, 216))):
        pen.disc(0, 0.12, rx, 0.76, fill=fill)
    for x in (-0.12, 0, 0.12):
        pen.line((x, 0.84), (x * 2, 0.98), width=0.04, fill=(225, 200, 230))


def _egg(pen: Pen) -> None:
    for x, y, r in ((-0.3, -0.2, 0.62), (0.32, -0.14, 0.6), (0.05, 0.32, 0.62), (-0.42, 0.3, 0.42), (0.52, 0.34, 0.36)):
        pen.disc(x, y, r, fill=(255, 253, 248))
    pen.disc(0, 0.02, 0.38, fill=(255, 179, 0))
    pen.disc(-0.12, -0.12, 0.1, fill=(255, 224, 130))


def _bread(pen: Pen) -> None:
    pen.block(-0.97, -0.45, 0.97, 0.6, radius=0.42, fill=(121, 72, 40))
    pen.block(-0.86, -0.36, 0.86, 0.36, radius=0.34, fill=(166, 104, 58))
    for x in (-0.5, 0.0, 0.5):
        pen.line((x - 0.14, 0.22), (x + 0.14, -0.26), width=0.11, fill=(226, 182, 128))


_DRAW_OBJECT = dict(zip(OBJECTS, (_tomato, _carrot, _cheese, _broccoli, _fish, _onion, _egg, _bread), strict=True))


class Scene:
    """One kitchen of one video: its background, and the painters of its steps."""

    def __init__(self, *, width: int, height: int, rng: np.random.Generator) -> None:
        self.width = width
        self.height = height
        self.unit = height / 100
        self.background = self._kitchen(rng)
        self._specks = rng.uniform(0, 1, (90, 3))  # x, phase and size of grains and bubbles

    def _kitchen(self, rng: np.random.Generator) -> Image.Image:
        """A tiled wall and a counter in pale colours that differ a little from video to video."""
        hue, light = rng.uniform(0.10, 0.14), rng.uniform(0.88, 0.92)
        wall, tile, counter = (
            tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
            for saturation, value in ((0.08, light), (0.06, light + 0.05), (0.22, light - 0.14))
        )
        image = Image.new("RGB", (self.width, self.height), wall)
        draw = ImageDraw.Draw(image)
        step, offset = 22 * self.unit, rng.uniform(0, 22) * self.unit
        for row in range(4):
            for column in range(-1, math.ceil(self.width / step) + 1):
                x, y = column * step + offset * (row % 2), row * step
                draw.rectangle((x + 1, y + 1, x + step - 1, y + step - 1), fill=tile)
        draw.rectangle((0, _ROW_TOP * self.unit, self.width, self.height), fill=counter)
        return image

    def step(self, *, verb: str, thing: str, look: Look) -> Callable[[float], Image.Image]:
        """The painter of a step: seconds since its start -> an RGB picture."""
        paint = getattr(self, f"_{verb}")(_Stage(scene=self, thing=thing, look=look))
        row = self._row(thing)

        def frame(time_s: float) -> Image.Image:
            image = self.background.copy()
            paint(image, time_s * look.speed + look.phase)
            image.paste(row, (0, self.height - row.height))
            return image

        return frame

    def _row(self, thing: str) -> Image.Image:
        """The front of the counter, with more of the same object waiting in a row: no motion ever hides these."""
        pitch = 22 * self.unit
        row = self.background.crop((0, round(_ROW_TOP * self.unit), self.width, self.height))
        one = Sprite(_DRAW_OBJECT[thing], pixels=round(20 * self.unit)).turned(0)
        for place in range(-4, 5):
            centre = self.width / 2 + place * pitch
            row.paste(one, (round(centre - one.width / 2), round((row.height - one.height) / 2)), one)
        return row

    def _wash(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """Under running water: blue waves wander sideways, white bubbles rise, the object sways."""
        thing = stage.sprite(62)
        period = round(40 * self.unit)
        water = _waves(width=self.width + period, height=self.height, period=period)
        u = self.unit

        def paint(image: Image.Image, t: float) -> None:
            stage.put(image, thing, 6 * math.sin(2 * math.pi * t), 0, angle_deg=8 * math.sin(2 * math.pi * t))
            left = round((t * 1.5 % 1) * period)
            view = water.crop((left, 0, left + self.width, self.height))
            image.paste(view, (0, 0), view)
            draw = ImageDraw.Draw(image)
            for x, phase, size in self._specks[:28]:
                r = (2.5 + 4 * size) * u
                cx, cy = x * self.width, (1 - (phase + 0.4 * t) % 1) * (self.height + 4 * r) - 2 * r
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), outline=(255, 255, 255), fill=(214, 238, 255), width=2)

        return paint

    def _chop(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """A big knife goes up and down three times a second over a board; cuts stay open."""
        thing = stage.sprite(58)
        knife = Sprite(_knife, pixels=round(78 * self.unit))
        u = self.unit

        def paint(image: Image.Image, t: float) -> None:
            draw = ImageDraw.Draw(image)
            x, y = stage.centre(0, 0)
            draw.rounded_rectangle((x - 60 * u, y - 10 * u, x + 60 * u, y + 42 * u), 4 * u, fill=(188, 132, 80))
            draw.rectangle((x - 60 * u, y + 34 * u, x + 60 * u, y + 38 * u), fill=(150, 100, 58))
            stage.put(image, thing, 0, 2)
            at = -22 + (t * 14) % 44
            for cut in np.arange(-22, at, 11):
                draw.line((x + cut * u, y - 28 * u, x + cut * u, y + 32 * u), fill=(188, 132, 80), width=round(2 * u))
            height = abs(math.sin(math.pi * 3 * t))
            stage.put(image, knife, at, -8 - 34 * height)

        return paint

    def _stir(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """Seen from above: the object and a wooden spoon circle in a dark pot."""
        thing = stage.sprite(50)
        u = self.unit

        def paint(image: Image.Image, t: float) -> None:
            draw = ImageDraw.Draw(image)
            x, y = stage.centre(0, 0)
            for radius, fill in ((48, (38, 50, 56)), (43, (96, 125, 139)), (41, (69, 90, 100))):
                draw.ellipse((x - radius * u, y - radius * u, x + radius * u, y + radius * u), fill=fill)
            angle = 2 * math.pi * 1.2 * t
            for lag in (1.2, 1.9, 2.6, 3.3):
                a = math.degrees(angle - lag)
                r = (14 + 7 * lag) * u
                draw.arc((x - r, y - r, x + r, y + r), a - 50, a + 10, fill=(176, 200, 210), width=round(2 * u))
            stage.put(image, thing, 15 * math.cos(angle), 15 * math.sin(angle), angle_deg=-math.degrees(angle))
            sx, sy = x + 26 * u * math.cos(angle + 2.6), y + 26 * u * math.sin(angle + 2.6)
            draw.line((sx, sy, x + 58 * u, y - 58 * u), fill=(141, 95, 55), width=round(6 * u))
            draw.ellipse((sx - 9 * u, sy - 9 * u, sx + 9 * u, sy + 9 * u), fill=(161, 112, 68))

        return paint

    def _season(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """A shaker at the top; dark and white grains rain over the whole picture."""
        thing = stage.sprite(62)
        shaker = Sprite(_shaker, pixels=round(36 * self.unit))
        u = self.unit

        def paint(image: Image.Image, t: float) -> None:
            stage.put(image, thing, 0, 10)
            draw = ImageDraw.Draw(image)
            for index, (x, phase, size) in enumerate(self._specks):
                r = (0.9 + 0.9 * size) * u
                cx, cy = x * self.width, ((phase + 1.1 * t) % 1) * self.height
                fill = (255, 255, 255) if index % 3 == 0 else (40, 34, 30)
                draw.rectangle((cx - r, cy - 2.4 * r, cx + r, cy + 2.4 * r), fill=fill)
            wobble = math.sin(2 * math.pi * 3 * t)
            stage.put(image, shaker, 6 * wobble, -34, angle_deg=160 + 20 * wobble)

        return paint

    def _flip(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """The object turns over and over, and hops from a black pan."""
        thing = stage.sprite(58)
        u = self.unit

        def paint(image: Image.Image, t: float) -> None:
            draw = ImageDraw.Draw(image)
            x, y = stage.centre(0, 0)
            hop = abs(math.sin(math.pi * 1.1 * t))
            draw.line((x + 40 * u, y + 34 * u, x + 90 * u, y + 24 * u), fill=(62, 39, 35), width=round(8 * u))
            draw.ellipse((x - 54 * u, y + 20 * u, x + 54 * u, y + 46 * u), fill=(20, 20, 22))
            draw.ellipse((x - 48 * u, y + 22 * u, x + 48 * u, y + 41 * u), fill=(52, 52, 58))
            stage.put(image, thing, 0, 10 - 32 * hop, angle_deg=360 * 1.1 * t)

        return paint

    def _bake(self, stage: _Stage) -> Callable[[Image.Image, float], None]:
        """In the oven: everything glows and dims, flames lick from below."""
        thing = stage.sprite(58)
        u = self.unit
        glow = Image.new("RGB", (self.width, self.height), (255, 87, 10))

        def paint(image: Image.Image, t: float) -> None:
            draw = ImageDraw.Draw(image)
            draw.rectangle((0, 0, self.width, self.height), fill=(58, 28, 20))
            for row in (30, 50, 70, 90):
                draw.rectangle((0, (row - 1) * u, self.width, (row + 1) * u), fill=(110, 70, 50))
            stage.put(image, thing, 0, -4)
            pulse = 0.5 + 0.5 * math.sin(2 * math.pi * 1.5 * t)
            image.paste(Image.blend(image, glow, 0.05 + 0.25 * pulse))
            draw = ImageDraw.Draw(image)
            for flame in range(-1, math.ceil(self.width / (14 * u)) + 1):
                cx = flame * 14 * u + 7 * u
                tip = (_ROW_TOP - 8 - 12 * abs(math.sin(math.pi * (2 * t + 0.37 * flame)))) * u
                draw.polygon([(cx - 9 * u, _ROW_TOP * u), (cx, tip), (cx + 9 * u, _ROW_TOP * u)], fill=(255, 193, 7))

        return paint


class _Stage:
    """Where a step's pieces go: the middle of the picture plus the step's own shift."""

    def __init__(self, *, scene: Scene, thing: str, look: Look) -> None:
        self._scene = scene
        self._thing = thing
        self._look = look

    def sprite(self, size: float) -> Sprite:
        """The step's object, `size` hundredths of the height across."""
        pixels = round(size * self._look.size * self._scene.unit)
        return Sprite(_DRAW_OBJECT[self._thing], pixels=pixels, tilt_deg=self._look.tilt_deg)

    def centre(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point given in hundredths of the height from the middle of the scene."""
        unit = self._scene.unit
        return (
            self._scene.width / 2 + (x + self._look.shift_x) * unit,
            (_MIDDLE + y + self._look.shift_y) * unit,
        )

    def put(self, image: Image.Image, sprite: Sprite, x: float, y: float, *, angle_deg: float = 0.0) -> None:
        picture = sprite.turned(angle_deg)
        cx, cy = self.centre(x, y)
        image.paste(picture, (round(cx - picture.width / 2), round(cy - picture.height / 2)), picture)


def _knife(pen: Pen) -> None:
    pen.shape((-0.16, -0.35), (0.2, -0.35), (0.2, 0.72), (-0.16, 0.98), fill=(200, 208, 214))
    pen.shape((-0.16, -0.35), (-0.04, -0.35), (-0.04, 0.9), (-0.16, 0.98), fill=(240, 244, 247))
    pen.block(-0.14, -0.98, 0.18, -0.33, radius=0.1, fill=(55, 40, 36))


def _shaker(pen: Pen) -> None:
    pen.block(-0.5, -0.35, 0.5, 0.95, radius=0.15, fill=(236, 239, 241))
    pen.block(-0.5, 0.1, 0.5, 0.5, fill=(229, 57, 53))
    pen.block(-0.4, -0.9, 0.4, -0.3, radius=0.3, fill=(120, 130, 138))


def _waves(*, width: int, height: int, period: int) -> Image.Image:
    """RGBA water: diagonal blue bands, see-through."""
    y, x = np.mgrid[0:height, 0:width]
    band = 0.5 + 0.5 * np.sin(2 * np.pi * (x / period + 0.15 * np.sin(2 * np.pi * y / (height / 3))))
    rgba = np.empty((height, width, 4), np.uint8)
    rgba[..., 0] = 20 + 60 * band
    rgba[..., 1] = 120 + 70 * band
    rgba[..., 2] = 235
    rgba[..., 3] = 40 + 80 * band
    return Image.fromarray(rgba, "RGBA")
