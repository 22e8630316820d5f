"""The maps between colours against POT's, their bounds, and places found again; drift itself is in test_chunks.py."""

import numpy as np
import ot.gaussian
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdot.anchor import FLOOR, REACH, ColourAnchor, Moments, camera_way, moments, transport


def drawn(seed: int, spread: float = 30.0) -> Moments:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3)) * spread
    return Moments(rng.uniform(60, 190, 3), root @ root.T)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_map_is_optimal_transport_between_gaussians(one, two):
    """1e-6 of POT's, in double precision, with the floor on both covariances."""
    a, b = drawn(one), drawn(two)
    floor = FLOOR * np.eye(3)
    matrix, offset = ot.gaussian.bures_wasserstein_mapping(a.mean, b.mean, a.covariance + floor, b.covariance + floor)
    found = transport(a, b, 1e9, 1e9)
    assert np.allclose(found.matrix, matrix, rtol=1e-6, atol=1e-6)
    assert np.allclose(found.matrix @ a.mean + found.offset, matrix @ a.mean + offset.ravel(), atol=1e-4)
    assert np.allclose(found.matrix @ (a.covariance + floor) @ found.matrix.T, b.covariance + floor, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.floats(0, 60))
@settings(max_examples=30)
def test_its_gains_and_its_shift_keep_their_bounds(one, two, spread):
    a, b = drawn(one, spread), drawn(two)
    found = transport(a, b, 1.25, 20.0)
    gains = np.linalg.eigvalsh(found.matrix)
    assert 1 / 1.25 - 1e-9 <= gains.min() <= gains.max() <= 1.25 + 1e-9
    moved = found.matrix @ a.mean + found.offset - a.mean
    assert np.linalg.norm(moved) <= 20 + 1e-9
    # As far as it may, in the right direction.
    wanted = b.mean - a.mean
    assert np.allclose(moved, wanted * min(1, 20 / max(np.linalg.norm(wanted), 1e-9)))


def test_moments_are_those_of_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    found = moments(pixels)
    assert np.allclose(found.mean, pixels.mean(0)) and np.allclose(found.covariance, np.cov(pixels.T, bias=True))


def textured(rows: int, columns: int) -> np.ndarray:
    """Soft spots of all colours, float32 ``[rows, columns, 3]``."""
    import cv2

    noise = np.random.default_rng(3).normal(128, 400, (rows, columns, 3)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 3)


@pytest.mark.parametrize("way", [(0, 0), (1, 0), (0, -3), (5, 7), (-12, 4), (REACH, -REACH)])
def test_a_place_is_found_again_under_a_tint(way):
    """The camera goes by ``way``: what was at row y is then at row y - way[0]."""
    world = textured(64 + 2 * REACH, 64 + 2 * REACH)
    first = world[REACH : REACH + 64, REACH : REACH + 64]
    now = world[REACH + way[0] :, REACH + way[1] :][:64, :64]
    assert camera_way(first, now) == way
    assert camera_way(first, now + np.float32([8, -5, 3])) == way


@pytest.mark.parametrize("size", [(16, 16), (16, 832), (480, 16), (48, 64)])
@pytest.mark.parametrize("grain", [None, 0, 12])
@pytest.mark.parametrize("overlap", [1, 5])
def test_clips_of_any_shape_and_flat_and_grainy_ones_pass_nearly_unchanged(overlap, grain, size):
    """Nothing is wrong with them. Grain flickers; it must not look fainter in one chunk than in the other."""
    rng = np.random.default_rng(0)
    place = np.full((*size, 3), 128) if grain is None else textured(*size)
    first, later = (place + rng.normal(0, grain or 0, (17, *place.shape)) for _ in range(2))
    first, later = (frames.round().clip(0, 255).astype(np.uint8) for frames in (first, later))
    anchor = ColourAnchor()
    anchor.learn(first)
    where = np.zeros(later.shape[:3], bool)
    where[:overlap] = True
    held = anchor.hold(later, later, where, overlap)
    assert held.shape == (17 - overlap, *size, 3)
    assert np.abs(held.astype(int) - later[overlap:]).max() <= (3 if grain else 0)
