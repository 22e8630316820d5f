"""The drawing of people against the published convention, written out as numbers."""

import numpy as np
import pytest

from vdot.annotate.skeleton import CANVAS, Person, draw_people, with_neck

# OpenPose's colours and limbs as every implementation lists them; limbs count from 1.
COLOURS = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
]  # fmt: skip
LIMBS = [
    (2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11), (2, 12), (12, 13), (13, 14), (2, 1),
    (1, 15), (15, 17), (1, 16), (16, 18),
]  # fmt: skip
# Nose, neck, right arm, left arm, right leg, left leg, eyes, ears on a canvas of 1024, well apart.
POINTS = [
    (500, 160), (500, 300), (380, 300), (300, 420), (220, 540), (620, 300), (700, 420), (780, 540), (440, 560),
    (400, 740), (380, 940), (560, 560), (600, 740), (620, 940), (460, 110), (540, 110), (400, 150), (600, 150),
]  # fmt: skip


def person(**changes: np.ndarray) -> Person:
    body = np.array([(x, y, 1) for x, y in POINTS], np.float32)
    return Person(**{"body": body, **changes})


def test_golden_body():
    drawn = draw_people([[person()]], CANVAS, CANVAS, ("body", "dwpose"))[0]
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        middle = (np.array(POINTS[a - 1]) + POINTS[b - 1]) // 2
        assert tuple(drawn[middle[1], middle[0]]) == tuple(int(0.6 * value) for value in colour), (a, b)
    for (x, y), colour in zip(POINTS, COLOURS, strict=True):
        assert tuple(drawn[y, x]) == colour
        ring = [drawn[y + dy, x + dx] for dx, dy in ((4, 0), (-4, 0), (0, 4), (0, -4))]
        assert all(tuple(pixel) == colour for pixel in ring)  # radius 4
    # A limb is 4 pixels wide to either side of its middle: right shoulder to neck lies level.
    column = drawn[:, 440].any(-1)
    assert (np.flatnonzero(column[250:350]) + 250).tolist() == list(range(296, 305))
    assert not drawn[:100].any() and not drawn[:, :210].any()


def test_vace_swaps_red_and_blue():
    one = [[person()]]
    assert (draw_people(one, 256, 256) == draw_people(one, 256, 256, ("body", "face", "dwpose"))[..., ::-1]).all()
    small = [[Person(person().body * np.array([0.5, 0.5, 1], np.float32))]]
    right_shoulder = draw_people(small, 512, 512)[0][150, 190]
    assert right_shoulder[2] > 100 > right_shoulder[0] + 60  # orange (255, 170, 0) became a blue


def test_golden_hand_and_face():
    hand = np.array([(100 + 30 * (i % 5), 100 + 40 * (i // 5), 1) for i in range(21)], np.float32)
    face = np.array([(600 + 10 * (i % 20), 600 + 20 * (i // 20), 1) for i in range(68)], np.float32)
    one = Person(np.zeros((18, 3), np.float32), face, (hand,))
    drawn = draw_people([[one]], CANVAS, CANVAS, ("hands", "face", "dwpose"))[0]
    for x, y, _ in hand.astype(int):
        assert tuple(drawn[y, x]) == (0, 0, 255)
    for x, y, _ in face.astype(int):
        assert tuple(drawn[y, x]) == (255, 255, 255) and tuple(drawn[y, x + 3]) == (255, 255, 255)
    # The first finger's first bone has the hue 0, its second 18 degrees: from point 1 to point 2, level.
    assert tuple(drawn[100, 115]) == (255, 0, 0)
    assert tuple(drawn[100, 145]) == pytest.approx((255, 76.5, 0), abs=1)
    nothing = draw_people([[one]], CANVAS, CANVAS, ("body",))
    assert not nothing.any()


def test_what_is_not_seen_is_not_drawn_and_sizes_scale():
    body = person().body.copy()
    body[4, 2] = 0.3  # the right wrist, at the threshold
    drawn = draw_people([[Person(body)], []], CANVAS, CANVAS, ("body", "dwpose"))
    assert not drawn[0, 500:600, 200:260].any() and not drawn[1].any()
    half = draw_people([[Person(person().body / np.array([2, 2, 1], np.float32))]], 512, 512, ("body", "dwpose"))[0]
    full = draw_people([[person()]], CANVAS, CANVAS, ("body", "dwpose"))[0]
    shrunk = full.reshape(512, 2, 512, 2, 3).mean((1, 3))
    assert np.abs(half - shrunk).max() <= 1  # drawn at 1024, then scaled by area


def test_the_neck_is_halfway_between_the_shoulders():
    points = np.delete(person().body, 1, axis=0)
    points[4, 2] = 0.4
    with_one = with_neck(points)
    assert with_one.shape == (18, 3)
    assert with_one[1].tolist() == pytest.approx([500, 300, 0.4])
    assert (np.delete(with_one, 1, axis=0) == points).all()
