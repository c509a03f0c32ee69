"""Made-up videos with a sentence that says what is seen in them."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.video.synthetic import COLOURS, draw_shape
from seqlong.errors import ConfigError

SHAPES = ("disc", "square", "diamond", "ring")
COLOUR_NAMES = ("red", "green", "blue", "yellow", "purple")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


class Captioned(NamedTuple):
    """Pictures ``(n h w 3)`` uint8 and what is seen in them."""

    pixels: NDArray[np.uint8]
    text: str


@runtime_checkable
class CaptionGenerator(Protocol):
    """Makes clips with captions: a pure function of a random source, so that a sample's number names it.

    Attributes:
        captions: how many there are, all as likely.
    """

    captions: int

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Captioned:
        """A clip of ``frames`` pictures of ``size`` x ``size``, and its caption."""

    def describe(self) -> dict[str, object]:
        """What is filmed, for reports."""


class MovingShapes:
    """Shapes that cross the picture: ``a red disc moves left, a blue ring moves up``.

    No picture alone says which way they move. The order of the words is drawn, so that it says nothing.

    Args:
        shapes: 1 or 2; never two of one shape.
    """

    def __init__(self, shapes: int = 2) -> None:
        if shapes not in (1, 2):
            raise ConfigError(f"MovingShapes has 1 or 2 shapes, found {shapes}")
        self.shapes = shapes
        kinds = list(itertools.permutations(range(len(SHAPES)), shapes))
        self.captions = len(kinds) * (len(COLOUR_NAMES) * len(WAYS)) ** shapes
        self._kinds = kinds

    def clip(self, random: np.random.Generator, frames: int, size: int) -> Captioned:
        if frames < 2 or size < 12:
            raise ConfigError(f"MovingShapes needs 2 frames and 12 pixels, found {frames} and {size}")
        chosen = self._kinds[int(random.integers(len(self._kinds)))]
        pixels = np.full((frames, size, size, 3), int(random.integers(20, 60)), dtype=np.uint8)
        radius = size // 6
        words = []
        for kind in chosen:
            colour, way = int(random.integers(len(COLOUR_NAMES))), str(random.choice(list(WAYS)))
            far = random.uniform(0.5, 1.0) * (size - 2 * radius)  # how far it goes, seen all the way
            begin = random.uniform(radius, size - radius, 2)
            for axis, step in enumerate(WAYS[way]):
                if step:
                    low = radius + random.uniform(0, size - 2 * radius - far)
                    begin[axis] = low if step > 0 else low + far
            steps = np.arange(frames)[:, None] / (frames - 1) * far * np.array(WAYS[way])
            for number in range(frames):
                draw_shape(pixels[number], kind, begin + steps[number], radius, COLOURS[colour])
            words.append(f"a {COLOUR_NAMES[colour]} {SHAPES[kind]} moves {way}")
        return Captioned(pixels, ", ".join(words))

    def describe(self) -> dict[str, object]:
        one = "a shape" if self.shapes == 1 else "two shapes"
        bits = math.log2(self.captions)
        return {"task": f"{one} in colours, and which way they move", "captions": self.captions, "bits": bits}
