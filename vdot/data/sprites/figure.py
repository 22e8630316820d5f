"""A person as a moving thing: capsules around the limbs of an articulated figure, shaded and dressed."""

import numpy as np

from vdot.data.sprites.scene import PATTERN_COLOURS, Motion, Thing
from vdot.data.sprites.shapes import brightness, pattern
from vdot.data.sprites.sprite import Track, pixel_grid

JOINTS = "head neck elbow_far hand_far elbow_near hand_near hip knee_far foot_far knee_near foot_near".split()
LIMBS = ((0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), (6, 7), (7, 8), (6, 9), (9, 10))
ARM, FOREARM, LEG, SPINE, NECK = 0.33, 0.31, 0.42, 0.62, 0.26  # lengths in half heights of the person
STANCE = 0.16  # angle of legs that stand
# From far to near: joints of the limb, its half width, what covers it.
PARTS = (
    (1, 2, 0.085, "shirt"), (2, 3, 0.07, "skin"), (6, 7, 0.11, "trousers"), (7, 8, 0.09, "trousers"),
    (6, 9, 0.11, "trousers"), (9, 10, 0.09, "trousers"), (1, 6, 0.19, "shirt"), (0, 0, 0.21, "skin"),
    (1, 4, 0.085, "shirt"), (4, 5, 0.07, "skin"),
)  # fmt: skip
HEAD = 7
CLOTH: dict[str, tuple[int, int, int]] = {"skin": (232, 184, 148), "trousers": (76, 84, 118), "hair": (84, 56, 36)}
SHIRT_SCALE = 2.75  # radii of a shirt's picture per half height of its wearer


class Figure:
    """A person out of capsules, with the same faces as :class:`Sprite`."""

    def __init__(self, thing: Thing, track: Track, unit: int) -> None:
        self._scale = thing.radius * unit
        self._thing = thing
        self.joints = joints(thing.motion, track.u) * self._scale + track.centre[:, None]  # [T + 1, 11, 2] pixels
        spread = (self.joints - track.centre[:, None])[:-1].reshape(-1, 2)
        margin = 0.24 * self._scale + 1  # the head is the widest part
        low, high = spread.min(0) - margin, spread.max(0) + margin
        self.origin = np.floor(track.centre[:-1] + low).astype(int)
        self.size = (int(np.ceil(high[1] - low[1])) + 1, int(np.ceil(high[0] - low[0])) + 1)
        count = len(track.u) - 1
        self.rgba = np.zeros((count, *self.size, 4), np.float32)
        self.part = np.full((count, *self.size), -1, np.int8)  # the nearest part that covers half of a pixel
        self.relief = np.zeros((count, *self.size), np.float32)
        self._garment = np.zeros((count, *self.size), np.float32)
        for i in range(len(PARTS)):
            self._draw(i)

    def _draw(self, index: int) -> None:
        """Paint one part over those behind it, in all frames at once."""
        start, end, width, cover = PARTS[index]
        a, b = ((self.joints[:-1, j] - self.origin).astype(np.float32) for j in (start, end))  # in the patch
        radius = np.float32(width * self._scale)
        low = np.minimum(a, b).min(0) - radius - 1
        high = np.maximum(a, b).max(0) + radius + 1
        box = (slice(None), *(slice(max(int(low[k]), 0), int(high[k]) + 1) for k in (1, 0)))
        rows, cols = (np.arange(self.size[k], dtype=np.float32)[box[k + 1]] + 0.5 for k in (0, 1))
        x, y = cols - a[:, 0, None, None], rows[:, None] - a[:, 1, None, None]  # [T, 1, w], [T, h, 1]
        axis = b - a if start != end else np.tile(np.array([0, 1e-3], np.float32), (len(a), 1))
        ex, ey = axis[:, 0, None, None], axis[:, 1, None, None]
        along = np.clip((x * ex + y * ey) / (ex * ex + ey * ey), 0, 1)
        dx, dy = (x - along * ex) / radius, (y - along * ey) / radius
        square = dx * dx + dy * dy
        alpha = np.clip(0.5 + (1 - np.sqrt(square)) * radius, 0, 1)
        up = np.sqrt(np.clip(1 - square, 0.05, 1))
        bright = brightness(dx, dy, up)
        colour = self._cover(index, cover, x, y, axis)
        rgba, through = self.rgba[box], 1 - alpha
        for channel in range(3):
            rgba[..., channel] *= through
            rgba[..., channel] += np.minimum(colour[..., channel] * bright, 255) * alpha
        rgba[..., 3] *= through
        rgba[..., 3] += alpha
        self.relief[box] += (up - self.relief[box]) * alpha
        self._garment[box] = self._garment[box] * through + (alpha if cover == "shirt" else 0)
        self.part[box][alpha >= 0.5] = index

    def _cover(self, index: int, cover: str, x: np.ndarray, y: np.ndarray, axis: np.ndarray) -> np.ndarray:
        """Colour ``[T, h, w, 3]`` or ``[3]`` of a part; ``x, y`` in pixels from where it begins."""
        thing = self._thing
        if cover != "shirt":
            colour = np.array(CLOTH[cover], np.float32)
            if index != HEAD:
                return colour
            hair = np.clip(0.5 - (y + 0.06 * self._scale), 0, 1)[..., None]
            return colour + hair * (np.array(CLOTH["hair"], np.float32) - colour)
        base = np.array(thing.rgb, np.float32)
        if not thing.second:
            return base
        length = np.hypot(axis[:, 0], axis[:, 1])
        cos, sin = (axis[:, i, None, None] / length[:, None, None] for i in (1, 0))
        to_radii = np.float32(SHIRT_SCALE / self._scale)
        across, down = (x * cos - y * sin) * to_radii, (x * sin + y * cos) * to_radii
        share = pattern(thing.pattern, across, down, float(to_radii))[..., None]
        return base + share * (np.array(PATTERN_COLOURS[thing.second], np.float32) - base)

    @property
    def garment(self) -> np.ndarray:
        """The shirt's coverage, ``[T, h, w]``."""
        return self._garment

    def flow(self, t: int) -> np.ndarray:
        """``[h, w, 2]``: a point stays where it is on its limb."""
        out = np.zeros((*self.size, 2))
        grid = pixel_grid(self.origin[t], self.size)
        for index, (start, end, _, _) in enumerate(PARTS):
            here = self.part[t] == index
            a, b = self.joints[t, start], self.joints[t + 1, start]
            way, next_way = self.joints[t, end] - a, self.joints[t + 1, end] - b
            turn = np.arctan2(next_way[1], next_way[0]) - np.arctan2(way[1], way[0]) if start != end else 0.0
            cos, sin = np.cos(turn), np.sin(turn)
            offset = grid[here] - a
            out[here] = offset @ np.array([[cos, sin], [-sin, cos]]) + b - grid[here]
        return out


