"""Videos that need no download: what happens in them is drawn from a random source, and asked for."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from seqlong.errors import ConfigError

COLOURS = np.array([[220, 60, 50], [60, 190, 80], [70, 90, 230], [210, 190, 60], [190, 80, 200]], dtype=np.uint8)
_DIM = (COLOURS.astype(np.int64) * 2 // 5).astype(np.uint8)  # what is not lit


class Filmed(NamedTuple):
    """Pictures ``(n h w 3)`` uint8 and the class that is asked for."""

    pixels: NDArray[np.uint8]
    label: int


@runtime_checkable
class VideoGenerator(Protocol):
    """Makes clips: a pure function of a random source, so that a sample's number names it.

    Attributes:
        classes: labels are below this; guessing is right once in so many.
    """

    classes: int

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Filmed:
        """A clip of ``frames`` pictures of ``size`` x ``size``."""

    def describe(self) -> dict[str, object]:
        """What is asked, for reports."""


class FlashOrder:
    """Shapes bounce about; each lights up once. In which order? One class for each order.

    Every picture alone, and any set of pictures without their order, says nothing of it.

    Args:
        shapes: 2 to 4: a disc, a square, a diamond, a ring, each in its colour.
        flash: frames that a shape stays lit.

    Raises:
        ConfigError: another number of shapes.
    """

    def __init__(self, shapes: int = 3, flash: int = 2) -> None:
        if not 2 <= shapes <= 4 or flash < 1:
            raise ConfigError(
                f"FlashOrder has 2 to 4 shapes and flashes of 1 frame or more, found {shapes} and {flash}"
            )
        self.shapes, self.flash = shapes, flash
        self.orders = list(itertools.permutations(range(shapes)))
        self.classes = len(self.orders)

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Filmed:
        if frames < self.shapes * (self.flash + 1):
            raise ConfigError(
                f"{self.shapes} flashes of {self.flash} frames need clips of {self.shapes * (self.flash + 1)} frames, "
                f"found {frames}"
            )
        label = int(random.integers(self.classes))
        starts = _apart(random, frames, self.shapes, self.flash)
        when = {shape: int(start) for shape, start in zip(self.orders[label], starts, strict=True)}
        tracks = [_bounce(random, frames, size, size // 6) for _ in range(self.shapes)]
        pixels = _stage(random, frames, size)
        for number in range(frames):
            for shape, track in enumerate(tracks):
                lit = when[shape] <= number < when[shape] + self.flash
                draw_shape(pixels[number], shape, track[number], size // 6, (COLOURS if lit else _DIM)[shape])
        return Filmed(pixels, label)

    def describe(self) -> dict[str, object]:
        return {"task": f"in which order {self.shapes} shapes light up", "chance": 1 / self.classes}


class FlashCount:
    """A disc bounces about and lights up some times, beside a square that does not. How many times?

    Args:
        most: flashes; there are ``most + 1`` classes.
        flash: frames that a flash lasts.
    """

    def __init__(self, most: int = 5, flash: int = 1) -> None:
        if most < 1 or flash < 1:
            raise ConfigError(f"FlashCount needs 1 flash of 1 frame or more, found most={most}, flash={flash}")
        self.most, self.flash, self.classes = most, flash, most + 1

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Filmed:
        if frames < self.most * (self.flash + 1):
            raise ConfigError(
                f"{self.most} flashes of {self.flash} frames need clips of {self.most * (self.flash + 1)} frames, "
                f"found {frames}"
            )
        label = int(random.integers(self.classes))
        starts = _apart(random, frames, label, self.flash)
        pixels = _stage(random, frames, size)
        tracks = [_bounce(random, frames, size, size // 6) for _ in range(2)]
        for number in range(frames):
            draw_shape(pixels[number], 1, tracks[1][number], size // 6, _DIM[1])
            lit = any(start <= number < start + self.flash for start in starts)
            draw_shape(pixels[number], 0, tracks[0][number], size // 6, (COLOURS if lit else _DIM)[0])
        return Filmed(pixels, label)

    def describe(self) -> dict[str, object]:
        return {"task": f"how many times a disc lights up, 0 to {self.most}", "chance": 1 / self.classes}


class VideoNeedle:
    """Noise, and in one frame of all a sign. Which sign, or in which part of the clip?

    Args:
        signs: how many there are, 2 to 16: patterns of 2 x 2 fields in two colours.
        ask: ``which`` of the signs, or ``when``: in which of ``parts`` of the clip.
        parts: equal parts of the clip, for ``when``.
        noise: deviation of the noise, levels of 255.
    """

    def __init__(
        self, signs: int = 8, ask: Literal["which", "when"] = "which", parts: int = 8, noise: float = 20.0
    ) -> None:
        if not 2 <= signs <= 16 or parts < 2 or noise < 0:
            raise ConfigError(
                f"VideoNeedle has 2 to 16 signs, 2 parts or more and noise of 0 or more, found {signs}, {parts} "
                f"and {noise}"
            )
        self.signs, self.ask, self.parts, self.noise = signs, ask, parts, noise
        self.classes = signs if ask == "which" else parts

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Filmed:
        if self.ask == "when" and frames < self.parts:
            raise ConfigError(f"{self.parts} parts need clips of as many frames, found {frames}")
        sign, place = int(random.integers(self.signs)), int(random.integers(frames))
        # Bytes from the start: a clip may have thousands of frames.
        noise = random.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
        span = max(1, round(self.noise * math.sqrt(12)))
        pixels = (noise.astype(np.uint16) * span // 256 + max(0, 110 - span // 2)).astype(np.uint8)
        half = size // 2
        for field in range(4):
            y, x = divmod(field, 2)
            colour = COLOURS[0] if sign >> field & 1 else COLOURS[2]
            pixels[place, y * half : (y + 1) * half, x * half : (x + 1) * half] = colour
        return Filmed(pixels, sign if self.ask == "which" else place * self.parts // frames)

    def describe(self) -> dict[str, object]:
        asked = f"which of {self.signs} signs" if self.ask == "which" else f"in which of {self.parts} parts"
        return {"task": f"one frame of all shows a sign: {asked}", "chance": 1 / self.classes}


class MovingDigits:
    """Handwritten digits (scikit-learn's, 8 x 8) that bounce about. Which digit is the first to be shown?

    Args:
        digits: how many are seen at once; the first of them alone in the first quarter of the clip.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    classes = 10

    def __init__(self, digits: int = 2) -> None:
        if digits < 1:
            raise ConfigError(f"MovingDigits needs 1 digit or more, found {digits}")
        self.digits = digits
        _handwriting()

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Filmed:
        pictures, labels = _handwriting()
        chosen = random.integers(len(labels), size=self.digits)
        by = max(1, size // 20)
        canvas = np.zeros((frames, size, size), dtype=np.uint8)
        side = 8 * by
        if side > size:
            raise ConfigError(f"digits of 8 x 8 pixels do not fit pictures of {size}; set data.size to 16 or more")
        for order, number in enumerate(chosen):
            glyph = np.kron(pictures[number], np.ones((by, by), dtype=np.uint8))
            track = _bounce(random, frames, size, side // 2)
            for frame in range(frames):
                if order and frame < frames / 4:
                    continue
                y, x = (int(np.clip(c - side // 2, 0, size - side)) for c in track[frame])
                part = canvas[frame, y : y + side, x : x + side]
                np.maximum(part, glyph, out=part)
        return Filmed(np.repeat(canvas[..., None], 3, axis=-1), int(labels[chosen[0]]))

    def describe(self) -> dict[str, object]:
        return {"task": f"the first of {self.digits} moving digits", "chance": 0.1}


@functools.cache
def _handwriting() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "MovingDigits are scikit-learn's, which is not installed; pip install 'seqlong[digits]'"
        ) from error
    bunch = load_digits()
    return (bunch.images * 15.9375).astype(np.uint8), bunch.target.astype(np.int64)


def _apart(random: np.random.Generator, frames: int, count: int, length: int) -> NDArray[np.int64]:
    """``count`` starts, ascending, of stretches of ``length`` frames with a frame at least between them."""
    room = frames - count * (length + 1)
    return np.sort(random.integers(0, room + 1, count)) + np.arange(count) * (length + 1)


def _bounce(random: np.random.Generator, frames: int, size: int, radius: int) -> NDArray[np.float64]:
    """``(n 2)`` the middle of something that goes straight and is thrown back by the walls."""
    span = max(size - 2 * radius, 1)
    start = random.uniform(0, 2 * span, 2)
    angle, speed = random.uniform(0, 2 * math.pi), random.uniform(0.03, 0.08) * size
    way = start + np.arange(frames)[:, None] * speed * np.array([math.cos(angle), math.sin(angle)])
    return radius + span - np.abs(way % (2 * span) - span)


def _stage(random: np.random.Generator, frames: int, size: int) -> NDArray[np.uint8]:
    """An empty, dark background."""
    return np.full((frames, size, size, 3), int(random.integers(20, 60)), dtype=np.uint8)


@functools.lru_cache
def _mesh(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps: NDArray[np.float64] = (np.arange(size) + 0.5).astype(np.float64)
    return steps[:, None], steps[None, :]


def draw_shape(
    picture: NDArray[np.uint8], shape: int, middle: NDArray[np.float64], radius: int, colour: NDArray[np.uint8]
) -> None:
    """Draw a disc (0), square, diamond or ring into ``(h w 3)``."""
    rows, columns = _mesh(len(picture))
    dy, dx = np.abs(rows - middle[0]), np.abs(columns - middle[1])
    if shape == 0:
        inside = dy**2 + dx**2 < radius**2
    elif shape == 1:
        inside = np.maximum(dy, dx) < radius * 0.85
    elif shape == 2:
        inside = dy + dx < radius * 1.2
    else:
        far = dy**2 + dx**2
        inside = (far < radius**2) & (far > (radius * 0.5) ** 2)
    picture[inside] = colour
