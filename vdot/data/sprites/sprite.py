"""A moving thing as patches of pixels: a baked sprite that is turned and scaled.

A layer knows, for every frame, where its patch lies, its premultiplied colours, its relief and where each of its
pixels goes next. Pixel (i, j) covers [i, i + 1) x [j, j + 1): its centre is half a pixel further.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from vdot.data.sprites.scene import PATTERN_COLOURS, Scene, Thing
from vdot.data.sprites.shapes import REACH, form, lit, pattern

OVERSAMPLING = 1.5  # texels of a baked sprite per pixel of the picture


@dataclass(frozen=True)
class Track:
    """Where a thing is on the screen: ``centre [T + 1, 2]`` in pixels, ``angle`` and ``scale [T + 1]``, time ``u``."""

    centre: np.ndarray
    angle: np.ndarray
    scale: np.ndarray
    u: np.ndarray

    @classmethod
    def of(cls, thing: Thing, scene: Scene) -> "Track":
        u = scene.times
        path = thing.path(u)
        centre = (path[:, :2] - scene.pan(u)) * scene.unit + (scene.width / 2, scene.height / 2)
        return cls(centre, path[:, 2], path[:, 3], u)

    @classmethod
    def still(cls, size: int, angle: float = 0.0) -> "Track":
        """In the middle of a square picture, for one frame."""
        return cls(np.full((2, 2), size / 2), np.full(2, angle), np.ones(2), np.zeros(2))


class Sprite:
    """A rigid thing. ``origin [T, 2]`` is the patch's corner (x, y); ``rgba [T, h, w, 4]`` colours 0..255 times alpha,
    and alpha 0..1."""

    def __init__(self, thing: Thing, track: Track, unit: int) -> None:
        self.radius = thing.radius * unit
        n = 8 * int(np.ceil(2 * REACH * self.radius * OVERSAMPLING / 8))
        self._form = form(thing.shape, n, OVERSAMPLING)
        self._track = track
        count = len(track.u) - 1
        corner = np.abs(np.cos(track.angle)) + np.abs(np.sin(track.angle))  # of the turned square canvas
        reach = REACH * self.radius * float((track.scale * corner).max())
        side = int(np.ceil(2 * reach)) + 1
        self.origin = np.floor(track.centre[:-1] - reach).astype(int)
        self.size = (side, side)
        self.rgba = np.empty((count, side, side, 4), np.float32)
        albedo = self._albedo(thing)
        turns = track.angle.min() != track.angle.max()
        for t in range(count):
            if t == 0 or turns:
                shaded = self._shade(albedo, float(track.angle[t]))
            self._warp(shaded, t, self.rgba[t])

    def _albedo(self, thing: Thing) -> np.ndarray:
        base = np.array(thing.rgb, np.float32)
        colour = np.broadcast_to(base, (*self._form.x.shape, 3))
        if thing.second:
            texel = 2 * REACH / len(self._form.x) * OVERSAMPLING
            share = pattern(thing.pattern, self._form.x, self._form.y, texel)[..., None]
            colour = colour + share * (np.array(PATTERN_COLOURS[thing.second], np.float32) - colour)
        return colour

    def _shade(self, albedo: np.ndarray, angle: float) -> np.ndarray:
        factor, gloss = lit(self._form.normal, angle)
        colour = np.clip(albedo * factor[..., None] + 255 * gloss[..., None], 0, 255)
        return np.dstack([colour * self._form.coverage[..., None], self._form.coverage]).astype(np.float32)

    def _linear(self, t: int) -> np.ndarray:
        """Of radii to pixels, ``[2, 2]``."""
        angle, scale = self._track.angle[t], self._track.scale[t] * self.radius
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        return np.array([[cos, -sin], [sin, cos]])

    def _warp(self, texels: np.ndarray, t: int, out: np.ndarray) -> None:
        texel = 2 * REACH / len(texels)
        linear = self._linear(t)
        # Texel k lies at (k + 1/2) texel - REACH radii; pixel i of the patch at origin + i + 1/2.
        shift = self._track.centre[t] - self.origin[t] - 0.5 + linear @ np.full(2, texel / 2 - REACH)
        matrix = np.column_stack([linear * texel, shift])
        cv2.warpAffine(texels, matrix, (out.shape[1], out.shape[0]), dst=out, flags=cv2.INTER_LINEAR)

    @cached_property
    def relief(self) -> np.ndarray:
        """``[T, h, w]`` in 0..1, how far a point stands out towards the viewer."""
        out = np.empty(self.rgba.shape[:3], np.float32)
        for t in range(len(out)):
            self._warp(self._form.height, t, out[t])
        return out

    @property
    def garment(self) -> np.ndarray:
        """``[T, h, w]``: the coverage of what trying on replaces, here everything."""
        return self.rgba[..., 3]

    def flow(self, t: int) -> np.ndarray:
        """``[h, w, 2]`` pixels from frame t to t + 1."""
        turn = self._linear(t + 1) @ np.linalg.inv(self._linear(t)) - np.eye(2)
        here = pixel_grid(self.origin[t], self.size) - self._track.centre[t]
        return here @ turn.T + (self._track.centre[t + 1] - self._track.centre[t])


def pixel_grid(origin: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centres of a patch's pixels in the frame, ``[h, w, 2]``."""
    rows, cols = np.mgrid[: size[0], : size[1]] + 0.5
    return np.stack([cols + origin[0], rows + origin[1]], -1)
