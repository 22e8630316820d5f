"""Whether what should stay has stayed, and whether one sees where the new begins.

Masks are bool ``[T, H, W]``, or uint8 where above half is white; white generates, black keeps. ``None`` is "not
measured": there is nothing of that kind in the mask.
"""

import cv2
import numpy as np

from vdot.conditioning import MASK_THRESHOLD
from vdot.evaluate.fields import check_clip, check_pair, luminance

EQUAL = 60.0  # dB at most: errors of rounding alone give 58.9, equal pixels infinity


def generated(mask: np.ndarray) -> np.ndarray:
    """Bool ``[T, H, W]`` of a mask as tasks carry it."""
    return mask if mask.dtype == bool else mask > 255 * MASK_THRESHOLD


def psnr(frames: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Peak signal-to-noise ratio over all pixels and channels of the clip (in ``where``), in dB, higher is better.

    ``10 log10(255^2 / mean squared error)``, at most :data:`EQUAL`. It does not see where the error is, nor of what
    kind: a shift by a pixel costs more than blur.
    """
    check_pair(frames, other)
    square = (frames.astype(np.float32) - other) ** 2
    chosen = square if where is None else square[where]
    if not chosen.size:
        return None
    error = float(chosen.mean(dtype=np.float64))
    return EQUAL if error == 0 else min(EQUAL, float(10 * np.log10(255**2 / error)))


def ssim(frames: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Structural similarity of the luminance (Wang et al. 2004), -1..1, 1 is equal, higher is better.

    Gaussian window of 1.5 pixels (11 wide), K1 = 0.01, K2 = 0.03, averaged over the pixels (in ``where``) whose window
    lies in the frame. It does not see colour.
    """
    check_pair(frames, other)
    height, width = frames.shape[1:3]
    inner = (slice(None), slice(5, height - 5), slice(5, width - 5))
    values = np.stack([_ssim(a, b) for a, b in zip(luminance(frames), luminance(other), strict=True)])[inner]
    chosen = values if where is None else values[where[inner]]
    return float(chosen.mean()) if chosen.size else None


def _ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    a, b = first.astype(np.float64), second.astype(np.float64)
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    shared = _window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _window(picture: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(picture, (11, 11), 1.5)


def kept_psnr(frames: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float | None:
    """:func:`psnr` of what the mask keeps, against the source."""
    return psnr(frames, source, ~generated(mask))


def kept_ssim(frames: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float | None:
    """:func:`ssim` of what the mask keeps, against the source; windows reach a little over the border."""
    return ssim(frames, source, ~generated(mask))


def seam(frames: np.ndarray, mask: np.ndarray, truth: np.ndarray | None = None) -> float | None:
    """How much steeper the luminance is across the mask's border than beside it, in levels of 255, lower is better.

    Of every two neighbours of which one is kept: the step between them less the mean of the steps one pixel before
    and after. 0 is what a smooth picture has on average; a constant offset of k on the generated side gives k. With
    ``truth`` its own value is taken off, since an object's outline may lie on the border. It does not see a border
    that is too smooth for its surroundings.
    """
    value = _seam(frames, mask)
    if truth is None or value is None:
        return value
    check_pair(frames, truth)
    own = _seam(truth, mask)
    return None if own is None else value - own


def joint(frames: np.ndarray, mask: np.ndarray) -> float | None:
    """How much larger the change is from a kept to a generated frame, or back, than beside it; levels, 0 is best.

    Of every pixel that is kept in one of two frames in a row: the luminance's step between them less the mean of the
    steps one frame before and after. It does not see a jump that is hidden in faster motion. Where a still was held
    and all of it moves at once, the difference is real and counts.
    """
    check_clip(frames)
    new = generated(mask)
    border = np.diff(new.astype(np.int8), axis=0) != 0  # [T - 1, H, W]
    light = luminance(frames).astype(np.float32)
    step = np.abs(np.diff(light, axis=0))
    known = [t for t in range(len(step)) if border[t].any()]
    if not known or len(step) < 2:
        return None
    excess = []
    for t in known:
        beside = [step[s][border[t]] for s in (t - 1, t + 1) if 0 <= s < len(step)]
        excess.append(step[t][border[t]] - np.mean(beside, axis=0))
    return float(np.concatenate(excess).mean())


def _seam(frames: np.ndarray, mask: np.ndarray) -> float | None:
    new = generated(mask)
    light = luminance(frames).astype(np.float32)
    total, count = 0.0, 0
    for axis in (1, 2):
        step = np.abs(np.diff(light, axis=axis))
        border = np.diff(new.astype(np.int8), axis=axis) != 0
        lengths = step.shape[axis]
        here, before, after = (_cut(axis, slice(k, lengths - 2 + k)) for k in (1, 0, 2))
        across = border[here]
        excess = step[here] - (step[before] + step[after]) / 2
        total += float(excess[across].sum(dtype=np.float64))
        count += int(across.sum())
    return total / count if count else None


def _cut(axis: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (part,)
