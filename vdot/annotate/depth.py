"""Depth from single pictures, by Depth Anything or MiDaS: near is bright.

There is no honest depth without a trained model, so there is no backend without one.
"""

from collections.abc import Callable

import numpy as np
import torch

from vdot.annotate.hub import load, load_model
from vdot.annotate.lines import as_pictures

Depth = Callable[[np.ndarray], np.ndarray]


def network(place: str) -> Depth:
    """uint8 ``[T, H, W, 3]`` -> float32 ``[T, H, W]``, the larger the nearer, up to scale and offset."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    model, device = load_model(AutoModelForDepthEstimation, place)
    processor = load(AutoImageProcessor, place)

    @torch.inference_mode()
    def estimate(frames: np.ndarray) -> np.ndarray:
        out = np.empty(frames.shape[:3], np.float32)
        for frame, depth in zip(frames, out, strict=True):
            inputs = processor(images=frame, return_tensors="pt").to(device)
            found = processor.post_process_depth_estimation(model(**inputs), target_sizes=[frame.shape[:2]])
            depth[:] = found[0]["predicted_depth"].float().cpu().numpy()
        return out

    return estimate


def depth_picture(frames: np.ndarray, estimate: Depth) -> np.ndarray:
    """Grey uint8 ``[T, H, W, 3]``: the clip's farthest point black, its nearest white, the same scale in all frames."""
    depth = np.nan_to_num(estimate(frames).astype(np.float32))
    low, high = float(depth.min()), float(depth.max())
    share = (depth - low) / (high - low) if high > low else np.zeros_like(depth)
    return as_pictures(np.rint(share * 255).astype(np.uint8))
