"""How far a video follows the control it was given: the control is made again from the output and compared.

What has no annotator without weights (depth, pose) is compared with what a control implies about the picture; each
function says what it leaves out.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from vdot.annotate.masks import box_of
from vdot.data.sprites.render import FULL_FLOW
from vdot.evaluate.fields import check_pair, edges, luminance, optical_flow
from vdot.evaluate.kept import ssim


def edge_scores(found: np.ndarray, given: np.ndarray, tolerance: float) -> tuple[float | None, float | None, float]:
    """Precision, recall and F1 of edge pixels, bool ``[T, H, W]``; a pixel is right within ``tolerance`` pixels.

    All in 0..1, higher is better. As boundary benchmarks do (Martin et al. 2004), but without matching one to one.
    Precision is ``None`` when nothing was found, recall when nothing was given; F1 is 0 for one without the other
    and 1 when neither has any.
    """
    right = sum(int((f & _near(g, tolerance)).sum()) for f, g in zip(found, given, strict=True))
    met = sum(int((g & _near(f, tolerance)).sum()) for f, g in zip(found, given, strict=True))
    precision = right / int(found.sum()) if found.any() else None
    recall = met / int(given.sum()) if given.any() else None
    if precision is None and recall is None:
        return None, None, 1.0
    both = (precision or 0.0) + (recall or 0.0)
    return precision, recall, 2 * (precision or 0.0) * (recall or 0.0) / both if both else 0.0


def _near(mask: np.ndarray, tolerance: float) -> np.ndarray:
    if not mask.any():
        return np.zeros(mask.shape, bool)
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= tolerance


def tolerance_of(frames: np.ndarray) -> float:
    """Pixels that an edge may be off: a hundredth of the short side, at least one."""
    return max(1.0, min(frames.shape[1:3]) / 100)


def scribble_f1(frames: np.ndarray, control: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """F1 of the output's Canny edges against drawn lines (brighter than half), 0..1, higher is better.

    A world's scribble also holds outlines too faint for Canny, and Canny finds patterns that a scribble leaves out, so
    even the truth stays below 1. ``where``, bool ``[T, H, W]``: the pixels that show the control.
    """
    check_pair(frames, control)
    found, given = edges(frames), luminance(control) > 127
    if where is not None:
        found, given = found & where, given & where
    return edge_scores(found, given, tolerance_of(frames))[2] if given.any() or found.any() else None


def edge_f1(frames: np.ndarray, other: np.ndarray) -> float | None:
    """F1 between the Canny edges of two clips, 0..1, higher is better; ``None`` when neither has edges."""
    check_pair(frames, other)
    found, given = edges(frames), edges(other)
    return edge_scores(found, given, tolerance_of(frames))[2] if given.any() or found.any() else None


def depth_edges(frames: np.ndarray, control: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Share of the depth control's jumps that are edges in the output, less what as many edges would hit by chance.

    A stand-in for depth error without a depth network: at most 1, 0 is chance, higher is better. A jump is more than
    a twentieth of the depth range between neighbours. It does not see the depth of surfaces, nor which side is nearer.
    """
    check_pair(frames, control)
    depth = luminance(control).astype(np.int16)
    jumps = np.zeros(depth.shape, bool)
    jumps[:, :, 1:] |= np.abs(np.diff(depth, axis=2)) > 13
    jumps[:, 1:] |= np.abs(np.diff(depth, axis=1)) > 13
    found = edges(frames, 25, 70)  # faint ones as well: a thing may be little brighter than what is behind it
    if where is not None:
        jumps &= where
    if not jumps.any():
        return None
    near = np.stack([_near(frame, tolerance_of(frames)) for frame in found])
    hit, chance = float(near[jumps].mean()), float(near.mean() if where is None else near[where].mean())
    return (hit - chance) / (1 - chance) if chance < 1 else 0.0


def gray_error(frames: np.ndarray, control: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Mean absolute difference of the luminance, in levels of 255, 0 is best."""
    check_pair(frames, control)
    gap = np.abs(luminance(frames).astype(np.float32) - luminance(control))
    chosen = gap if where is None else gap[where]
    return float(chosen.mean()) if chosen.size else None


def gray_ssim(frames: np.ndarray, control: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """:func:`vdot.evaluate.kept.ssim` with the grey control."""
    return ssim(frames, control, where)


def read_flow(picture: np.ndarray) -> np.ndarray:
    """A flow picture of the world back to pixels a frame, float32 ``[T, H, W, 2]``.

    The inverse of :func:`vdot.data.sprites.render.draw_flow`; longer flows than :data:`FULL_FLOW` come back shortened
    to it, and white is still.
    """
    unit = min(picture.shape[1:3])
    wheel = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV) for frame in picture]).astype(np.float32)
    angle, length = wheel[..., 0] * (2 * np.pi / 180), wheel[..., 1] * (FULL_FLOW * unit / 255)
    return np.stack([np.cos(angle) * length, np.sin(angle) * length], -1)


def flow_control_error(frames: np.ndarray, control: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Mean end-point error of the output's flow against a flow picture, in pixels a frame, 0 is best.

    The output's flow is shortened where the picture's is at its fullest. The last frame's flow leads out of the clip
    and is left out. What optical flow cannot see on plain surfaces counts as error, for the truth as well.
    """
    check_pair(frames, control)
    if len(frames) < 2:
        return None
    found, given = optical_flow(frames), read_flow(control)[:-1]
    most = FULL_FLOW * min(frames.shape[1:3])
    found = found * np.minimum(1, most / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-6))
    gap = np.linalg.norm(found - given, axis=-1)
    chosen = gap if where is None else gap[where[:-1]]
    return float(chosen.mean()) if chosen.size else None


def skeleton_overlap(body: np.ndarray, control: np.ndarray, reach: float) -> float | None:
    """F1 of a person's mask against drawn limbs, 0..1, higher is better; ``None`` where no limbs are drawn.

    Recall: limb pixels inside ``body``, bool ``[T, H, W]``. Precision: pixels of the body within ``reach`` pixels of a
    limb (the half width of a trunk). It does not see which limb is which.
    """
    limbs = control.max(-1) > 60
    if not limbs.any():
        return None
    recall = float((limbs & body).sum() / limbs.sum())
    near = sum(int((b & _near(limb, reach)).sum()) for b, limb in zip(body, limbs, strict=True))
    precision = near / int(body.sum()) if body.any() else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def box_overlap(masks: np.ndarray, boxes: np.ndarray) -> float | None:
    """Mean intersection over union of the boxes around ``masks``, bool ``[N, T, H, W]``, and given ones ``[T, N, 4]``.

    0..1, higher is better; frames where a box is empty in the control are left out, an empty mask counts 0.
    """
    values = []
    for thing, mask in enumerate(masks):
        for frame, given in zip(mask, boxes[:, thing].tolist(), strict=True):
            if given[2] > given[0]:
                values.append(_box_iou(box_of(frame), given) if frame.any() else 0.0)
    return float(np.mean(values)) if values else None


def _box_iou(a: Sequence[int], b: Sequence[int]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(wide, 0) * max(high, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
