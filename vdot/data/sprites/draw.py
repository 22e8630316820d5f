"""Scenes from seeds: what is in them, how it moves, and where it has room to."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from vdot.data.sprites.scene import (
    ALL_MOTIONS,
    BACKDROP_COLOURS,
    BACKGROUNDS,
    CAMOUFLAGE,
    COLOURS,
    MAX_THINGS,
    PAINTED,
    PATTERN_COLOURS,
    PATTERNS,
    PERSON_MOTIONS,
    ROUND,
    SHAPES,
    STEPS,
    STILL,
    TURNS,
    VIEWS,
    Background,
    Motion,
    Scene,
    Split,
    Thing,
    View,
    split_of,
)  # fmt: skip
from vdot.errors import InputError

T = TypeVar("T")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def check_canvas(frames: int, height: int, width: int) -> None:
    """``InputError`` unless the sizes are the model's: sides in multiples of 16, 4k + 1 frames."""
    if frames < 1 or frames % 4 != 1:
        raise InputError(f"a clip needs 4k + 1 frames, got {frames}")
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise InputError(f"height and width must be multiples of 16, got {height}x{width}")


def draw_scene(
    seed: int,
    split: Split = "train",
    *,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    things: int | None = None,
    person: bool = False,
    view: str = "far",
) -> Scene:
    """The scene of a seed: one to three things (or as many as asked), one of them a person if ``person``.

    ``view``: how large they appear, "far" or "near" (``VIEWS``).

    Every thing's combination of colour, shape and motion belongs to ``split``, so nothing in a test scene has been
    seen moving like that in training, while each colour, shape and motion has.

    Raises:
        InputError: a size, a count, a view or a split that does not exist.
    """
    check_canvas(frames, height, width)
    if split not in ("train", "test"):
        raise InputError(f'split must be "train" or "test", got {split!r}')
    if things is not None and not 1 <= things <= MAX_THINGS:
        raise InputError(f"a scene has one to {MAX_THINGS} things, got {things}")
    if view not in VIEWS:
        raise InputError(f"a scene has no view {view!r}: use one of {', '.join(VIEWS)}")
    seen = VIEWS[view]
    rng = np.random.default_rng([seed, split == "test"])
    count = things or pick(rng, seen.counts)
    background = draw_background(rng)
    crossing = count > 1 and rng.random() < 0.3
    half = (width / (2 * min(height, width)), height / (2 * min(height, width)))
    drawn: list[Thing] = []
    for i in range(count):
        # Something must move: only company may stay.
        kinds: Sequence[str] = ALL_MOTIONS if i else [kind for kind in ALL_MOTIONS if kind != "stay"]
        if crossing and i < 2:
            kinds = ("slide", "walk")
        shapes = ("person",) if person and i == 0 else SHAPES
        options: dict[str, Any] = {"shapes": shapes, "kinds": kinds, "crowd": count, "view": seen}
        drawn.append(draw_thing(rng, split, background, drawn, half, **options))
    if crossing:
        drawn[:2] = _cross(rng, drawn[0], drawn[1], half, seen.paths)
    camera = _draw_camera(rng, drawn)
    scene = Scene(background, tuple(drawn), camera, crossing, frames, height, width, split)
    return _place(rng, scene, half)


def scenes(start: int, count: int, split: Split = "train", **options: Any) -> Iterator[Scene]:
    """Scenes of the seeds from ``start`` on; options as in :func:`draw_scene`."""
    return (draw_scene(seed, split, **options) for seed in range(start, start + count))


def draw_background(rng: np.random.Generator) -> Background:
    kind = pick(rng, BACKGROUNDS)
    first = pick(rng, tuple(BACKDROP_COLOURS))
    # A pattern of light and dark would draw more attention than the things before it.
    dark = kind != "gradient" and first.startswith("dark")
    second = pick(
        rng, [c for c in BACKDROP_COLOURS if c != first and (kind == "gradient" or c.startswith("dark") == dark)]
    )
    seed = int(rng.integers(2**31))
    if kind not in PAINTED:
        return Background(kind, seed=seed)
    return Background(kind, first, "" if kind == "plain" else second, seed)


def hidden_colours(background: Background) -> set[str]:
    """Colours of things that would not stand out."""
    return {c for name in (background.kind, background.first, background.second) for c in CAMOUFLAGE.get(name, ())}


