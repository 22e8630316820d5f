"""How a video moves, without a word about what: amount, smoothness, flicker.

All of it from optical flow (:func:`vdot.evaluate.fields.optical_flow`), which is blind on surfaces without texture. A
clip shorter than a measurement needs gives ``None``.
"""

import numpy as np

from vdot.evaluate.fields import check_clip, check_pair, luminance, optical_flow, warp


def motion_amount(frames: np.ndarray, flow: np.ndarray | None = None) -> float | None:
    """Mean length of the flow, in short sides a frame, 0 for a still; neither high nor low is better by itself."""
    check_clip(frames)
    if len(frames) < 2:
        return None
    field = optical_flow(frames) if flow is None else flow
    return float(np.hypot(field[..., 0], field[..., 1]).mean()) / min(frames.shape[1:3])


def motion_jerk(frames: np.ndarray, flow: np.ndarray | None = None) -> float | None:
    """Mean change of the flow from a frame to the next over its mean length, from 0 (steady), lower is smoother.

    0 for uniform motion and for a still, about 1.5 for frames in random order. It does not see that something moves
    steadily in a wrong way.
    """
    check_clip(frames)
    if len(frames) < 3:
        return None
    field = optical_flow(frames) if flow is None else flow
    length = float(np.hypot(field[..., 0], field[..., 1]).mean())
    change = np.diff(field, axis=0)
    # A hundredth of a pixel is what the matcher finds in a still.
    return float(np.hypot(change[..., 0], change[..., 1]).mean()) / max(length, 0.01)


def flicker(frames: np.ndarray, flow: np.ndarray | None = None) -> float | None:
    """Mean distance of each frame from the mean of its two neighbours moved onto it, levels of 255, lower is better.

    The second difference along the motion: 0 for a still and for what flow explains whole, k for a clip whose
    brightness goes up and down by k every other frame (2k between neighbours makes it 2k). It does not see slow drift.
    """
    check_clip(frames)
    if len(frames) < 3:
        return None
    field = optical_flow(frames) if flow is None else flow
    light = luminance(frames).astype(np.float32)
    ahead = optical_flow(frames[::-1])[::-1]  # [t] from frame t + 1 back to t
    gaps = []
    for t in range(1, len(frames) - 1):
        before, after = warp(light[t - 1], ahead[t - 1]), warp(light[t + 1], field[t])
        gaps.append(np.abs(light[t] - (before + after) / 2).mean())
    return float(np.mean(gaps))


def still_flicker(frames: np.ndarray, truth: np.ndarray) -> float | None:
    """Standard deviation over time of the luminance where ``truth`` does not change, levels of 255, lower is better.

    Exact, without flow; ``None`` where nothing is still (a moving camera).
    """
    check_pair(frames, truth)
    still = luminance(truth).std(0) < 0.5
    if len(frames) < 2 or not still.any():
        return None
    return float(luminance(frames).astype(np.float32).std(0)[still].mean())


def flow_error(frames: np.ndarray, other: np.ndarray) -> float | None:
    """Mean end-point error between the flows of two clips, in pixels a frame, 0 is best.

    A clip moved by d pixels a frame against a still gives d.
    """
    check_pair(frames, other)
    if len(frames) < 2:
        return None
    return float(np.linalg.norm(optical_flow(frames) - optical_flow(other), axis=-1).mean())
