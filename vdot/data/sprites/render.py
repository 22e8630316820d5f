"""A scene as pixels, and everything that is known about them: depth, flow, masks, boxes, outlines, pose, cut-outs."""

from functools import cached_property

import cv2
import numpy as np

from vdot.data.sprites.backgrounds import paint_background
from vdot.data.sprites.figure import LIMBS, Figure
from vdot.data.sprites.layers import Layer, make_layer, overlap, paste
from vdot.data.sprites.scene import SHAPES, Scene
from vdot.data.sprites.sprite import Track

HALF = 128  # of 255: a pixel belongs to a thing that covers half of it
FULL_FLOW = 0.05  # short sides a frame that get the fullest colour


def render(scene: Scene) -> "Clip":
    return Clip(scene)


class Clip:
    """Frames of a scene, and its annotations, each computed when first asked for.

    Every picture is uint8 ``[T, H, W, 3]``, exact up to the pixel: it comes from the scene, not from the frames.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.layers: list[Layer] = [make_layer(thing, Track.of(thing, scene), scene.unit) for thing in scene.things]
        shape = (scene.frames, scene.height, scene.width)
        self._view = scene.pan(scene.times) * scene.unit  # [T + 1, 2] pixels
        self._margin = int(np.ceil(np.abs(self._view[:-1]).max())) + 1 if scene.camera else 0
        rows, cols = scene.height + 2 * self._margin, scene.width + 2 * self._margin
        picture, self._background_depth = paint_background(scene.background, rows, cols, scene.unit)
        frames = self._through_camera(picture)
        self.coverage = np.zeros((len(scene.things), *shape), np.uint8)  # of each thing as if it were alone
        for i in self._far_to_near():
            paste(self.layers[i], frames, self.coverage[i])
        self.frames: np.ndarray = np.rint(frames).astype(np.uint8)

    def _far_to_near(self) -> list[int]:
        return sorted(range(len(self.scene.things)), key=lambda i: self.scene.things[i].depth)

    def _through_camera(self, still: np.ndarray) -> np.ndarray:
        """What a still behind everything looks like in each frame: ``[H', W', ...]`` -> ``[T, H, W, ...]``."""
        scene, margin = self.scene, self._margin
        if not scene.camera:
            return np.repeat(still[None], scene.frames, 0)
        size = (scene.width, scene.height)
        shifts = [np.array([[1, 0, x + margin], [0, 1, y + margin]], np.float32) for x, y in self._view[:-1]]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return np.stack([cv2.warpAffine(still, shift, size, flags=flags) for shift in shifts])

    @cached_property
    def masks(self) -> np.ndarray:
        """The thing that is seen at each pixel, uint8 ``[T, H, W]``: its number counted from 1, or 0 for background."""
        out = np.zeros(self.frames.shape[:3], np.uint8)
        for i in self._far_to_near():
            out[self.coverage[i] >= HALF] = i + 1
        return out

    @cached_property
    def boxes(self) -> np.ndarray:
        """``[T, N, 4]`` int: left, top, right, bottom of each thing, hidden parts included, the last two exclusive.

        Zeros where it is out of the frame.
        """
        covered = self.coverage >= HALF
        count, frames, height, width = self.coverage.shape
        out = np.zeros((frames, count, 4), np.int64)
        columns, rows = np.any(covered, 2), np.any(covered, 3)
        seen = np.any(columns, -1)
        for k, line in ((0, columns), (1, rows)):
            length = (width, height)[k]
            out[..., k] = np.where(seen, line.argmax(-1), 0).T
            out[..., k + 2] = np.where(seen, length - line[..., ::-1].argmax(-1), 0).T
        return out

    @cached_property
    def depth(self) -> np.ndarray:
        """Near is bright."""
        out = self._through_camera(self._background_depth)
        for i in self._far_to_near():
            layer, near = self.layers[i], self.scene.things[i].depth
            for t in range(len(out)):
                here, there = overlap(layer.origin[t], layer.size, out.shape[1:])
                inside = self.coverage[i, t][here] >= HALF
                out[t][here][inside] = (near + 0.08 * layer.relief[t][there])[inside]
        return _grey(np.rint(np.clip(out, 0, 1) * 255).astype(np.uint8))

    @cached_property
    def flow(self) -> np.ndarray:
        """Pixels from each frame to the next (the last: to the one that would follow), float32 ``[T, H, W, 2]``."""
        out = np.empty((*self.frames.shape[:3], 2), np.float32)
        out[:] = (self._view[:-1] - self._view[1:])[:, None, None]
        for i in self._far_to_near():
            layer = self.layers[i]
            for t in range(len(out)):
                here, there = overlap(layer.origin[t], layer.size, out.shape[1:3])
                inside = self.coverage[i, t][here] >= HALF
                out[t][here][inside] = layer.flow(t)[there][inside]
        return out

    @cached_property
    def flow_picture(self) -> np.ndarray:
        """Hue is direction, white is still."""
        return draw_flow(self.flow, self.scene.unit)

    @cached_property
    def gray(self) -> np.ndarray:
        return _grey(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in self.frames]))

    @cached_property
    def scribble(self) -> np.ndarray:
        """Outlines of the things and the strong edges of what is behind them, white on black."""
        seen = self.masks
        edges = np.zeros(seen.shape, bool)
        edges[:, :, 1:] |= seen[:, :, 1:] != seen[:, :, :-1]
        edges[:, 1:] |= seen[:, 1:] != seen[:, :-1]
        picture = np.stack([cv2.Canny(frame, 130, 320) for frame in self.gray[..., 0]]) > 0
        lines = ((edges | picture) * 255).astype(np.uint8)
        thick = max(1, self.scene.unit // 200)
        if thick > 1:
            lines = np.stack([cv2.dilate(frame, np.ones((thick, thick), np.uint8)) for frame in lines])
        return _grey(lines)

    @cached_property
    def pose(self) -> np.ndarray:
        """People as limbs in a colour each, on black."""
        out = np.zeros_like(self.frames)
        wide = max(2, round(self.scene.unit / 60))
        for layer in self.layers:
            if isinstance(layer, Figure):
                for frame, points in zip(out, layer.joints[:-1], strict=True):
                    draw_pose(frame, points, wide)
        return out

    @cached_property
    def layout(self) -> np.ndarray:
        """Boxes on white, a colour per kind of thing."""
        out = np.full_like(self.frames, 255)
        wide = max(1, round(self.scene.unit / 60))
        for i in self._far_to_near():
            colour = _hue(SHAPES.index(self.scene.things[i].shape) / len(SHAPES), 0.8)
            for frame, (left, top, right, bottom) in zip(out, self.boxes[:, i].tolist(), strict=True):
                if right > left:
                    cv2.rectangle(frame, (left, top), (right - 1, bottom - 1), colour, wide)
        return out

    def garment(self, thing: int) -> np.ndarray:
        """Where trying on changes a thing, as if it were alone: bool ``[T, H, W]``."""
        layer = self.layers[thing]
        out = np.zeros(self.frames.shape[:3], bool)
        for t in range(len(out)):
            here, there = overlap(layer.origin[t], layer.size, out.shape[1:])
            out[t][here] = layer.garment[t][there] >= 0.5
        return out

    def cutout(self, thing: int, t: int = 0, margin: int = 2) -> np.ndarray:
        """The thing as it is in frame ``t``, hidden parts included, cut to its box, on white: uint8 ``[h, w, 3]``."""
        canvas = np.full((1, *self.layers[thing].size, 3), 255, np.float32)
        rgba = self.layers[thing].rgba[t]
        canvas = canvas[0] * (1 - rgba[..., 3:]) + rgba[..., :3]
        rows, cols = (np.flatnonzero((rgba[..., 3] >= 0.5).any(axis)) for axis in (1, 0))
        box = tuple(slice(max(int(line[0]) - margin, 0), int(line[-1]) + 1 + margin) for line in (rows, cols))
        return np.rint(canvas[box]).astype(np.uint8)


def draw_flow(flow: np.ndarray, unit: int) -> np.ndarray:
    """``[T, H, W, 2]`` pixels -> uint8 ``[T, H, W, 3]`` on the usual colour wheel, fullest at :data:`FULL_FLOW`."""
    frames, height, width, _ = flow.shape
    x, y = flow.reshape(frames * height, width, 2).transpose(2, 0, 1)
    length, angle = cv2.cartToPolar(np.ascontiguousarray(x), np.ascontiguousarray(y), angleInDegrees=True)
    full = np.clip(length * (255 / (FULL_FLOW * unit)), 0, 255)
    wheel = np.stack([angle / 2 % 180, full, np.full_like(full, 255)], -1)
    picture = cv2.cvtColor(np.rint(wheel).astype(np.uint8), cv2.COLOR_HSV2RGB)
    return picture.reshape(frames, height, width, 3)


def draw_pose(frame: np.ndarray, points: np.ndarray, wide: int) -> None:
    """Limbs of ``points [11, 2]`` in pixels onto one frame, to a sixteenth of a pixel."""
    fixed = np.rint((points - 0.5) * 16).astype(int).tolist()
    for i, (a, b) in enumerate(LIMBS):
        cv2.line(frame, fixed[a], fixed[b], _hue(i / len(LIMBS), 1.0), wide, cv2.LINE_AA, 4)
    cv2.circle(frame, fixed[0], wide * 16, _hue(0.0, 1.0), -1, cv2.LINE_AA, 4)


def _hue(turn: float, saturation: float) -> tuple[int, int, int]:
    pixel = np.array([[[int(180 * turn), int(255 * saturation), 235]]], np.uint8)
    red, green, blue = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture[..., None], 3, -1)
