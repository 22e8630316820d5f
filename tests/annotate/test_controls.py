"""Controls against closed forms: luma weights, the flow of a shifted texture, the wheel's own numbers, depth order."""

import cv2
import numpy as np
import pytest

from vdot.annotate import CONTROLS, control
from vdot.annotate.depth import depth_picture
from vdot.annotate.flow import colour_wheel, dis, draw_flow
from vdot.data.sprites import draw_scene, render
from vdot.errors import InputError, MissingDependencyError


def texture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    grey = cv2.GaussianBlur(rng.uniform(0, 255, (height, width)).astype(np.float32), (0, 0), 2)
    grey = np.clip((grey - grey.mean()) * 5 + 128, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def shifted(steps: int, dx: int, dy: int) -> np.ndarray:
    """A window of 96x128 over a texture that moves by (dx, dy) pixels a frame."""
    still, room = texture(200, 240), 50
    at = [(room - t * dy, room - t * dx) for t in range(steps)]
    return np.stack([still[y : y + 96, x : x + 128] for y, x in at])


def test_gray_is_rec_601_luma():
    frames = np.random.default_rng(1).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    luma = frames @ np.array([0.299, 0.587, 0.114])
    found = control("gray", frames)
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert np.abs(found - luma[..., None]).max() <= 1  # rounding


def test_flow_of_a_translating_texture():
    flow = dis()(shifted(3, 3, -2))
    assert flow.shape == (2, 96, 128, 2)
    inside = flow[:, 12:-12, 12:-12]
    assert np.abs(inside.mean((0, 1, 2)) - (3, -2)).max() < 0.1
    assert np.linalg.norm(inside - (3, -2), axis=-1).mean() < 0.3  # pixels


def test_colour_wheel_and_what_it_means():
    """The published wheel: 55 colours, red to the right, yellow down, cyan left, blue-violet up; white is still."""
    wheel = colour_wheel()
    assert wheel.shape == (55, 3)
    # Corners at the sums of 15, 6, 4, 11, 13, 6; floor(255 * 1 / 15) = 17 is the first step.
    assert wheel[[0, 15, 21, 25, 36, 49]].tolist() == [
        [255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255],
    ]  # fmt: skip
    assert wheel[1].tolist() == [255, 17, 0] and wheel[26].tolist() == [0, 255 - 23, 255]
    field = np.zeros((1, 1, 6, 2))
    field[0, 0, 1:5] = [(2, 0), (0, 2), (-2, 0), (0, -2)]
    field[0, 0, 5] = (1, 0)
    drawn = draw_flow(field)[0, 0].tolist()
    assert drawn[0] == [255, 255, 255]
    assert drawn[1] == [255, 0, 0]
    # A quarter turn is 13.5 steps on: halfway between steps 13 and 14, floor(255 * 13 / 15) = 221 and 238 of green.
    assert drawn[2] == [255, 229, 0]
    assert drawn[3] == [0, 255 - 46, 255]  # step 27, two after cyan: floor(255 * 2 / 11) = 46
    assert drawn[4][2] == 255 and drawn[4][0] > 60 and drawn[4][1] == 0  # step 40.5, between blue and magenta
    assert drawn[5] == pytest.approx([255, 127.5, 127.5], abs=1)  # half as fast is half as full


def test_flow_picture_shows_the_motion_that_led_to_a_frame():
    picture = control("flow", shifted(3, 3, 0))
    assert picture.shape == (3, 96, 128, 3)
    assert (picture[0] == picture[1]).all()
    middle = picture[1:, 20:-20, 20:-20].reshape(-1, 3).mean(0)
    assert middle[0] > 240 and middle[1] < 90 and middle[2] < 90  # to the right is red
    still = control("flow", np.repeat(shifted(1, 0, 0), 2, 0))
    assert (control("flow", shifted(1, 0, 0)) == 255).all() and still.shape == (2, 96, 128, 3)


def test_scribble_lies_on_edges_and_nowhere_else():
    frames = np.full((2, 80, 120, 3), 40, np.uint8)
    frames[:, 20:60, 30:90] = 220
    lines = control("scribble", frames)
    assert set(np.unique(lines)) == {0, 255}
    border = np.zeros((80, 120), np.uint8)
    cv2.rectangle(border, (30, 20), (89, 59), 1, 1)
    near = cv2.dilate(border, np.ones((3, 3), np.uint8)) > 0
    assert not lines[..., 0][:, ~near].any()
    covered = cv2.dilate(lines[0, ..., 0], np.ones((3, 3), np.uint8)) > 0
    assert covered[border > 0].mean() > 0.98


def test_scribble_agrees_with_the_worlds_outlines():
    """F1 against the drawn truth within a pixel, mean over scenes: Canny finds patterns the truth has too."""
    from vdot.evaluate.control import edge_scores

    scores = []
    for seed in range(6):
        clip = render(draw_scene(seed))
        found = control("scribble", clip.frames[:2])[..., 0] > 0
        scores.append(edge_scores(found, clip.scribble[:2, ..., 0] > 0, 1.0)[2])
    assert np.mean(scores) > 0.75


def test_depth_picture_keeps_the_order_of_the_world():
    """Disparity at any scale and offset becomes near white, far black, one scale for the clip."""
    clip = render(draw_scene(4))
    true = clip.depth[..., 0].astype(np.float32)
    picture = depth_picture(clip.frames, lambda frames: 0.003 * true - 7)
    assert picture.min() == 0 and picture.max() == 255
    pairs = np.random.default_rng(0).integers(0, true.size, (2, 4000))
    a, b = true.ravel()[pairs]
    x, y = picture[..., 0].astype(int).ravel()[pairs]
    clear = np.abs(a - b) > 3
    assert (np.sign(a - b) == np.sign(x - y))[clear].all()
    flat = depth_picture(clip.frames, lambda frames: np.full(frames.shape[:3], np.nan, np.float32))
    assert (flat == 0).all()  # no depth at all is not an error of arithmetic


@pytest.mark.parametrize("kind", ["depth", "depthv2"])
def test_depth_without_a_model_says_what_to_do(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("VDOT_ANNOTATORS", str(tmp_path))
    with pytest.raises(
        MissingDependencyError, match=r"Depth-Anything-V2-Small-hf into models/annotators/depth_anything"
    ):
        control(kind, shifted(2, 0, 0))


def test_what_is_not_a_control_or_not_its_backend():
    frames = shifted(2, 0, 0)
    with pytest.raises(InputError, match="unknown control 'deep'"):
        control("deep", frames)
    with pytest.raises(InputError, match="has no use for the backend sam2: it can use raft, dis"):
        control("flow", frames, "sam2")
    with pytest.raises(InputError, match="unknown backend 'rafft'"):
        control("flow", frames, "rafft")
    with pytest.raises(InputError, match="uint8"):
        control("gray", frames.astype(np.float32))
    assert CONTROLS == ("depth", "depthv2", "flow", "gray", "scribble", "pose", "pose_body")
