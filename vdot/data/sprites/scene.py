"""What is in a clip, as data: things, motions, background, camera; and the split into train and test.

Lengths are in *short sides* (the shorter side of the frame is 1), the origin is the frame's centre, x points right and
y down. Time ``u`` runs from 0 (first frame) to 1 (last frame). So a scene is the same at any size and frame count.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Split = Literal["train", "test"]
RGB = tuple[int, int, int]
FPS = 8.0
MAX_THINGS = 3

COLOURS: dict[str, RGB] = {
    "red": (222, 44, 40),
    "orange": (246, 136, 30),
    "yellow": (250, 212, 50),
    "green": (46, 160, 66),
    "cyan": (40, 200, 210),
    "blue": (40, 88, 222),
    "purple": (138, 62, 190),
    "pink": (246, 124, 180),
    "brown": (130, 80, 44),
    "black": (42, 42, 48),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERN_COLOURS: dict[str, RGB] = {"white": (250, 250, 250), "yellow": (250, 212, 50), "black": (36, 36, 40)}
PATTERNS = ("plain", "striped", "spotted", "checked")
SHAPES = tuple("ball square triangle star heart ring cross moon flower hexagon drop arrow house fish person".split())

SIZE_NAMES = ("small", "medium", "large")


@dataclass(frozen=True)
class View:
    """How near the camera is to the things: how large they appear, and how far they go in a clip."""

    sizes: dict[str, float]  # radius
    people: dict[str, float]  # half height
    counts: tuple[int, ...]  # of things in a scene, each entry as likely as the next
    room: dict[int, tuple[str, ...]]  # their sizes, by how many there are
    paths: float  # lengths of their paths, of those of the far view


_ANY = ("small", "medium", "medium", "large")
VIEWS: dict[str, View] = {
    "far": View(
        sizes={"small": 0.14, "medium": 0.19, "large": 0.25},
        people={"small": 0.196, "medium": 0.266, "large": 0.35},
        counts=(1, 1, 1, 1, 1, 2, 2, 2, 3, 3),
        room={1: _ANY, 2: _ANY, 3: ("small", "medium")},
        paths=1.0,
    ),
    "near": View(
        sizes={"small": 0.19, "medium": 0.26, "large": 0.34},
        people={"small": 0.26, "medium": 0.31, "large": 0.37},
        counts=(1, 1, 1, 1, 1, 1, 2, 2, 2, 3),
        room={1: _ANY, 2: ("small", "small", "medium"), 3: ("small",)},
        paths=0.72,
    ),
}
SHIPPED = "near"  # the view that the models of this repository know

BACKDROP_COLOURS: dict[str, RGB] = {
    "white": (244, 244, 242),
    "grey": (152, 154, 158),
    "pale blue": (178, 208, 238),
    "pale green": (186, 224, 182),
    "pale pink": (246, 206, 216),
    "pale yellow": (248, 238, 186),
    "pale purple": (212, 196, 234),
    "dark blue": (30, 42, 88),
    "dark green": (22, 70, 48),
    "dark red": (96, 26, 34),
}
PAINTED = ("plain", "gradient", "checked", "striped", "dotted")  # these take colours from BACKDROP_COLOURS
PICTURED = ("bricks", "wood", "hills", "sea", "desert", "mountains", "night", "forest")
BACKGROUNDS = PAINTED + PICTURED
# Colours of things and of their patterns that would be lost in front of a picture.
CAMOUFLAGE: dict[str, tuple[str, ...]] = {
    "bricks": ("red", "brown", "orange"),
    "wood": ("brown", "orange", "yellow"),
    "hills": ("green",),
    "sea": ("orange", "yellow", "purple"),
    "desert": ("orange", "yellow", "brown"),
    "mountains": ("cyan", "white"),
    "white": ("white",),
    "night": ("black", "blue", "purple"),
    "forest": ("green", "brown", "black"),
    "grey": (),
    "dark blue": ("black", "blue", "purple"),
    "dark green": ("black", "green", "brown"),
    "dark red": ("black", "red", "brown"),
    "pale yellow": ("yellow",),
    "pale pink": ("pink",),
    "pale blue": ("cyan",),
}

STEPS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TURNS = {"clockwise": 1.0, "counterclockwise": -1.0}  # y points down, so a growing angle turns clockwise
MOTIONS = ("slide", "bounce", "orbit", "spin", "grow", "shrink", "stay")
PERSON_MOTIONS = ("walk", "wave", "jump")
ALL_MOTIONS = MOTIONS + PERSON_MOTIONS
ROUND = ("ball", "ring")  # nobody sees them spin without a pattern
TEST_SHARE = 5  # one in so many combinations of colour, shape and motion is held out


@dataclass(frozen=True)
class Motion:
    """``travel`` is the path's length (slide, walk), height (bounce, jump) or radius (orbit); ``cycles`` counts
    bounces, steps, waves or turns; ``phase`` in radians is where an orbit begins."""

    kind: str
    direction: str = ""
    travel: float = 0.0
    cycles: float = 1.0
    phase: float = 0.0

    def path(self, u: np.ndarray) -> np.ndarray:
        """``u [n]`` -> ``[n, 4]``: offset x, y from the object's place, angle in radians, scale."""
        out = np.zeros((len(u), 4))
        out[:, 3] = 1
        if self.kind in ("slide", "walk"):
            out[:, :2] = np.outer((u - 0.5) * self.travel, STEPS[self.direction])
        elif self.kind in ("bounce", "jump"):
            out[:, 1] = self.travel * (0.5 - np.abs(np.sin(np.pi * self.cycles * u)))
            if self.direction:
                out[:, 0] = (u - 0.5) * 0.5 * STEPS[self.direction][0]
        elif self.kind == "orbit":
            angle = self.phase + TURNS[self.direction] * 2 * np.pi * self.cycles * u
            out[:, 0], out[:, 1] = self.travel * np.cos(angle), self.travel * np.sin(angle)
        elif self.kind == "spin":
            out[:, 2] = TURNS[self.direction] * 2 * np.pi * self.cycles * u
        elif self.kind in ("grow", "shrink"):
            out[:, 3] = 0.55 + 0.75 * (u if self.kind == "grow" else 1 - u)
        return out


