"""The embedded data sets: generated shapes with textures, alone or several in a scene."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "rings")
CLASSES = [f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES]


def make_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The embedded data set: `count` generated colour images, uint8 (n, 3, 32, 32), and their
    labels, int64 (n,), places in CLASSES. The same seed gives the same images.

    A class is one of four shapes filled with one of four textures. The texture, and the slope
    behind the shape, each blend a dark and a light colour. Place, size, angle and colours vary. The
    shape is what a main component can show, the texture what is left to the residual.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw_shapes(min(1000, count - i), generator)[:2] for i in range(0, count, 1000)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


class Scenes(NamedTuple):
    images: Tensor  # uint8 (n, 3, 64, 64)
    instances: Tensor  # uint8 (n, 64, 64): k where object k = 1 … 4 is seen, 0 for the background
    kinds: Tensor  # int64 (n, 4): places in SHAPES, −1 where nothing is seen of an object


def make_scenes(count: int, seed: int) -> Scenes:
    """`count` generated colour images of one to four of the embedded shapes, which vary more in
    size and place; a later one covers an earlier one. The same seed gives the same scenes."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw_scenes(min(250, count - i), generator) for i in range(0, count, 250)]
    return Scenes(*map(torch.cat, zip(*parts, strict=True)))


def _draw_scenes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    objects = torch.randint(1, 5, (n,), generator=generator)
    images, kinds = torch.empty(n, 3, 64, 64, dtype=torch.uint8), torch.full((n, 4), -1)
    instances = torch.zeros(n, 64, 64, dtype=torch.uint8)
    for k in range(1, 5):
        there = objects >= k  # everywhere for the first, which brings the background
        behind = None if k == 1 else images[there]
        images[there], labels, inside = _draw_shapes(
            int(there.sum()), generator, size=64, radius=(6, 16), spread=24, behind=behind
        )
        instances[there] = instances[there].masked_fill(inside[:, 0] >= 0.5, k)
        kinds[there, k - 1] = labels // len(TEXTURES)
    seen = torch.stack([(instances == k).flatten(1).any(1) for k in range(1, 5)], dim=1)  # (n, 4)
    return images, instances, kinds.where(seen, -1)


def _draw_shapes(
    n: int, generator: torch.Generator, size=32, radius=(12, 14), spread=2, behind=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 (n, 3, size, size), labels int64 (n,), and how much of each pixel is inside the
    shape, float (n, 1, size, size). A shape is up to `spread` pixels off the centre along either
    axis. behind: images to draw on, like those returned; None for a slope."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def turned(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Every pixel's coordinates in a frame at (x, y) turned by `angle`."""  # (n, h, w) each
        s, c = angle.sin()[:, None, None], angle.cos()[:, None, None]
        dx, dy = pixel_x - x[:, None, None], pixel_y - y[:, None, None]
        return c * dx + s * dy, c * dy - s * dx

    def box(half_width: Tensor, half_height: Tensor) -> Tensor:
        return torch.maximum(a.abs() - half_width, b.abs() - half_height)

    labels = torch.randint(len(SHAPES) * len(TEXTURES), (n,), generator=generator)
    shape, texture = labels // len(TEXTURES), labels % len(TEXTURES)
    places = torch.arange(size) + 0.5 - size / 2
    pixel_y, pixel_x = torch.meshgrid(places, places, indexing="ij")  # (h, w)
    chosen = torch.arange(n)

    # distance to each shape's outline in pixels, negative inside, in the order of SHAPES
    a, b = turned(uniform(-0.15, 0.15), uniform(-spread, spread), uniform(-spread, spread))
    r = uniform(*radius)[:, None, None]
    thirds = [2 * math.pi * i / 3 for i in range(3)]
    sides = [a * math.sin(t) + b * math.cos(t) - 0.6 * r for t in thirds]
    cross = torch.minimum(box(1.1 * r, 0.36 * r), box(0.36 * r, 1.1 * r))
    disc = (a.square() + b.square()).sqrt() - r
    outlines = [disc, box(0.85 * r, 0.85 * r), torch.stack(sides).amax(0), cross]
    outline = torch.stack(outlines, dim=1)[chosen, shape]
    inside = (0.5 - outline).clamp(0, 1)[:, None]  # antialiased

    # each texture as a wave of 8 pixels between its two colours, in the order of TEXTURES
    k = 2 * math.pi / 8
    checks, dots = 1.5 * (k * a).sin() * (k * b).sin(), (k * a).cos() + (k * b).cos() - 0.7
    rings = (k * (a.square() + b.square()).sqrt()).cos()
    wave = torch.stack([(k * a).sin(), checks, dots, rings], dim=1)[chosen, texture]
    wave = 0.5 + 0.5 * (3 * wave).tanh()[:, None]

    def two_colours() -> tuple[Tensor, Tensor]:  # one dark, one light, or the other way round
        dark = uniform(0, 0.4, 1, 1, 1)
        light = dark + uniform(0.35, 0.65, 1, 1, 1)
        swap = uniform(0, 1, 1, 1, 1) < 0.5
        tones = torch.where(swap, light, dark), torch.where(swap, dark, light)
        return tuple((tone + uniform(-0.1, 0.1, 3, 1, 1)).clamp(0, 1) for tone in tones)

    if behind is None:
        slope, _ = turned(uniform(0, 2 * math.pi), torch.zeros(n), torch.zeros(n))
        background = torch.lerp(*two_colours(), 0.5 + slope[:, None] / (size * math.sqrt(2)))
    else:
        background = behind / 255
    images = torch.lerp(background, torch.lerp(*two_colours(), wave), inside)  # (n, 3, h, w)
    return (images * 255).round().to(torch.uint8), labels, inside
