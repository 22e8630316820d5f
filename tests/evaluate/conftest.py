"""Clips with known properties, and what an autoencoder or a codec would do to them."""

import cv2
import numpy as np
import pytest


def noise_picture(height: int = 64, width: int = 64, seed: int = 0, smooth: float = 2.0) -> np.ndarray:
    """Strong smooth texture, uint8 ``[H, W, 3]``: flow is well defined everywhere."""
    rng = np.random.default_rng(seed)
    picture = cv2.GaussianBlur(rng.standard_normal((height, width, 3)).astype(np.float32), (0, 0), smooth)
    return np.clip(128 + picture * (55 / picture.std()), 0, 255).astype(np.uint8)


def moving(shift: tuple[int, int], frames: int = 6, size: int = 64) -> np.ndarray:
    """A window over a large texture: what it shows moves by ``shift`` (x, y) pixels a frame."""
    large = noise_picture(size + 80, size + 80)
    x, y = shift
    corners = ((40 - t * y, 40 - t * x) for t in range(frames))
    return np.stack([large[top : top + size, left : left + size] for top, left in corners])


def worn(frames: np.ndarray, blur: float = 1.0, noise: float = 5.0, seed: int = 0) -> np.ndarray:
    """Blurred (standard deviation in pixels) and with noise added (in levels)."""
    rng = np.random.default_rng(seed)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in frames]) if blur else frames
    return np.clip(soft + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    array = np.array(values, float)
    picks = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


@pytest.fixture(scope="session")
def texture() -> np.ndarray:
    return np.stack([noise_picture(seed=k) for k in range(5)])