def joints(motion: Motion, u: np.ndarray) -> np.ndarray:
    """Eleven points (:data:`JOINTS`) of a person of half height 1 around its centre, ``[n, 11, 2]``."""
    neck = np.stack([0 * u, 0 * u - 0.54], -1)
    hip = neck + np.array([0, SPINE])
    arms, legs = [], []
    for upper_arm, forearm, thigh, shin in _angles(motion, u):
        elbow, knee = neck + _rod(upper_arm, ARM), hip + _rod(thigh, LEG)
        arms += [elbow, elbow + _rod(forearm, FOREARM)]
        legs += [knee, knee + _rod(shin, LEG)]
    return np.stack([neck - np.array([0, NECK]), neck, *arms, hip, *legs], 1)


def _angles(motion: Motion, u: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of upper arm, forearm, thigh and shin from straight down, positive to the right, ``[n]``; far side, near side."""
    turn = 2 * np.pi * motion.cycles * u
    if motion.kind == "walk":
        way = 1.0 if motion.direction == "right" else -1.0
        return _stride(way, turn + np.pi), _stride(way, turn)
    near = [0.62 + 0 * u, 0.25 + 0 * u, STANCE + 0 * u, STANCE + 0 * u]
    far = [-angle for angle in near]
    if motion.kind == "wave":
        near[:2] = [2.0 + 0 * u, np.pi - 0.1 + 0.65 * np.sin(turn)]
    elif motion.kind == "jump":
        lift = np.abs(np.sin(turn / 2))
        near = [0.62 + 1.7 * lift, 0.25 + 2.1 * lift, STANCE + 0.25 * lift, STANCE - 0.1 * lift]
        far = [-angle for angle in near]
    return far, near


def _stride(way: float, turn: np.ndarray) -> list[np.ndarray]:
    """One side of a walk: the arm swings against the leg, and the knee bends while the leg comes forward."""
    swing, forward = np.sin(turn), (1 - np.cos(turn)) / 2
    return [way * 0.7 * swing, way * (0.5 + 0.7 * swing), -way * 0.55 * swing, -way * (0.55 * swing + 0.45 * forward)]


def _rod(angle: np.ndarray, length: float) -> np.ndarray:
    return np.stack([np.sin(angle), np.cos(angle)], -1) * length