def draw_thing(
    rng: np.random.Generator,
    split: str,
    background: Background,
    others: Sequence[Thing],
    half: tuple[float, float],
    *,
    shapes: Sequence[str] = SHAPES,
    kinds: Sequence[str] = ALL_MOTIONS,
    avoid: str = "",
    crowd: int = 1,
    view: View = VIEWS["far"],
) -> Thing:
    """A thing at the centre, of some of ``shapes`` with some of ``kinds`` of motion, and not of the colour ``avoid``,
    as one of ``crowd``.

    It differs from the others in shape and colour, and stands out from the background, as far as the split allows.
    """
    hidden = hidden_colours(background)
    taken = {other.colour for other in others} | {avoid}
    free = [shape for shape in shapes if shape not in {other.shape for other in others}] or shapes
    for banned in (hidden | taken, taken, {avoid}):
        found = _combination(rng, split, free, kinds, banned)
        if found:
            break
    else:
        raise InputError(f"no {split} scene has {'/'.join(free)} with {'/'.join(kinds)}")
    shape, kind, colour = found
    seconds = [c for c in PATTERN_COLOURS if c != colour and c not in hidden]
    plain = rng.random() < 0.4 and not (kind == "spin" and shape in ROUND)
    pattern, second = ("plain", "") if plain else (pick(rng, PATTERNS[1:]), pick(rng, seconds or ["white"]))
    size = pick(rng, view.room[crowd])
    radius = float((view.people if shape == "person" else view.sizes)[size] * rng.uniform(0.94, 1.06))
    red, green, blue = (int(v) for v in np.clip(COLOURS[colour] + rng.integers(-10, 11, 3), 0, 255))
    angle = 0.0 if shape == "person" else float(rng.uniform(-0.2, 0.2))
    depth = float(0.4 + 0.5 * (len(others) + rng.random() * 0.5) / MAX_THINGS)
    thing = Thing(shape, colour, (red, green, blue), pattern, second, size, radius, 0.0, 0.0, angle, depth, STILL)
    return replace(thing, motion=_draw_motion(rng, kind, thing.half_extent, half, view.paths))


def _combination(
    rng: np.random.Generator, split: str, shapes: Sequence[str], kinds: Sequence[str], banned: set[str]
) -> tuple[str, str, str] | None:
    """A shape, then a motion that it can do, then a colour, each as likely as the next; of the split."""
    for shape in rng.permutation(shapes).tolist():
        able = [kind for kind in kinds if (kind in PERSON_MOTIONS) == (shape == "person")]
        for kind in rng.permutation(able).tolist():
            colours = [c for c in COLOURS if c not in banned and split_of(c, shape, kind) == split]
            if colours:
                return shape, kind, pick(rng, colours)
    return None


def _draw_motion(
    rng: np.random.Generator, kind: str, extent: tuple[float, float], half: tuple[float, float], paths: float
) -> Motion:
    room = [max(0.2, 2 * (h - e)) for h, e in zip(half, extent, strict=True)]

    def length(low: float, high: float) -> float:
        return paths * float(rng.uniform(low, high))

    if kind in ("slide", "walk"):
        direction = pick(rng, tuple(STEPS) if kind == "slide" else ("left", "right"))
        axis = 0 if direction in ("left", "right") else 1
        travel = min(length(0.48, 0.68), room[axis])
        return Motion(kind, direction, travel, cycles=2)
    if kind == "bounce":
        sideways = ("", "left", "right") if room[0] > 0.4 else ("",)
        return Motion(kind, pick(rng, sideways), min(length(0.3, 0.45), room[1]), cycles=2)
    if kind == "jump":
        return Motion(kind, "", min(length(0.18, 0.26), room[1]), cycles=2)
    turn = pick(rng, tuple(TURNS))
    if kind == "orbit":
        travel = min(length(0.16, 0.24), min(room) / 2)
        return Motion(kind, turn, travel, 1.0, float(rng.uniform(0, 2 * np.pi)))
    if kind == "spin":
        return Motion(kind, turn, cycles=float(rng.uniform(0.6, 0.9)))
    return Motion(kind, cycles=2)


def _draw_camera(rng: np.random.Generator, things: Sequence[Thing]) -> str:
    """A pan along with a moving thing would hide its motion on the screen, so those directions are left out."""
    if rng.random() > 0.25:
        return ""
    taken = {thing.motion.direction for thing in things}
    free = [direction for direction in STEPS if direction not in taken]
    return pick(rng, free) if free else ""


def _cross(rng: np.random.Generator, front: Thing, back: Thing, half: tuple[float, float], paths: float) -> list[Thing]:
    """Both along the same row, towards each other, the first in front."""
    ways = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    crossed = []
    for thing, way, depth in ((front, ways[0], 0.9), (back, ways[1], 0.55)):
        travel = min(0.64 * paths, max(0.4, 2 * (half[0] - thing.half_extent[0])))
        crossed.append(replace(thing, depth=depth, motion=Motion(thing.motion.kind, way, travel, cycles=2)))
    return crossed


def _place(rng: np.random.Generator, scene: Scene, half: tuple[float, float]) -> Scene:
    """Places where each stays in the frame for the whole clip and out of the others' way, as far as there is room."""
    u = np.linspace(0, 1, 9)
    pan = scene.pan(u)
    placed: list[Thing] = []
    paths: list[np.ndarray] = []
    for i, thing in enumerate(scene.things):
        path = thing.path(u)[:, :2] - pan
        reach = np.outer(thing.path(u)[:, 3], thing.half_extent)
        low, high = (reach - path).max(0) - half, np.array(half) - (path + reach).max(0)
        middle = (low + high) / 2
        low, high = np.minimum(low, middle), np.maximum(high, middle)
        places = rng.uniform(low, high, (12, 2))
        if scene.crossing and i < 2:
            places[:, 0] = 0
        if scene.crossing and i == 1:
            places[:, 1] = placed[0].y
        clear = np.zeros(len(places))
        for other, other_path in zip(placed, paths, strict=True):
            distance = np.hypot(*np.moveaxis(places[:, None] + path - other_path, -1, 0)).min(1)
            clear = np.minimum(clear, distance - thing.radius - other.radius)
        x, y = places[int(clear.argmax())]
        placed.append(replace(thing, x=float(x), y=float(y)))
        paths.append(path + places[int(clear.argmax())])
    return replace(scene, things=tuple(placed))
