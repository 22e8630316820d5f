"""Every metric against a closed form, a known change, or another library; and monotone under growing corruption."""

from dataclasses import replace
from itertools import pairwise

import cv2
import numpy as np
import pytest

from tests.evaluate.conftest import moving, noise_picture, worn
from vdot.data.sprites import COLOURS, draw_scene, draw_task, render
from vdot.data.sprites.layers import portrait
from vdot.data.sprites.render import draw_flow
from vdot.errors import InputError
from vdot.evaluate import control, fields, identity, kept, motion, picture


def flat(*levels: int, size: int = 32) -> np.ndarray:
    """One grey frame per level."""
    return np.stack([np.full((size, size, 3), level, np.uint8) for level in levels])


# --- kept ------------------------------------------------------------------------------------------------------------


def test_psnr_of_one_changed_pixel_is_the_closed_form(texture):
    changed = texture.copy()
    changed[2, 10, 11] = 255 - changed[2, 10, 11]
    error = ((changed.astype(float) - texture) ** 2).sum() / texture.size
    assert kept.psnr(changed, texture) == pytest.approx(10 * np.log10(255**2 / error))
    mask = np.zeros(texture.shape[:3], np.uint8)
    mask[2, 10, 11] = 255
    assert kept.kept_psnr(changed, texture, mask) == kept.EQUAL  # the one pixel may change
    mask[:] = 255
    mask[2, 10, 11] = 0
    only = ((changed[2, 10, 11].astype(float) - texture[2, 10, 11]) ** 2).mean()
    assert kept.kept_psnr(changed, texture, mask) == pytest.approx(10 * np.log10(255**2 / only))
    mask[:] = 255
    assert kept.kept_psnr(changed, texture, mask) is None  # nothing is kept: not measured, and not 0
    assert kept.kept_ssim(changed, texture, mask) is None


def test_ssim_is_the_published_formula(texture):
    """Against the sums of the paper written out with scipy's filter."""
    ndimage = pytest.importorskip("scipy.ndimage")
    other = worn(texture, 0.8, 4)

    def window(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5)

    expected = []
    for x, y in zip(fields.luminance(texture).astype(float), fields.luminance(other).astype(float), strict=True):
        mx, my = window(x), window(y)
        vx, vy, vxy = window(x * x) - mx**2, window(y * y) - my**2, window(x * y) - mx * my
        c1, c2 = 6.5025, 58.5225
        top, bottom = (2 * mx * my + c1) * (2 * vxy + c2), (mx**2 + my**2 + c1) * (vx + vy + c2)
        expected.append((top / bottom)[5:-5, 5:-5].mean())
    assert kept.ssim(texture, other) == pytest.approx(np.mean(expected), abs=1e-6)
    assert kept.ssim(texture, texture) == pytest.approx(1)


@pytest.mark.parametrize("step", [0, 7, 40])
def test_a_seam_of_a_known_step_is_that_step(step):
    source = flat(*[100] * 3)
    mask = np.zeros(source.shape[:3], np.uint8)
    mask[:, 8:20, 9:25] = 255
    output = np.where(mask[..., None] > 0, source + np.uint8(step), source)
    assert kept.seam(output, mask) == pytest.approx(step)
    assert kept.seam(output, mask, source) == pytest.approx(step)
    assert kept.seam(output, mask, output) == pytest.approx(0)  # the truth has that edge as well


def test_a_slope_across_the_border_is_no_seam():
    ramp = np.broadcast_to((np.arange(32) * 6)[None, None, :, None], (2, 32, 32, 3)).astype(np.uint8)
    mask = np.zeros(ramp.shape[:3], np.uint8)
    mask[:, :, 16:] = 255
    assert kept.seam(ramp, mask) == pytest.approx(0)
    assert kept.seam(ramp, np.zeros_like(mask)) is None
    assert kept.seam(ramp, np.full_like(mask, 255)) is None


