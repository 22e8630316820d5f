"""Which frames, what size, how fast: arithmetic on a :class:`VideoInfo`, decided and explained before any decoding."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vdot.errors import InputError
from vdot.video.source import VideoInfo

CELL = 16  # pixels per side of a token: 8 of the VAE times 2 of the patch
TRAINED_FRAMES = 81  # what the published models are trained on; 21 latent frames
NATIVE_FPS = 16.0  # what they are trained to move at

Mode = Literal["spread", "trim", "resample", "all"]


@dataclass(frozen=True)
class FramePlan:
    """How a source clip becomes the model's input, and the result a file. ``notes`` states every change in words."""

    frame_ids: tuple[int, ...]  # source frame of each output frame, [frame_num], never decreasing
    height: int  # output size, multiples of 16
    width: int
    fps: float  # of the output
    source_fps: float
    source_frames: int
    source_size: tuple[int, int]  # (width, height) as displayed
    frame_num: int  # frames the user gets
    model_frames: int  # 4n+1, at least frame_num
    keeps_timing: bool  # plays at real speed, so that the sound fits
    audio_start: float  # seconds of the source that the output covers
    audio_end: float
    notes: tuple[str, ...] = ()
    mode: str = "spread"

    @property
    def model_ids(self) -> tuple[int, ...]:
        """``frame_ids`` with the last one repeated up to ``model_frames``: what the model is given."""
        return self.frame_ids + self.frame_ids[-1:] * (self.model_frames - self.frame_num)


def plan_frames(
    info: VideoInfo,
    *,
    max_area: int,
    frame_num: int | None = None,
    mode: Mode = "spread",
    mask: VideoInfo | None = None,
    budget_frames: int = TRAINED_FRAMES,
    fps: float | None = None,
) -> FramePlan:
    """Choose frames, size and rate.

    Args:
        info: the source, from :func:`vdot.video.probe`.
        max_area: pixels per output frame at most (480p: 480*832). A smaller source is not enlarged.
        frame_num: exactly this many output frames. None: as many as the clip gives, at most ``budget_frames``.
        mode: "spread" puts them evenly over the whole clip (the original's rule); "trim" takes the first ones at the
            source's rate; "resample" takes ``fps`` frames (default 16) of each second from the beginning; "all" takes
            every frame, whatever the budget.
        mask: frame counts are cut to the shorter of source and mask; a still mask holds for every frame.
        fps: rate of the output instead of the one that keeps the real speed.

    Raises:
        InputError: a number out of range, or a source smaller than 16 pixels on a side.
    """
    _check_numbers(max_area, frame_num, mode, budget_frames, fps)
    height, width = output_size(info.height, info.width, max_area)
    usable, notes = _shared_frames(info, mask)
    times = info.timestamps[:usable]
    ids, chosen = _choose(info, times, max_area, frame_num, mode, budget_frames, fps)
    notes += chosen
    rate, keeps, span, said = _timing(info, times, ids, mode, fps)
    return FramePlan(
        frame_ids=ids,
        height=height,
        width=width,
        fps=rate,
        source_fps=info.fps,
        source_frames=info.frames,
        source_size=(info.width, info.height),
        frame_num=len(ids),
        model_frames=model_frames(len(ids)),
        keeps_timing=keeps,
        audio_start=span[0],
        audio_end=span[1],
        notes=(*notes, *said, *_shape_notes(info, mask, height, width)),
        mode=mode,
    )


def describe(plan: FramePlan) -> str:
    """The plan as a few lines of text: in, used, out, and a line per note."""
    wide, tall = plan.source_size
    distinct = len(set(plan.frame_ids))
    first, last = plan.frame_ids[0], plan.frame_ids[-1]
    lines = [
        f"in    {_count(plan.source_frames)}, {plan.source_fps:.4g} fps, {wide}x{tall}",
        f"used  {distinct} of them, {first} to {last} ({plan.mode}), "
        f"{plan.audio_start:.2f} s to {plan.audio_end:.2f} s",
        f"out   {_count(plan.frame_num)}, {plan.fps:.4g} fps, {plan.frame_num / plan.fps:.2f} s, "
        f"{plan.width}x{plan.height}" + _padding_remark(plan),
    ]
    return "\n".join(lines + [f"note  {note}" for note in plan.notes])


