"""Draw the inputs under ``assets/examples/<task>/``: a made-up scene in every form that a VACE task takes.

    python scripts/make_examples.py --out assets/examples

A ball bounces and a figure walks over a checkered floor. Depth, flow, pose, scribble, grey and boxes are computed from
the scene itself. White in a mask generates, black keeps; what is unknown in a source is grey.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from vdot.conditioning import UNKNOWN_GREY
from vdot.video import write_image, write_video

FRAMES, WIDTH, HEIGHT, FPS = 49, 832, 480, 16
HORIZON = 190
LIMBS = [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (1, 6), (6, 7), (7, 8), (6, 9), (9, 10)]
PROMPTS = {
    "scene": "A red ball bounces past a person who walks over a checkered floor under a blue sky.",
    "r2v": "A red ball with a white star rolls over the grass.",
}


def ball(t: float) -> tuple[int, int, int]:
    """Centre and radius in pixels at time ``t`` in [0, 1]."""
    return int(140 + 520 * t), int(380 - 170 * abs(np.sin(3 * np.pi * t))), 52


def joints(t: float) -> np.ndarray:
    """Eleven points of the walking figure, ``[11, 2]`` in pixels."""
    x, swing = 650 - 260 * t, 26 * np.sin(6 * np.pi * t)
    body = [(x, 150), (x, 185), (x - 28, 225), (x - 28 + swing, 262), (x + 28, 225), (x + 28 - swing, 262), (x, 275),
            (x + swing / 2, 330), (x + swing, 388), (x - swing / 2, 330), (x - swing, 388)]  # fmt: skip
    return np.array(body)


def frame_of(t: float) -> np.ndarray:
    """The scene as a picture, uint8 ``[H, W, 3]``."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)  # each [H, W]
    sky = np.stack([150 - 0.3 * rows, 190 - 0.1 * rows, 240 - 0 * rows], -1)
    depth = 1 / np.maximum(rows - HORIZON, 1)
    checks = (np.floor((columns - WIDTH / 2) * depth * 3) + np.floor(400 * depth)) % 2 - 0.5
    checks *= np.clip(1.3 - 60 * depth, 0, 1)  # fade where squares get smaller than pixels
    floor = np.stack([165 + 70 * checks, 155 + 70 * checks, 135 + 65 * checks], -1)
    image = np.where((rows > HORIZON)[..., None], floor, sky).clip(0, 255).astype(np.uint8)
    draw_figure(image, joints(t), (60, 70, 130), 16)
    x, y, r = ball(t)
    shade = np.clip(1.15 - np.hypot(columns - x + 16, rows - y + 18) / (2.2 * r), 0.25, 1)[..., None]
    red = (np.array([225, 45, 40]) * shade).astype(np.uint8)
    return np.where((np.hypot(columns - x, rows - y) < r)[..., None], red, image)


def draw_figure(image: np.ndarray, points: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    for a, b in LIMBS:
        cv2.line(image, tuple(points[a].astype(int)), tuple(points[b].astype(int)), colour, width, cv2.LINE_AA)
    cv2.circle(image, tuple(points[0].astype(int)), 20, colour, -1, cv2.LINE_AA)


def depth_of(t: float) -> np.ndarray:
    """Near is bright."""
    rows = np.mgrid[0:HEIGHT, 0:WIDTH][0]
    image = np.repeat(np.clip((rows - HORIZON) * 0.8, 8, 235).astype(np.uint8)[..., None], 3, -1)
    draw_figure(image, joints(t), (150, 150, 150), 16)
    cv2.circle(image, ball(t)[:2], ball(t)[2], (205, 205, 205), -1, cv2.LINE_AA)
    return image


def pose_of(t: float) -> np.ndarray:
    """Limbs in a colour each on black."""
    image, points = np.zeros((HEIGHT, WIDTH, 3), np.uint8), joints(t).astype(int)
    for i, (a, b) in enumerate(LIMBS):
        hue = np.uint8([[[int(180 * i / len(LIMBS)), 255, 255]]])
        colour = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
        cv2.line(image, tuple(points[a]), tuple(points[b]), colour, 6, cv2.LINE_AA)
    return image


def flow_of(t: float) -> np.ndarray:
    """Motion to the next frame on the usual colour wheel: hue is direction, white is still."""
    step = 1 / (FRAMES - 1)
    motion = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    body = np.zeros((HEIGHT, WIDTH), np.uint8)
    draw_figure(body, joints(t), (1, 1, 1), 16)  # type: ignore[arg-type]
    motion[body > 0] = (-260 * step, 0)
    here, there = np.array(ball(t)[:2]), np.array(ball(t + step)[:2])
    disc = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.circle(disc, ball(t)[:2], ball(t)[2], 1, -1)
    motion[disc > 0] = there - here
    length, angle = cv2.cartToPolar(motion[..., 0], motion[..., 1], angleInDegrees=True)
    wheel = np.stack([angle / 2, np.clip(length * 10, 0, 255), np.full_like(length, 255)], -1).astype(np.uint8)
    return cv2.cvtColor(wheel, cv2.COLOR_HSV2RGB)


def layout_of(t: float) -> np.ndarray:
    """Boxes on white, a colour per object."""
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    low, high = joints(t).min(0).astype(int) - 22, joints(t).max(0).astype(int) + 12
    cv2.rectangle(image, tuple(low), tuple(high), (40, 90, 220), 6)
    x, y, r = ball(t)
    cv2.rectangle(image, (x - r, y - r), (x + r, y + r), (220, 40, 40), 6)
    return image


def grey_of(frame: np.ndarray) -> np.ndarray:
    return np.repeat(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None], 3, -1)