# --- motion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dis", "farneback"])
@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (2, 2)])
def test_flow_of_a_clip_that_moves_is_its_shift(shift, method):
    flow = fields.optical_flow(moving(shift), method)[:, 8:-8, 8:-8]
    np.testing.assert_allclose(flow.mean((0, 1, 2)), shift, atol=0.1)
    assert np.linalg.norm(flow - shift, axis=-1).mean() < 0.2


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_clip_moved_by_d_pixels_a_frame_has_flow_error_d(d):
    still = moving((0, 0))
    assert motion.flow_error(moving((d, 0)), still) == pytest.approx(d, rel=0.1)
    assert motion.flow_error(moving((d, 0)), moving((d, 0))) == 0
    assert motion.motion_amount(moving((d, 0))) == pytest.approx(d / 64, rel=0.1)


def test_a_still_does_not_move_nor_flicker():
    still = moving((0, 0))
    assert motion.motion_amount(still) == pytest.approx(0, abs=1e-4)
    assert motion.motion_jerk(still) == pytest.approx(0, abs=0.05)
    assert motion.flicker(still) == pytest.approx(0, abs=1e-3)
    assert motion.still_flicker(still, still) == 0


def test_flat_pictures_with_noise_do_not_move():
    noisy = worn(np.full((5, 64, 64, 3), 120, np.uint8), 0, 4)
    assert motion.motion_amount(noisy) < 0.001


@pytest.mark.parametrize("k", [2, 6])
def test_alternating_brightness_flickers_by_its_swing(k):
    clip = flat(*[100, 100 + k] * 4)
    assert motion.flicker(clip) == pytest.approx(k)
    assert motion.still_flicker(clip, flat(*[100] * 8)) == pytest.approx(k / 2)
    assert motion.still_flicker(clip, flat(*range(100, 180, 10))) is None  # nothing in the truth is still


def test_uniform_motion_is_smooth_and_shuffled_frames_are_not():
    clip = moving((2, 1), 9)
    mixed = clip[np.random.default_rng(0).permutation(9)]
    assert motion.motion_jerk(clip) < 0.2
    assert motion.motion_jerk(mixed) > 1
    assert motion.flicker(clip) < 4 < motion.flicker(mixed)


@pytest.mark.parametrize("measure", [motion.motion_amount, motion.motion_jerk, motion.flicker])
def test_one_frame_has_no_motion_to_measure(measure):
    assert measure(flat(100)) is None
    assert motion.flow_error(flat(100), flat(100)) is None


# --- picture ---------------------------------------------------------------------------------------------------------


def test_sharpness_is_the_ratio_of_laplacian_variances(texture):
    assert picture.sharpness(texture, texture) == 0
    grey = fields.luminance(texture).astype(float)
    inner = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * grey[:, 1:-1, 1:-1]
    assert picture.laplacian_variance(texture) == pytest.approx(inner.var((1, 2)).mean(), rel=0.1)  # but for borders
    assert picture.sharpness(texture, flat(*[90] * 5, size=64)) is None


def test_drift_is_the_change_between_first_and_last_quarter():
    clip = flat(*range(100, 116, 2))
    assert picture.brightness_drift(clip) == pytest.approx(12)  # 101 to 113
    assert picture.saturation_drift(clip) == 0
    clip[..., 2] -= 50
    clip[-2:, ..., 2] -= 20
    assert picture.saturation_drift(clip) == pytest.approx(20)
    assert picture.brightness_drift(clip[:3]) is None


# --- control ---------------------------------------------------------------------------------------------------------


def test_edges_within_tolerance_count_and_others_do_not():
    given = np.zeros((1, 32, 32), bool)
    given[0, 10] = True
    for off, expected in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert control.edge_scores(np.roll(given, off, 1), given, 1.0)[2] == expected
    half = given.copy()
    half[0, :, :16] = False
    precision, recall, f1 = control.edge_scores(half, given, 1.0)
    assert (precision, recall) == (1, 17 / 32)  # the pixel next to the end is within reach
    assert f1 == pytest.approx(2 * recall / (1 + recall))
    nothing = np.zeros_like(given)
    assert control.edge_scores(nothing, given, 1.0) == (None, 0.0, 0.0)
    assert control.edge_scores(nothing, nothing, 1.0) == (None, None, 1.0)