def _count(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"


def _padding_remark(plan: FramePlan) -> str:
    if plan.model_frames == plan.frame_num:
        return ""
    return f" (the model makes {plan.model_frames}; the surplus at the end is cut off)"


# --- the original's arithmetic ---------------------------------------------------------------------------------------


def model_frames(frames: int) -> int:
    """The next 4n+1: the VAE makes one latent of the first frame and one of each four that follow."""
    return 4 * math.ceil((frames - 1) / 4) + 1


def output_size(height: int, width: int, max_area: int) -> tuple[int, int]:
    """Largest ``(height, width)`` in multiples of 16 within ``max_area`` pixels and the source's own size and aspect.

    Raises:
        InputError: a side below 16 pixels.
    """
    if min(height, width) < CELL:
        raise InputError(f"The video is {width}x{height}; each side needs at least {CELL} pixels.")
    return _grid(height, width, min(max_area / CELL**2, (height // CELL) * (width // CELL)))


def _grid(height: int, width: int, cells: float) -> tuple[int, int]:
    rows = round(math.sqrt(cells * height / width))
    rows = min(max(rows, 1), int(cells))  # an extreme aspect would round to no rows, or leave no columns
    return CELL * rows, CELL * int(cells / rows)


def original_rule(
    timestamps: np.ndarray, height: int, width: int, max_area: int, *, max_frames: int | None = None, gap: str = "first"
) -> tuple[tuple[int, ...], int, int]:
    """The original's choice of frames and size: ``(frame_ids, height, width)``, 4n+1 frames over the whole clip.

    As many as a token budget of 81 frames at ``max_area`` allows, so a small video may give several hundred;
    ``max_frames`` caps that. ``gap="first"`` shows frame 0 where the frame times leave a gap, as the original;
    "nearest" the nearest frame.
    """
    tokens = max_area / CELL**2 * 21
    cells = min(max_area / CELL**2, (height // CELL) * (width // CELL))
    latents = min((len(timestamps) - 1) // 4 + 1, int(tokens / cells))
    rows, cols = _grid(height, width, min(cells, int(tokens / latents)))
    if max_frames is not None:
        latents = min(latents, (max_frames - 1) // 4 + 1)
    return _spread(timestamps, 4 * (latents - 1) + 1, gap), rows, cols


def _spread(timestamps: np.ndarray, count: int, gap: str = "nearest") -> tuple[int, ...]:
    """Frames shown at ``count`` even times from 0 to the middle of the last frame."""
    return frames_at(timestamps, np.linspace(0, float(timestamps[-1].mean()), count), gap)


def frames_at(timestamps: np.ndarray, seconds: np.ndarray, gap: str = "nearest") -> tuple[int, ...]:
    """First frame on screen at each time; in a gap between frames the nearest one (or 0 with ``gap="first"``)."""
    starts, ends = timestamps[:, 0].astype(np.float64), timestamps[:, 1].astype(np.float64)
    ids = []
    for time in seconds:
        distance = np.maximum(np.maximum(starts - time, time - ends), 0)
        index = int(distance.argmin())
        ids.append(0 if gap == "first" and distance[index] > 0 else index)
    return tuple(ids)


# --- frames ----------------------------------------------------------------------------------------------------------


def _check_numbers(max_area: int, frame_num: int | None, mode: str, budget_frames: int, fps: float | None) -> None:
    if not max_area >= CELL**2:
        raise InputError(f"The output area is {max_area} pixels; it needs at least {CELL}x{CELL}.")
    if frame_num is not None and frame_num < 1:
        raise InputError(f"frame_num is {frame_num}; it must be at least 1.")
    if budget_frames < 1:
        raise InputError(f"budget_frames is {budget_frames}; it must be at least 1.")
    if mode not in get_args(Mode):
        raise InputError(f"Unknown frame mode {mode!r}: {', '.join(get_args(Mode))}.")
    if mode == "all" and frame_num is not None:
        raise InputError("frame_mode all takes every frame of the clip: leave frame_num out, or use frame_mode trim")
    if fps is not None and not 0 < fps <= 1000:
        raise InputError(f"fps is {fps}; it must lie between 0 and 1000.")


def _shared_frames(info: VideoInfo, mask: VideoInfo | None) -> tuple[int, list[str]]:
    """Frames that source and mask both have; frame i of one belongs to frame i of the other."""
    if mask is None:
        return info.frames, []
    if mask.is_still:
        return info.frames, [] if info.is_still else ["one mask picture holds for all frames"]
    notes = []
    usable = min(info.frames, mask.frames)
    if mask.frames != info.frames:
        notes.append(f"mask has {_count(mask.frames)}, source {info.frames}: both are cut to {usable}")
    if mask.fps and info.fps and abs(mask.fps / info.fps - 1) > 0.01:
        notes.append(
            f"mask plays at {mask.fps:.4g} fps, source at {info.fps:.4g}: they are matched frame by frame, not by time"
        )
    return usable, notes


def _choose(
    info: VideoInfo,
    times: np.ndarray,
    max_area: int,
    frame_num: int | None,
    mode: str,
    budget: int,
    fps: float | None,
) -> tuple[tuple[int, ...], list[str]]:
    if mode == "resample":
        return _choose_resample(times, frame_num, budget, fps or NATIVE_FPS)
    if mode == "all":
        return tuple(range(len(times))), []
    if mode == "trim":
        return _choose_trim(times, frame_num, budget, info.fps)
    if frame_num is None:
        return _choose_original(info, times, max_area, budget)
    ids = _spread(times, frame_num)
    note = f"{_count(len(times))} at {info.fps:.4g} fps are spread over {_count(frame_num)}"
    if len(times) < frame_num:
        note += ", so some are shown twice or more"
    return ids, [] if ids == tuple(range(len(times))) else [note]


def _choose_original(
    info: VideoInfo, times: np.ndarray, max_area: int, budget: int
) -> tuple[tuple[int, ...], list[str]]:
    free, _, _ = original_rule(times, info.height, info.width, max_area, gap="nearest")
    ids, _, _ = original_rule(times, info.height, info.width, max_area, max_frames=budget, gap="nearest")
    count, notes = len(times), []
    if len(ids) < len(free):
        notes.append(f"at most {budget} frames are made at a time, where {len(free)} would fit at this size")
    if len(ids) == count:
        return ids, notes
    if count - len(ids) < 4:
        notes.append(f"{_count(count)} become {len(ids)}, the next lower 4n+1 that the model works in")
    else:
        notes.append(f"{_count(count)} at {info.fps:.4g} fps are spread over {_count(len(ids))}")
        if count > budget:
            notes.append("frame_mode all would make every frame of this clip, in several passes")
    return ids, notes


def _choose_trim(
    times: np.ndarray, frame_num: int | None, budget: int, fps: float
) -> tuple[tuple[int, ...], list[str]]:
    count = frame_num or min(budget, len(times))
    ids = tuple(min(i, len(times) - 1) for i in range(count))
    if count > len(times):
        return ids, [f"source has {_count(len(times))}, {count} were asked for: the last one is held"]
    if count < len(times):
        return ids, [f"the first {count} of {_count(len(times))} are used ({count / fps:.2f} s)"]
    return ids, []


def _choose_resample(
    times: np.ndarray, frame_num: int | None, budget: int, fps: float
) -> tuple[tuple[int, ...], list[str]]:
    duration = float(times[-1, 1])
    available = max(round(duration * fps), 1)
    count = frame_num or min(budget, available)
    # half a frame in, so that a rounding error never decides between two neighbours
    seconds = (np.arange(count) + 0.5) / fps
    ids = frames_at(times, seconds)
    notes = [] if ids == tuple(range(len(times))) else [f"{fps:.4g} frames of each second are used"]
    if count > available:
        notes.append(f"source lasts {duration:.2f} s, {count} frames last {count / fps:.2f} s: the last one is held")
    elif count < available:
        notes.append(f"the first {count / fps:.2f} s of {duration:.2f} s are used")
    return ids, notes


# --- time ------------------------------------------------------------------------------------------------------------


def _timing(
    info: VideoInfo, times: np.ndarray, ids: tuple[int, ...], mode: str, fps: float | None
) -> tuple[float, bool, tuple[float, float], list[str]]:
    """Output fps, whether it plays at real speed, the source seconds it covers, and notes."""
    moving = _moving_frames(ids, mode)
    span = _covered(times, ids, moving, mode, fps)
    real = _real_fps(info, moving, span, mode, fps)
    rate = float(fps or real)
    drift = _drift(times[list(ids[:moving])], rate)
    keeps, notes = True, []
    if not _same(rate, real):
        keeps = False
        notes.append(f"at {rate:.4g} fps it plays {rate / real:.3g} times as fast as the source")
    elif drift > max(0.1, 1.5 / rate):
        keeps = False
        notes.append(f"frame times are irregular: at an even {rate:.4g} fps some frames are {drift:.2f} s off")
    elif not _same(rate, info.fps):
        notes.append(f"{rate:.4g} fps keeps the real speed")
    if info.has_audio and not keeps:
        notes.append("the sound is left out: it would not fit the picture")
    return rate, keeps, span, notes


def _drift(shown: np.ndarray, rate: float) -> float:
    """Largest distance in seconds between when a frame plays at ``rate`` and when the source shows it, ``[N,2]``."""
    plays = np.arange(len(shown)) / rate
    return float(np.maximum(np.maximum(shown[:, 0] - plays, plays - shown[:, 1]), 0).max())


def _same(rate: float, other: float) -> bool:
    return abs(rate - other) <= 0.002 * rate


def _moving_frames(ids: tuple[int, ...], mode: str) -> int:
    """Output frames before the last source frame is held; spread frames repeat by design."""
    if mode == "spread":
        return len(ids)
    return ids.index(ids[-1]) + 1


def _covered(times: np.ndarray, ids: tuple[int, ...], moving: int, mode: str, fps: float | None) -> tuple[float, float]:
    if mode == "resample":
        return 0.0, min(len(ids) / (fps or NATIVE_FPS), float(times[-1, 1]))
    if mode == "spread" and len(ids) > 1:
        return 0.0, float(times[-1, 1])
    return float(times[ids[0], 0]), float(times[ids[moving - 1], 1])


def _real_fps(info: VideoInfo, moving: int, span: tuple[float, float], mode: str, fps: float | None) -> float:
    """Frames over the seconds they cover; the source's own exact rate where that is what it comes to."""
    if mode == "resample":
        return fps or NATIVE_FPS
    seconds = span[1] - span[0]
    if seconds <= 0:
        return info.fps or NATIVE_FPS
    real = moving / seconds
    return info.fps if _same(real, info.fps) else real


def _shape_notes(info: VideoInfo, mask: VideoInfo | None, height: int, width: int) -> list[str]:
    notes = []
    scale = max(height / info.height, width / info.width)
    lost = 1 - height * width / (scale**2 * info.height * info.width)
    if lost > 0.02:
        side = "width" if info.width * scale - width > info.height * scale - height else "height"
        notes.append(f"{lost:.0%} of the {side} is cropped to fit {width}x{height}")
    if abs(info.pixel_aspect - 1) > 0.01:
        notes.append(
            f"pixels of the source are {info.pixel_aspect:.3g} times as wide as high; they are taken as square"
        )
    if mask is None:
        return notes
    if (mask.width, mask.height) != (info.width, info.height):
        notes.append(f"mask is {mask.width}x{mask.height}, source {info.width}x{info.height}: it is resized to match")
    if abs((mask.width / mask.height) / (info.width / info.height) - 1) > 0.02:
        notes.append("mask and source differ in shape: each is cropped around its centre, check that they still align")
    return notes
