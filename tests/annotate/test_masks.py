"""Regions, margins and lengths, counted by hand."""

import numpy as np
import pytest

from vdot.annotate.extend import extend, inner_margin, outpaint, parse_directions
from vdot.annotate.layout import boxes_between, draw_boxes, draw_outlines
from vdot.annotate.masks import augment, box_of, grow
from vdot.annotate.material import UNKNOWN, check_box, check_mask
from vdot.annotate.reading import parse_boxes
from vdot.errors import InputError


@pytest.fixture
def corner() -> np.ndarray:
    """An L in 60x80: its box is 20..60 by 10..40."""
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 10:40, 20:30] = True
    mask[0, 30:40, 20:60] = True
    return mask


def test_maskaug_modes(corner):
    assert (augment(corner, None) == corner).all() and (augment(corner, "original") == corner).all()
    box = augment(corner, "bbox")[0]
    assert box.sum() == 40 * 30 and box_of(box) == (20, 10, 60, 40)
    wide = augment(corner, "bbox_expand", 0.5)[0]  # half of its size in all: 10 to the sides, 7 or 8 up and down
    assert box_of(wide)[::2] == (10, 70) and abs(box_of(wide)[1] - 2.5) <= 0.5 and abs(box_of(wide)[3] - 47.5) <= 0.5
    assert wide.sum() == 60 * (box_of(wide)[3] - box_of(wide)[1])  # filled
    hull = augment(corner, "hull")[0]
    # The triangle between the tips (29, 10) and (59, 30) joins the L: 30 x 20 / 2, give or take its slanted edge.
    assert abs(hull.sum() - corner.sum() - 300) < 40 and not (corner[0] & ~hull).any()
    larger = augment(corner, "original_expand", 0.2)[0]
    assert (larger == grow(corner[0], 3)).all()  # sqrt(40 * 30) * 0.2 / 2 = 3.46
    assert not augment(np.zeros((2, 8, 8), bool), "hull_expand").any()


@pytest.mark.parametrize(
    ("mode", "ratio", "message"),
    [
        ("box", None, "unknown maskaug_mode 'box'"),
        ("hull", 0.2, "has no effect with maskaug_mode hull: use hull_expand"),
        ("bbox_expand", -1, "maskaug_ratio must be a number from 0 to 10"),
        ("bbox_expand", float("nan"), "maskaug_ratio must be a number"),
    ],
)
def test_bad_maskaug(corner, mode, ratio, message):
    with pytest.raises(InputError, match=message):
        augment(corner, mode, ratio)


def test_outpainting_keeps_every_pixel_and_grows_as_told():
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    source, white = outpaint(frames, ("left", "right"), 0.25)
    assert source.shape == (3, 48, 96, 3)  # 64 + 16 + 16
    assert (source[:, :, 16:80] == frames).all() and not white[:, :, 16:80].any()
    assert (source[white] == UNKNOWN).all() and white.sum() == 3 * 48 * 32
    source, white = outpaint(frames, ("up",), 0.3)  # 48 + 14 is 62: two more to be a multiple of 16
    assert source.shape == (3, 64, 64, 3) and (source[:, 16:] == frames).all() and white[:, :16].all()
    assert UNKNOWN == 127


def test_inner_margins():
    frames = np.zeros((2, 40, 100, 3), np.uint8)
    white = inner_margin(frames, ("left", "down"), 0.2)
    assert white[0, :, :20].all() and white[0, 32:].all() and white.sum() == 20 * 40 + 80 * 8
    with pytest.raises(InputError, match="leaves nothing of the picture"):
        inner_margin(frames, ("left", "right"), 0.5)
    assert parse_directions("up, Left") == ("up", "left") and len(parse_directions(None)) == 4
    with pytest.raises(InputError, match="unknown direction 'top'"):
        parse_directions("top")


def test_extension_counts_and_sizes():
    first, last = np.full((2, 32, 48, 3), 10, np.uint8), np.full((3, 64, 96, 3), 20, np.uint8)
    source, white = extend(first, last, 4)
    assert source.shape == (9, 32, 48, 3)  # the second clip takes the first one's size
    assert (source[:2] == 10).all() and (source[2:6] == UNKNOWN).all() and (source[6:] == 20).all()
    assert white.all((1, 2)).tolist() == [False] * 2 + [True] * 4 + [False] * 3 and white.sum() == 4 * 32 * 48
    source, white = extend(None, first, 1)
    assert source[0, 0, 0].tolist() == [127] * 3 and white.any((1, 2)).tolist() == [True, False, False]
    with pytest.raises(InputError, match="expand_num must be from 1"):
        extend(first, None, 0)


def test_layout_moves_from_box_to_box():
    boxes = boxes_between([(10, 10, 30, 20), (50, 30, 90, 60)], 5, 64, 96)
    assert boxes[0].tolist() == [10, 10, 30, 20] and boxes[-1].tolist() == [50, 30, 90, 60]
    assert boxes[2].tolist() == [30, 20, 60, 40]  # halfway
    drawn = draw_boxes(boxes, 64, 96)
    for frame, (left, top, right, bottom) in zip(drawn, np.rint(boxes).astype(int), strict=True):
        black = (frame == 0).all(-1)
        assert black[top, left:right].all() and black[top:bottom, right - 1].all()
        assert (frame[~black] == 255).all() and not black[top + 3 : bottom - 3, left + 3 : right - 3].any()
    outline = draw_outlines(np.pad(np.ones((1, 20, 30), bool), ((0, 0), (10, 10), (10, 10))))
    assert (outline[0, 10, 10:40] == 0).all() and (outline[0, 20, 20] == 255).all()


def test_boxes_and_masks_are_checked():
    assert parse_boxes("1,2,3,4 5,6,7,8") == ((1, 2, 3, 4), (5, 6, 7, 8)) and parse_boxes(None) is None
    assert check_box((-5, 3.4, 20, 99), 50, 40) == (0, 3, 20, 50)
    for box, message in [
        ((5, 5, 5, 9), "right > left"),
        ((60, 0, 70, 9), "lies outside the picture, which is 40x50"),
        ((0, 0, float("nan"), 9), "right > left"),
        ((1, 2, 3), "left,top,right,bottom in pixels"),
    ]:
        with pytest.raises(InputError, match=message):
            check_box(box, 50, 40)
    with pytest.raises(InputError, match="box '1,2,3' is not understood"):
        parse_boxes("1,2,3")
    with pytest.raises(InputError, match="black everywhere"):
        check_mask(np.zeros((4, 4), np.uint8), 4, 4)
    with pytest.raises(InputError, match=r"the mask is \[4, 4\], the picture needs \[5, 4\]"):
        check_mask(np.ones((4, 4), bool), 5, 4)
    assert check_mask(np.array([[0, 1]], np.uint8), 1, 2).tolist() == [[False, True]]
    assert check_mask(np.array([[100, 200]], np.uint8), 1, 2).tolist() == [[False, True]]