def test_a_flow_picture_is_read_back():
    clip = render(draw_scene(3, "test"))
    read = control.read_flow(clip.flow_picture)
    length = np.linalg.norm(clip.flow, axis=-1)
    within = length < 0.05 * 64
    assert np.linalg.norm(read - clip.flow, axis=-1)[within].max() < 0.12  # hue has steps of two degrees
    np.testing.assert_allclose(np.linalg.norm(read, axis=-1)[~within], 3.2, atol=0.05)


def test_flow_control_of_a_known_shift():
    clip = moving((2, 0))
    given = np.zeros((*clip.shape[:3], 2), np.float32)
    given[..., 0] = 1
    assert control.flow_control_error(clip, draw_flow(given, 64)) == pytest.approx(1, abs=0.15)
    given[..., 0] = 2
    assert control.flow_control_error(clip, draw_flow(given, 64)) < 0.25


def test_grey_error_is_the_mean_difference():
    assert control.gray_error(flat(100, 120), flat(90, 130)) == 10
    where = np.zeros((2, 32, 32), bool)
    where[0] = True
    assert control.gray_error(flat(100, 120), flat(90, 120), where) == 10
    assert control.gray_error(flat(100), flat(90), where[1:]) is None


def test_box_overlap_is_the_ratio_of_areas():
    mask = np.zeros((1, 1, 32, 32), bool)
    mask[0, 0, 10:20, 10:20] = True
    assert control.box_overlap(mask, np.array([[[10, 10, 20, 20]]])) == 1
    assert control.box_overlap(mask, np.array([[[15, 10, 25, 20]]])) == pytest.approx(50 / 150)
    assert control.box_overlap(mask, np.array([[[0, 0, 5, 5]]])) == 0
    assert control.box_overlap(mask, np.zeros((1, 1, 4), int)) is None
    assert control.box_overlap(np.zeros_like(mask), np.array([[[0, 0, 5, 5]]])) == 0  # asked for and not there


def test_a_body_on_its_limbs_and_away_from_them():
    task = draw_task(1, "pose", "test")
    people = [i + 1 for i, thing in enumerate(task.scene.things) if thing.shape == "person"]
    clip = render(task.scene)
    body = np.isin(clip.masks, people)
    reach = 0.24 * task.scene.things[people[0] - 1].radius * 64
    on, off = (control.skeleton_overlap(np.roll(body, k, 2), task.src_video, reach) for k in (0, 32))
    assert on > 0.75 > 0.2 > off
    assert control.skeleton_overlap(body, np.zeros_like(task.src_video), reach) is None


