"""People as keypoints, and as DWPose draws them: the pictures that VACE's models learned poses from.

Order of the body's points (OpenPose's 18): nose, neck, right shoulder, elbow and wrist, left ones, right hip, knee and
ankle, left ones, right eye, left eye, right ear, left ear. Of a hand: wrist, then four of each finger, thumb first. Of
the face: the 68 of iBUG.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

SEEN = 0.3  # confidence from which a point is drawn
CANVAS = 1024  # short side of the canvas on which the widths below hold; it is scaled to the frame
WIDE, DOT, FACE_DOT, HAND_LINE = 4, 4, 3, 2  # pixels: half a limb, radii of points, a finger
DIM = 0.6  # of a limb's colour, so that the points stand out
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
FINGERS = tuple(
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1) for finger in range(5) for joint in range(4)
)
# The hues of a rainbow in steps of 20 degrees: limb i and point i have colour i.
COLOURS = tuple(tuple(round(255 * value) for value in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18))
HAND_COLOUR, FACE_COLOUR = (0, 0, 255), (255, 255, 255)


def _nobody(points: int) -> np.ndarray:
    return np.zeros((points, 3), np.float32)


@dataclass(frozen=True)
class Person:
    """Each point x, y in pixels and confidence 0..1: ``body [18, 3]``, ``face [n, 3]``, ``hands`` ``[21, 3]`` each."""

    body: np.ndarray = field(default_factory=lambda: _nobody(18))
    face: np.ndarray = field(default_factory=lambda: _nobody(0))
    hands: tuple[np.ndarray, ...] = ()


def with_neck(points: np.ndarray) -> np.ndarray:
    """Body points without a neck (17: as above, less the second) -> 18: the neck is halfway between the shoulders."""
    right, left = points[1], points[4]
    neck = np.array([*(right[:2] + left[:2]) / 2, min(right[2], left[2])], np.float32)
    return np.concatenate([points[:1], neck[None], points[1:]]).astype(np.float32)


def draw_people(
    people: Sequence[Sequence[Person]], height: int, width: int, parts: Sequence[str] = ("body", "face")
) -> np.ndarray:
    """A picture of each frame's people, uint8 ``[T, height, width, 3]``: limbs on black.

    VACE's own tool swaps red and blue against DWPose, and its models know its pictures; "dwpose" among the parts gives
    DWPose's colours.
    """
    scale = CANVAS / min(height, width)
    size = (round(width * scale), round(height * scale))
    out = np.empty((len(people), height, width, 3), np.uint8)
    how = cv2.INTER_AREA if scale > 1 else cv2.INTER_LANCZOS4
    for picture, present in zip(out, people, strict=True):
        canvas = np.zeros((size[1], size[0], 3), np.uint8)
        if "body" in parts:
            draw_bodies(canvas, [_scaled(person.body, scale) for person in present])
        if "hands" in parts:
            draw_hands(canvas, [_scaled(hand, scale) for person in present for hand in person.hands])
        if "face" in parts:
            draw_faces(canvas, [_scaled(person.face, scale) for person in present])
        drawn = cv2.resize(canvas, (width, height), interpolation=how)
        picture[:] = drawn if "dwpose" in parts else drawn[..., ::-1]
    return out


def _scaled(points: np.ndarray, scale: float) -> np.ndarray:
    return points * np.array([scale, scale, 1], np.float32)


def draw_bodies(canvas: np.ndarray, bodies: Sequence[np.ndarray]) -> None:
    """Limbs, dimmed, then points over them, in place; ``bodies`` ``[18, 3]`` in pixels of the canvas."""
    for i, (start, end) in enumerate(LIMBS):
        for points in bodies:
            a, b = points[start], points[end]
            if min(a[2], b[2]) > SEEN:
                _limb(canvas, a[:2], b[:2], COLOURS[i])
    canvas[:] = (canvas * DIM).astype(np.uint8)
    for i, colour in enumerate(COLOURS):
        for points in bodies:
            if points[i, 2] > SEEN:
                cv2.circle(canvas, (int(points[i, 0]), int(points[i, 1])), DOT, colour, -1)


def _limb(canvas: np.ndarray, a: np.ndarray, b: np.ndarray, colour: tuple[int, ...]) -> None:
    """A filled ellipse from point to point."""
    middle, along = (a + b) / 2, a - b
    axes = (int(np.hypot(*along) / 2), WIDE)
    angle = int(np.degrees(np.arctan2(along[1], along[0])))
    outline = np.asarray(cv2.ellipse2Poly((int(middle[0]), int(middle[1])), axes, angle, 0, 360, 1))
    cv2.fillConvexPoly(canvas, outline, colour)


def draw_hands(canvas: np.ndarray, hands: Sequence[np.ndarray]) -> None:
    """Fingers in the colours of a rainbow, points in blue; ``hands`` ``[21, 3]``."""
    for points in hands:
        for i, (start, end) in enumerate(FINGERS):
            if min(points[start, 2], points[end, 2]) > SEEN:
                red, green, blue = (255 * value for value in colorsys.hsv_to_rgb(i / len(FINGERS), 1, 1))
                ends = [(int(points[k, 0]), int(points[k, 1])) for k in (start, end)]
                cv2.line(canvas, ends[0], ends[1], (red, green, blue), HAND_LINE)
        _dots(canvas, points, DOT, HAND_COLOUR)


def draw_faces(canvas: np.ndarray, faces: Sequence[np.ndarray]) -> None:
    """White points; ``faces`` ``[n, 3]``."""
    for points in faces:
        _dots(canvas, points, FACE_DOT, FACE_COLOUR)


def _dots(canvas: np.ndarray, points: np.ndarray, radius: int, colour: tuple[int, int, int]) -> None:
    for x, y, confidence in points.tolist():
        if confidence > SEEN:
            cv2.circle(canvas, (int(x), int(y)), radius, colour, -1)