def scribble_of(frame: np.ndarray) -> np.ndarray:
    edges = cv2.dilate(cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), 60, 140), np.ones((2, 2), np.uint8))
    return np.repeat(edges[..., None], 3, -1)


def reference(size: int = 400) -> np.ndarray:
    """A ball with a star, cut out on white."""
    image = np.full((size, size, 3), 255, np.uint8)
    cv2.circle(image, (size // 2, size // 2), size // 3, (215, 40, 40), -1, cv2.LINE_AA)
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, size / 14, size / 6)
    star = np.stack([size / 2 + radii * np.cos(turns), size / 2 + radii * np.sin(turns)], -1).astype(np.int32)
    cv2.fillPoly(image, [star], (255, 250, 240), cv2.LINE_AA)
    return image


def box_mask(grow: int = 12) -> np.ndarray:
    """White box around the ball in every frame, ``[T, H, W]``."""
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for i, t in enumerate(np.linspace(0, 1, FRAMES)):
        x, y, r = ball(t)
        mask[i, y - r - grow : y + r + grow, x - r - grow : x + r + grow] = 255
    return mask


def keep(frames: np.ndarray, kept: np.ndarray, filler: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Source and mask that show ``frames`` where ``kept [T, H, W]`` and ``filler`` (grey) elsewhere."""
    unknown = np.full_like(frames, int(UNKNOWN_GREY)) if filler is None else filler
    return np.where(kept[..., None], frames, unknown), np.where(kept, 0, 255).astype(np.uint8)


def examples() -> dict[str, tuple[np.ndarray | None, np.ndarray | None, bool]]:
    """Task -> (source, mask, has a reference)."""
    times = np.linspace(0, 1, FRAMES)
    clip = np.stack([frame_of(t) for t in times])
    controls = {
        "depth": np.stack([depth_of(t) for t in times]),
        "pose": np.stack([pose_of(t) for t in times]),
        "flow": np.stack([flow_of(t) for t in times]),
        "scribble": np.stack([scribble_of(frame) for frame in clip]),
        "gray": np.stack([grey_of(frame) for frame in clip]),
    }
    index = np.broadcast_to(np.arange(FRAMES)[:, None, None], clip.shape[:3])
    columns = np.broadcast_to(np.arange(WIDTH)[None, None], clip.shape[:3])
    centre = (columns >= WIDTH // 4) & (columns < WIDTH - WIDTH // 4)
    inside = box_mask() > 0
    tasks: dict[str, tuple[np.ndarray | None, np.ndarray | None, bool]] = {
        "t2v": (None, None, False),
        "r2v": (None, None, True),
        "layout": (np.stack([layout_of(t) for t in times]), None, False),
        "inpainting": (*keep(clip, ~inside), False),
        "outpainting": (*keep(clip, centre), False),
        "firstframe": (*keep(clip, index == 0), False),
        "lastframe": (*keep(clip, index == FRAMES - 1), False),
        "firstlastframe": (*keep(clip, (index == 0) | (index == FRAMES - 1)), False),
        "firstclip": (*keep(clip, index < 17), False),
        "lastclip": (*keep(clip, index >= FRAMES - 17), False),
        "swap_anything": (*keep(clip, ~inside), True),
        "expand_anything": (*keep(clip, centre), True),
        "animate_anything": (controls["pose"], None, True),
        "move_anything": (*keep(clip, index == 0, np.stack([layout_of(t) for t in times])), False),
    }
    for name, control in controls.items():
        tasks[name] = (control, None, False)
        tasks[f"firstframe_{name}"] = (*keep(clip, index == 0, control), False)
        tasks[f"reference_{name}"] = (control, None, True)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/examples"))
    out = parser.parse_args().out
    for task, (source, mask, has_reference) in examples().items():
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompt.txt").write_text(PROMPTS["r2v" if task == "r2v" else "scene"] + "\n")
        if source is not None:
            write_video(folder / "src_video.mp4", source, FPS)
        if mask is not None:
            write_video(folder / "src_mask.mp4", np.repeat(mask[..., None], 3, -1), FPS)
        if has_reference:
            write_image(folder / "src_ref_image_1.png", reference())
        print(folder)


if __name__ == "__main__":
    main()
