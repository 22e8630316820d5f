"""How a thing moves, from where its mask was found: which of the world's motions fits the track best.

The caption fixes kind and direction of a motion, not its length, phase or place; those are free within the range that
the world draws them from.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from vdot.data.sprites.scene import TURNS, Motion

ANGLES = 120  # of the polar picture: three degrees each
FASTEST = 11  # of these a frame, either way, that a thing may turn: spins of the world make 13 to 20 degrees
# How far a good track may lie from its motion, one standard deviation: short sides, log of the scale, turns.
PLACE, SCALE, TURN = 0.04, 0.15, 0.15
LIMBS = 0.05  # of the outline: more than this changes when an arm moves
PHASES = 24


@dataclass(frozen=True)
class Trail:
    """What was seen of a thing in the frames at times ``u [n]`` (0..1).

    ``place [n, 2]`` centroid in short sides with the camera's motion taken out, ``scale [n]`` square root of the area
    relative to its mean, ``turn [n]`` turns since the first, ``limbs`` how much the outline changes (0 rigid).
    """

    u: np.ndarray
    place: np.ndarray
    scale: np.ndarray
    turn: np.ndarray
    limbs: float


@dataclass(frozen=True)
class Fit:
    """A motion against a trail. ``error`` is the distance of the places from the best path of that motion, root mean
    square in short sides; ``misfit`` adds scale, rotation and limbs, in squared standard deviations."""

    motion: tuple[str, str]
    error: float
    misfit: float


def hypotheses(person: bool) -> list[tuple[str, str]]:
    """Kind and direction of every motion that a caption can ask of a person, or of another thing."""
    sides = ("left", "right")
    if person:
        return [*(("walk", side) for side in sides), ("jump", ""), ("wave", ""), ("stay", "")]
    steps = (*sides, "up", "down")
    return [
        *(("slide", step) for step in steps), *(("bounce", side) for side in ("", *sides)),
        *(("orbit", way) for way in TURNS), *(("spin", way) for way in TURNS),
        ("grow", ""), ("shrink", ""), ("stay", ""),
    ]  # fmt: skip


# Amplitudes that are still that motion, in the motion's own unit; the world's ranges and half as much again.
RANGES = {
    "slide": (0.25, 0.9), "walk": (0.25, 0.9), "bounce": (0.16, 0.6), "jump": (0.1, 0.4), "orbit": (0.08, 0.32),
}  # fmt: skip
SPINS = (0.35, 1.2)  # turns over the clip


def fit(trail: Trail, kind: str, direction: str, person: bool) -> Fit:
    """The best path of this kind and direction, its free amplitude and phase fitted by least squares."""
    error = _place_error(trail, kind, direction)
    misfit = (error / PLACE) ** 2
    if person:  # a raised arm changes area and turns nothing
        return Fit((kind, direction), error, misfit + _limbs_misfit(trail.limbs, kind))
    expected = np.log(Motion(kind, direction).path(trail.u)[:, 3])  # 0 but for what grows or shrinks
    seen = np.log(trail.scale)
    misfit += float(np.var(seen - expected)) / SCALE**2
    rate = float(np.polyfit(trail.u, trail.turn, 1)[0])
    wanted = TURNS[direction] * float(np.clip(rate * TURNS[direction], *SPINS)) if kind == "spin" else 0.0
    return Fit((kind, direction), error, misfit + ((rate - wanted) / TURN) ** 2)


def _limbs_misfit(limbs: float, kind: str) -> float:
    """A wave moves an arm and nothing else; whoever only stands moves none."""
    if kind not in ("wave", "stay"):
        return 0.0
    return 4.0 if (limbs > LIMBS) == (kind == "stay") else 0.0


def _place_error(trail: Trail, kind: str, direction: str) -> float:
    """Root mean square distance from the best path: of every phase, with the amplitude that fits best in its range."""
    phases = np.arange(PHASES) * 2 * np.pi / PHASES if kind == "orbit" else np.zeros(1)
    cycles = 1.0 if kind == "orbit" else 2.0
    still = Motion(kind, direction, 0.0, cycles).path(trail.u)[:, :2]  # what does not depend on the amplitude
    paths = np.stack([Motion(kind, direction, 1.0, cycles, phase).path(trail.u)[:, :2] for phase in phases]) - still
    left = trail.place - still
    left, paths = left - left.mean(0), paths - paths.mean(1, keepdims=True)
    power = (paths**2).sum((1, 2))
    if kind in RANGES:
        best = np.clip((paths * left).sum((1, 2)) / np.maximum(power, 1e-9), *RANGES[kind])
        paths = paths * best[:, None, None]
    return float(np.sqrt(((left - paths) ** 2).sum(2).mean(1).min()))


def turns(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """How far what is inside bool ``masks [n, H, W]`` of ``frames [n, H, W, 3]`` has turned since the first, ``[n]``.

    In turns, clockwise positive, from consecutive pictures in polar coordinates. A thing that looks the same in every
    direction does not turn; neither does one without a pattern whose light stays put.
    """
    polar = np.stack([_polar(frame, mask) for frame, mask in zip(frames, masks, strict=True)])
    waves = np.fft.rfft(polar, axis=1)
    likeness = np.fft.irfft(
        (waves[:-1].conj() * waves[1:]).sum((2, 3)), ANGLES, axis=1
    )  # [n - 1, ANGLES], of each step
    likeness = np.roll(likeness, FASTEST, 1)[:, : 2 * FASTEST + 1]
    return np.cumsum([0.0, *((_peak(line) - FASTEST) / ANGLES for line in likeness)])


def _peak(line: np.ndarray) -> float:
    """Where a line is highest, between its points: the top of a parabola through the three around the maximum."""
    best = int(line.argmax())
    if not 0 < best < len(line) - 1:
        return float(best)
    before, here, after = line[best - 1 : best + 2]
    bend = before - 2 * here + after
    return best + (float(0.5 * (before - after) / bend) if bend < 0 else 0.0)


def _polar(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The masked thing around its centroid, ``[ANGLES, radii, 4]``: colours less their mean, and the mask."""
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    area = max(moments["m00"], 1.0)
    centre = (moments["m10"] / area, moments["m01"] / area)
    inside = mask[..., None].astype(np.float32)
    mean = (frame * inside).sum((0, 1)) / area
    picture = np.dstack([(frame - mean) * inside / 64, 2 * inside]).astype(np.float32)
    reach = 1.6 * np.sqrt(area / np.pi)
    radii = 16
    out = cv2.warpPolar(picture, (radii, ANGLES), centre, reach, cv2.INTER_LINEAR | cv2.WARP_FILL_OUTLIERS)
    out = out - out.mean(0, keepdims=True)
    return out * np.sqrt(np.arange(radii) + 0.5)[:, None]  # outer rings are longer
