"""Things as layers: made, drawn over frames, and alone on white as references."""

from dataclasses import replace

import numpy as np

from vdot.data.sprites.figure import Figure
from vdot.data.sprites.scene import STILL, Thing
from vdot.data.sprites.sprite import Sprite, Track

Layer = Sprite | Figure
Slices = tuple[slice, ...]


def make_layer(thing: Thing, track: Track, unit: int) -> Layer:
    return (Figure if thing.shape == "person" else Sprite)(thing, track, unit)


def overlap(origin: np.ndarray, patch: tuple[int, ...], frame: tuple[int, ...]) -> tuple[Slices, Slices]:
    """Where a patch at ``origin`` (x, y) and a frame meet: slices of the frame and of the patch, both (rows, cols)."""
    inner, outer = [], []
    for start, length, total in zip(origin[::-1], patch, frame, strict=True):
        low, high = min(max(start, 0), total), max(min(start + length, total), 0)
        inner.append(slice(low, max(low, high)))
        outer.append(slice(low - start, max(low, high) - start))
    return tuple(inner), tuple(outer)


def paste(layer: Layer, frames: np.ndarray, coverage: np.ndarray | None = None) -> None:
    """Draw over ``frames [T, H, W, 3]`` in place, and write the alpha to ``coverage`` uint8 ``[T, H, W]``."""
    for t in range(len(frames)):
        here, there = overlap(layer.origin[t], layer.size, frames.shape[1:3])
        patch = layer.rgba[t][there]
        view = frames[t][here]
        through = 1 - patch[..., 3]
        for channel in range(3):  # three times quicker than broadcasting over an axis of three
            view[..., channel] *= through
            view[..., channel] += patch[..., channel]
        if coverage is not None:
            coverage[t][here] = patch[..., 3] * 255 + 0.5


def portrait(thing: Thing, size: int, angle: float = 0.0) -> np.ndarray:
    """The thing alone on white, large and upright (or turned): uint8 ``[size, size, 3]``, a reference picture."""
    fill = 0.46 if thing.shape == "person" else 0.4
    layer = make_layer(replace(thing, radius=fill, motion=STILL), Track.still(size, angle), size)
    canvas = np.full((1, size, size, 3), 255, np.float32)
    paste(layer, canvas)
    return np.rint(canvas[0]).astype(np.uint8)


def garment_picture(thing: Thing, size: int) -> np.ndarray:
    """What trying on takes from a thing, on white: a person's shirt, or a swatch of anything else's pattern."""
    return portrait(replace(thing, shape="shirt" if thing.shape == "person" else "square"), size)
