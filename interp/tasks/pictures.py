"""Pictures of coloured shapes: what `interp.tasks.scenes` asks about."""

import math
import zlib
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

COLORS = {
    "red": (222, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 60),
    "green": (40, 165, 70),
    "blue": (50, 90, 235),
    "purple": (145, 55, 190),
    "pink": (255, 140, 195),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUND = (36, 36, 36)
OBJECTS = tuple(f"{color} {shape}" for color, shape in product(COLORS, SHAPES))


@dataclass(frozen=True)
class Shape:
    """One object: its centre and radius as parts of the picture's side; perhaps a dot on it."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    dot: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> list[float]:
        """Left, top, right, bottom."""
        r = self.radius
        return [self.x - r, self.y - r, self.x + r, self.y + r]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, row by row from the top left."""

    shapes: tuple[Shape, ...]

    @property
    def objects(self) -> list[str]:
        return [shape.name for shape in self.shapes]

    @property
    def held_out(self) -> bool:
        """Is this set of objects kept for evaluation? A tenth of all are, by a hash."""
        return zlib.crc32(", ".join(sorted(self.objects)).encode()) % 10 == 0

    @property
    def caption(self) -> str:
        named = [f"{article(name)} {name}" for name in self.objects]
        listed = named[-1] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
        return f"The image shows {listed}."

    def draw(self, size: int = 48, box: tuple[float, float, float, float] = (0, 0, 1, 1)):
        """The picture, or the part of it in `box`, `size` pixels wide and high."""
        fine = 4 * size  # drawn large and made smaller, which softens the edges
        picture = Image.new("RGB", (fine, fine), BACKGROUND)
        brush = ImageDraw.Draw(picture)
        left, top, right, bottom = box
        scale_x, scale_y = fine / (right - left), fine / (bottom - top)
        for shape in self.shapes:
            x, y = (shape.x - left) * scale_x, (shape.y - top) * scale_y
            radius = shape.radius * scale_x, shape.radius * scale_y
            _draw(brush, shape.shape, x, y, radius, COLORS[shape.color])
            if shape.dot is not None:
                dot = 0.22 * radius[0], 0.22 * radius[1]
                _draw(brush, "circle", x, y, dot, COLORS[shape.dot])
        return picture.resize((size, size), Image.Resampling.BOX)


def _draw(brush, shape: str, x: float, y: float, radius: tuple[float, float], color) -> None:
    rx, ry = radius
    if shape == "circle":
        brush.ellipse([x - rx, y - ry, x + rx, y + ry], fill=color)
    else:
        brush.polygon([(x + rx * u, y + ry * v) for u, v in OUTLINES[shape]], fill=color)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    turns = [math.pi * (i / points - 0.5) for i in range(2 * points)]
    lengths = [1.0, inner] * points
    return [(r * math.cos(turn), r * math.sin(turn)) for turn, r in zip(turns, lengths)]


ARM = 0.34  # half the width of a cross's bars
OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "star": _star(5, 0.42),
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"
