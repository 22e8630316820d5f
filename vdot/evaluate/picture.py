"""The look of the frames: sharpness, and whether colour and light drift over the clip."""

import cv2
import numpy as np

from vdot.evaluate.fields import check_clip, luminance


def laplacian_variance(frames: np.ndarray) -> float:
    """Variance of the Laplacian of the luminance (Pech-Pacheco et al. 2000), mean over frames; from 0, levels squared.

    Higher is sharper, but noise counts as sharpness.
    """
    check_clip(frames)
    return float(np.mean([cv2.Laplacian(frame.astype(np.float32), cv2.CV_32F).var() for frame in luminance(frames)]))


def sharpness(frames: np.ndarray, truth: np.ndarray) -> float | None:
    """Laplacian variance over that of a clip of the same content, in octaves: 0 is alike, below blurred, above noisy.

    ``None`` when the truth has no detail at all.
    """
    own, wanted = laplacian_variance(frames), laplacian_variance(truth)
    return float(np.log2((own + 1) / (wanted + 1))) if wanted > 0 else None


def brightness_drift(frames: np.ndarray) -> float | None:
    """Mean luminance of the last quarter less that of the first, in levels of 255; 0 is none."""
    return _drift(luminance(frames).astype(np.float32).mean((1, 2)))


def saturation_drift(frames: np.ndarray) -> float | None:
    """As :func:`brightness_drift`, of the saturation ``max(RGB) - min(RGB)`` (HSV chroma, so that black has none)."""
    check_clip(frames)
    return _drift((frames.max(-1) - frames.min(-1)).astype(np.float32).mean((1, 2)))


def _drift(series: np.ndarray) -> float | None:
    quarter = len(series) // 4
    return float(series[-quarter:].mean() - series[:quarter].mean()) if quarter else None
