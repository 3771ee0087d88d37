"""Plain coloured shapes, and background colours."""

from __future__ import annotations

import math

# Distinct in hue or lightness, so that colours are recognizable at 64 x 64 pixels.
COLOURS: dict[str, tuple[int, int, int]] = {
  'red': (222, 36, 36),
  'orange': (247, 140, 20),
  'yellow': (250, 214, 24),
  'green': (38, 160, 62),
  'blue': (34, 94, 220),
  'purple': (128, 50, 172),
  'pink': (247, 120, 178),
  'brown': (126, 76, 38),
  'black': (24, 24, 24),
}

WHITE = (255, 255, 255)
TINTS: dict[str, tuple[int, int, int]] = {
  'light blue': (186, 220, 250),
  'light green': (196, 236, 196),
  'light yellow': (253, 244, 184),
  'light pink': (251, 208, 224),
  'light gray': (212, 212, 212),
}

# (shape colour, background colour) with too little contrast.
CLASHES = frozenset({('yellow', 'light yellow'), ('pink', 'light pink')})


def _polygon(points: list[tuple[float, float]]) -> str:
  return '<polygon points="' + ' '.join(f'{x:.3f},{y:.3f}' for x, y in points) + '"/>'


def _star() -> str:
  points = []
  for corner in range(10):
    radius = 36 if corner % 2 == 0 else 15
    angle = math.pi * (corner / 5 - 0.5)
    points.append((36 + radius * math.cos(angle), 36 + radius * math.sin(angle)))
  return _polygon(points)


_BODIES = {
  'circle': '<circle cx="36" cy="36" r="34"/>',
  'square': '<rect x="4" y="4" width="64" height="64"/>',
  'triangle': _polygon([(36, 4), (70, 66), (2, 66)]),
  'star': _star(),
  'heart': (
    '<path d="M36 66 C14 49 2 36 2 22 C2 11 10 4 19 4 C27 4 33 8 36 15 '
    'C39 8 45 4 53 4 C62 4 70 11 70 22 C70 36 58 49 36 66 Z"/>'
  ),
  'diamond': _polygon([(36, 0), (62, 36), (36, 72), (10, 36)]),
  'cross': '<path d="M25 2h22v23h23v22h-23v23h-22v-23h-23v-22h23z"/>',
  'ring': '<circle cx="36" cy="36" r="26" fill="none" stroke="currentColor" stroke-width="15"/>',
}

SHAPES: tuple[str, ...] = tuple(_BODIES)


def svg(shape: str, colour: str) -> str:
  """The SVG text of a shape of SHAPES in a colour of COLOURS."""
  red, green, blue = COLOURS[colour]
  value = f'#{red:02x}{green:02x}{blue:02x}'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72" color="{value}" '
    f'fill="{value}">{_BODIES[shape]}</svg>'
  )


def background_colour(name: str) -> tuple[int, int, int]:
  """RGB values of `white` or of a tint."""
  return WHITE if name == 'white' else TINTS[name]
