"""Distances between distributions against closed forms."""

import numpy as np
import pytest

from tests.evaluate.conftest import moving, worn
from vdot.data.sprites import draw_scene, render
from vdot.errors import InputError
from vdot.evaluate.distribution import frechet, frechet_gaussians, handcrafted, project, sliced_wasserstein


def test_frechet_of_gaussians_is_the_formula():
    mean, shift = np.zeros(3), np.array([1.0, -2.0, 0.5])
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 1.0, 9.0])
    # Commuting covariances: the sum over axes of squared differences of standard deviations.
    assert frechet_gaussians(mean, a, shift, b) == pytest.approx(shift @ shift + 1 + 1 + 0)
    assert frechet_gaussians(mean, a, mean, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_any_covariances_is_that_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((300, 6)) + 0.3
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_samples_nears_that_of_their_distributions():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20000, 4)), 2 * rng.standard_normal((20000, 4)) + 1
    assert frechet(x, y) == pytest.approx(4 * 1 + 4 * 1, rel=0.03)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_sliced_wasserstein_of_a_shift():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 8))
    shift = rng.standard_normal(8)
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x[rng.permutation(500)]) == pytest.approx(0, abs=1e-12)
    expected = np.linalg.norm(shift) / np.sqrt(8)
    assert sliced_wasserstein(x, x + shift, directions=4000) == pytest.approx(expected, rel=0.03)


def test_sliced_wasserstein_of_gaussians_of_other_width():
    """In one dimension W2 of N(0, 1) and N(m, s) is sqrt(m^2 + (s - 1)^2)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8000, 1)), 2 * rng.standard_normal((6000, 1)) + 1.5
    assert sliced_wasserstein(x, y, 4) == pytest.approx(np.hypot(1.5, 1), rel=0.04)


def test_sliced_wasserstein_is_scipys_in_one_dimension():
    """The first power, of shifted samples, where both are the shift."""
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(0).standard_normal((200, 1))
    assert sliced_wasserstein(x, x + 0.7) == pytest.approx(stats.wasserstein_distance(x[:, 0], x[:, 0] + 0.7))


def test_projections_keep_lengths_on_average():
    x = np.random.default_rng(1).standard_normal((300, 100)).astype(np.float32)
    small = project(x, 40)
    assert small.shape == (300, 40) and small.dtype == np.float32
    assert (small**2).sum(1).mean() == pytest.approx((x**2).sum(1).mean(), rel=0.1)


def test_handcrafted_features_see_motion_and_its_direction():
    right, left, still = (handcrafted(moving(shift)) for shift in ((2, 0), (-2, 0), (0, 0)))
    assert right.shape == (195,) and right.dtype == np.float32
    assert np.linalg.norm(right - left) > 3 * np.linalg.norm(right - handcrafted(moving((2, 0))[:5])) + 0.1
    assert np.linalg.norm(right - still) > 0.1


def test_damage_moves_the_distribution_away():
    real = [render(draw_scene(seed, "test")).frames for seed in range(12)]
    features = np.stack([handcrafted(clip) for clip in real])
    distances = []
    for blur, noise in ((0.8, 4), (2, 12), (5, 30)):
        damaged = np.stack([handcrafted(worn(clip, blur, noise)) for clip in real])
        distances.append(sliced_wasserstein(features, damaged))
    assert distances[0] < distances[1] < distances[2]


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="features"):
        sliced_wasserstein(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(InputError, match="two samples"):
        frechet(np.zeros((1, 4)), np.zeros((3, 4)))