@pytest.mark.parametrize(
    ("task", "measure", "sign"),
    [
        ("scribble", control.scribble_f1, 1),
        ("depth", control.depth_edges, 1),
        ("gray", control.gray_error, -1),
        ("gray", control.gray_ssim, 1),
        ("flow", control.flow_control_error, -1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_truth_follows_its_control_and_another_clip_does_not(task, measure, sign):
    made = [draw_task(seed, task, "test") for seed in range(8)]
    own = np.mean([measure(clip.video, clip.src_video) for clip in made])
    other = np.mean([measure(made[i - 1].video, clip.src_video) for i, clip in enumerate(made)])
    assert sign * own > sign * other
    assert abs(own - other) > 0.4 * max(abs(own), abs(other))


def test_scores_fall_as_corruption_grows():
    made = [draw_task(seed, "scribble", "test") for seed in range(4)]
    greys = [draw_task(seed, "gray", "test") for seed in range(4)]
    levels = [(0, 0), (0.7, 4), (1.2, 8), (2.5, 16)]

    def falls(values: list[float]) -> bool:
        return all(a > b for a, b in pairwise(values))

    def series(clips: list, measure, target) -> list[float]:
        worse = ([worn(c.video, *level) if level[1] else c.video for c in clips] for level in levels)
        return [float(np.mean([measure(f, target(c)) for f, c in zip(fs, clips, strict=True)])) for fs in worse]

    assert falls(series(made, kept.psnr, lambda c: c.video))
    assert falls(series(made, kept.ssim, lambda c: c.video))
    assert falls(series(made, control.scribble_f1, lambda c: c.src_video))
    assert falls(series(greys, control.gray_ssim, lambda c: c.src_video))
    assert falls([-value for value in series(greys, control.gray_error, lambda c: c.src_video)])
    assert falls([-value for value in series(made, lambda f, _: motion.flicker(f), lambda c: c.video)])


def test_blur_lowers_sharpness_by_octaves():
    clips = [render(draw_scene(seed, "test")).frames for seed in range(3)]
    values = [np.mean([picture.sharpness(worn(c, sigma, 0), c) for c in clips]) for sigma in (0.5, 0.8, 1.2, 2)]
    assert 0 > values[0] > values[1] > values[2] > values[3]


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_reference_is_like_its_own_thing_and_unlike_another():
    own, other = [], []
    for seed in range(10):
        task, strange = draw_task(seed, "r2v", "test"), draw_task(seed + 50, "r2v", "test")
        mask = render(task.scene).masks == task.things[0] + 1
        own.append(identity.reference_similarity(task.references[0], task.video, mask))
        other.append(identity.reference_similarity(strange.references[0], task.video, mask))
    (colour, gradient), (no_colour, no_gradient) = np.mean(own, 0), np.mean(other, 0)
    assert colour > 0.8 > 0.5 > no_colour
    assert gradient > 0.75 > no_gradient


def test_without_a_mask_the_best_window_finds_the_reference():
    scene = next(s for s in (draw_scene(k, "test", things=1) for k in range(50)) if s.things[0].pattern == "plain")
    frames = render(scene).frames
    wrong = next(rgb for name, rgb in COLOURS.items() if name != scene.things[0].colour)
    right = identity.reference_similarity(portrait(scene.things[0], 64), frames)
    strange = identity.reference_similarity(portrait(replace(scene.things[0], rgb=wrong), 64), frames)
    assert right[0] > strange[0]
    assert identity.reference_similarity(np.full((8, 8, 3), 255, np.uint8), frames) == (None, None)


def test_colour_histograms_are_shares():
    planes = identity.colour_planes(noise_picture())
    np.testing.assert_allclose(planes.sum(-1), 1, atol=1e-5)
    assert identity.colour_planes(np.zeros((1, 1, 3), np.uint8))[0, 0, 0] == 1


def test_wrong_arrays_are_refused(texture):
    with pytest.raises(InputError, match="uint8"):
        motion.motion_amount(texture.astype(np.float32))
    with pytest.raises(InputError, match="differ in shape"):
        kept.psnr(texture, texture[:2])
    with pytest.raises(InputError, match="reference"):
        identity.reference_similarity(texture, texture)


def test_lab_is_the_one_of_the_standard():
    """Of pure red and middle grey, published values."""
    found = fields.lab(np.array([[255, 0, 0], [119, 119, 119]], np.uint8))
    np.testing.assert_allclose(found, [[53.24, 80.09, 67.2], [50.03, 0, 0]], atol=0.2)


def test_warp_undoes_a_shift():
    picture_ = noise_picture()
    flow = np.zeros((64, 64, 2), np.float32)
    flow[..., 0] = 3
    np.testing.assert_array_equal(fields.warp(picture_, flow)[:, :-3], picture_[:, 3:].astype(np.float32))


def test_worn_is_worn():
    """The helper that other tests lean on."""
    clip = np.full((2, 64, 64, 3), 128, np.uint8)
    assert worn(clip, 1, 5).std() == pytest.approx(5, rel=0.05)
    assert cv2.PSNR(clip[0], worn(clip, 0, 5)[0]) == pytest.approx(10 * np.log10(255**2 / 25), abs=0.3)
