"""References: the subject of a picture alone on white."""

import numpy as np

from vdot.annotate.backends import Tools
from vdot.annotate.masks import box_of
from vdot.annotate.material import Material, check_image
from vdot.annotate.repaint import augmented, region
from vdot.errors import InputError

MODES = ("plain", "salient", "mask", "bbox", "label", "caption", "face")
KINDS = ("salient", "segment", "find", "face")
MARGIN = 0.04  # of the subject's size, left around it
FACE_MARGIN = 0.5


def cut_out(image: np.ndarray, mask: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """``image`` where bool ``mask`` is true, on white, cropped to it: uint8 ``[h, w, 3]``."""
    left, top, right, bottom = box_of(mask)
    room = round(margin * max(right - left, bottom - top))
    size = (bottom - top + 2 * room, right - left + 2 * room, 3)
    out = np.full(size, 255, np.uint8)
    inside = mask[top:bottom, left:right, None]
    out[room : room + bottom - top, room : room + right - left] = np.where(inside, image[top:bottom, left:right], 255)
    return out


def reference(image: np.ndarray, material: Material, mode: str, tools: Tools) -> np.ndarray:
    """The subject of ``image`` on white by ``mode``; "plain" leaves the picture as it is."""
    check_image(image)
    # The tracked modes of a clip have the same meaning for a picture.
    mode = {"masktrack": "mask", "bboxtrack": "box", "salientmasktrack": "salient"}.get(mode, mode)
    mode = {"salientbboxtrack": "salient", "box": "bbox"}.get(mode, mode)
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r} of a reference: use {', '.join(MODES)}")
    if mode == "plain":
        return image
    if mode == "face":
        return face(image, tools)
    name = {"bbox": "bboxtrack"}.get(mode, mode)  # what fills the box, not the box
    masks = region(image[None], material, name, tools)
    return cut_out(image, augmented(masks, material)[0])


def face(image: np.ndarray, tools: Tools) -> np.ndarray:
    """The largest face with hair and chin around it, cropped."""
    boxes = tools("face")(image)
    if not len(boxes):
        raise InputError("no face was found in the picture: use another, or --mode bbox with --bbox around it")
    left, top, right, bottom = max(boxes.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    room = round(FACE_MARGIN / 2 * max(right - left, bottom - top))
    return image[max(top - room, 0) : bottom + room, max(left - room, 0) : right + room].copy()