STILL = Motion("stay")


@dataclass(frozen=True)
class Thing:
    """One sprite. ``rgb`` is the exact colour it is drawn in; ``depth`` in (0, 1), 1 is nearest and in front."""

    shape: str
    colour: str
    rgb: RGB
    pattern: str
    second: str  # the pattern's colour, "" for plain
    size: str
    radius: float
    x: float
    y: float
    angle: float
    depth: float
    motion: Motion

    @property
    def key(self) -> tuple[str, str, str]:
        """What the split is made by (:func:`split_of`)."""
        return (self.colour, self.shape, self.motion.kind)

    @property
    def half_extent(self) -> tuple[float, float]:
        """Half width and half height at scale 1; a person's raised arms included."""
        if self.shape != "person":
            return (self.radius, self.radius)
        raised = self.motion.kind in ("wave", "jump")
        return (self.radius * (0.7 if raised else 0.5), self.radius * (1.2 if raised else 1.0))

    def path(self, u: np.ndarray) -> np.ndarray:
        """``[n, 4]``: centre x, y in the world, angle, scale."""
        return self.motion.path(u) + np.array([self.x, self.y, self.angle, 0])


@dataclass(frozen=True)
class Background:
    kind: str
    first: str = ""  # colours of the painted kinds
    second: str = ""
    seed: int = 0  # of everything else: clouds, ridges, bricks


@dataclass(frozen=True)
class Scene:
    """Everything the renderer and the captions need, and all they may use. ``camera`` is "" or the pan's direction."""

    background: Background
    things: tuple[Thing, ...]
    camera: str = ""
    crossing: bool = False  # the first two pass each other, the first in front
    frames: int = 17
    height: int = 64
    width: int = 64
    split: str = "train"

    PAN = 0.25  # short sides over the clip: one pixel a frame at 64x64x17

    @property
    def keys(self) -> frozenset[tuple[str, str, str]]:
        return frozenset(thing.key for thing in self.things)

    @property
    def unit(self) -> int:
        """Pixels of the short side."""
        return min(self.height, self.width)

    @property
    def times(self) -> np.ndarray:
        """``u`` of every frame and of the one that would follow, ``[T + 1]``: the last frame has a flow, too."""
        return np.arange(self.frames + 1) / (self.frames - 1 or 16)

    def pan(self, u: np.ndarray) -> np.ndarray:
        """Where the camera looks, ``[n, 2]``."""
        return np.outer(u - 0.5, STEPS[self.camera]) * self.PAN if self.camera else np.zeros((len(u), 2))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Scene":
        things = (
            Thing(**{**thing, "rgb": tuple(thing["rgb"]), "motion": Motion(**thing["motion"])})
            for thing in values["things"]
        )
        return cls(**{**values, "background": Background(**values["background"]), "things": tuple(things)})


def split_of(colour: str, shape: str, kind: str) -> Split:
    """Of a combination of colour, shape and motion, for good.

    A Latin square: of the ten colours of every shape in every motion two are held out, of every colour in every motion
    three shapes. So whatever is asked for, there is something to draw in either split.
    """
    place = COLOUR_NAMES.index(colour) + 2 * SHAPES.index(shape) + 3 * ALL_MOTIONS.index(kind)
    return "test" if place % TEST_SHARE == 0 else "train"
