"""What was asked for, checked and turned into pixels: any mix of source video, mask and references.

Files are resampled as the frame plan says; arrays are used as they are. Every fix is stated in ``notes``.
"""

import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vdot.chunks import Chunk, chunk_length, describe_chunks, plan_chunks
from vdot.conditioning import Condition, explain_mask
from vdot.config import merge_config
from vdot.errors import CheckpointError, ConfigError, InputError
from vdot.video import (
    FramePlan,
    VideoInfo,
    describe,
    is_image,
    letterbox,
    plan_frames,
    probe,
    read_frames,
    read_image,
    read_mask,
    to_model,
)
from vdot.video.plan import CELL, TRAINED_FRAMES, Mode, model_frames

Media = str | Path | np.ndarray
MODES = get_args(Mode)
MAX_PIXELS = 2**31  # of a whole clip, 66 times 81 frames at 480p: more is a slip of the keyboard
MAX_AREA = 4096 * 2304  # of a frame
MAX_FRAMES = 2**16
MAX_SEED = 2**63 - 1
NAMED_SIZES = {"480p": (832, 480), "720p": (1280, 720)}  # width, height
TRAINED_REFERENCES = 3
PIECE = 64  # frames of a long clip's mask that are read at a time
DEFAULTS_FILE = "defaults.json"


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint generates when nothing else is said; beside its weights as ``defaults.json``."""

    size: str = "480p"
    frame_num: int = 81
    fps: float = 16.0
    negative_prompt: str = (
        "overexposed, static, blurred details, subtitles, painting, still picture, grey overall, worst quality, "
        "low quality, compression artefacts, ugly, incomplete, extra fingers, badly drawn hands, badly drawn face, "
        "deformed, disfigured, fused fingers, cluttered background, three legs, crowded background, walking backwards"
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = DEFAULTS_FILE) -> "Defaults":
        """Build from JSON. ``CheckpointError`` names what does not fit."""
        try:
            return merge_config(cls(), values, where)
        except ConfigError as error:
            raise CheckpointError(f"{error}: is the checkpoint from a newer version?") from error

    def save(self, folder: Path | str) -> None:
        Path(folder, DEFAULTS_FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Request:
    """One generation. Media are paths, or uint8 arrays ``[T,H,W,3]`` / ``[T,H,W]`` / ``[H,W,3]`` used as they are."""

    prompt: str
    negative_prompt: str | None = None
    src_video: Media | None = None
    src_mask: Media | None = None
    src_ref_images: Sequence[Media] | Media | None = None
    size: str | None = None
    frame_num: int | None = None
    frame_mode: str = "spread"
    fps: float | None = None
    keep_source: bool = True
    feather: float = 8.0
    context_scale: float = 1.0
    seed: int = 2025
    chunk_frames: int | None = None  # of one pass; default: what the checkpoint makes at a time
    chunk_overlap: int | None = None  # frames that a chunk shares with the one before
    chunk_anchor: bool = True  # hold later chunks to the first one's colours


@dataclass(frozen=True)
class Prepared:
    """A request as the model gets it, and what is needed to make a file of the result."""

    condition: Condition  # of the only pass, or of the first chunk of a long clip
    frame_num: int  # frames the user gets, at most model_frames(frame_num) are made
    fps: float
    plan: FramePlan | None = None  # of a source file
    source: np.ndarray | None = None  # uint8 [model_frames, H, W, 3]
    references: tuple[np.ndarray, ...] = ()  # uint8 [H, W, 3] as letterboxed
    has_audio: bool = False
    notes: tuple[str, ...] = field(default_factory=tuple)
    chunks: tuple[Chunk, ...] = ()  # passes; none given is one
    mask: np.ndarray | None = None  # uint8 [model_frames, H, W], 255 generates; as a picture where one pass is all
    chunk_anchor: bool = True

    def __post_init__(self) -> None:
        if not self.chunks:
            object.__setattr__(self, "chunks", (Chunk(0, self.condition.frames),))
        if self.mask is None and self.condition.mask is not None:
            object.__setattr__(self, "mask", _bytes(self.condition.mask).numpy())

    def lines(self) -> list[str]:
        """The plan in words."""
        c = self.condition
        if self.plan is not None:
            head = describe(replace(self.plan, notes=())).splitlines()
        else:
            made = model_frames(self.frame_num)
            surplus = "" if made == self.frame_num else f" (the model makes {made}; the surplus is cut off)"
            count = "1 frame" if self.frame_num == 1 else f"{self.frame_num} frames"
            head = [f"out   {count}, {self.fps:.4g} fps, {c.width}x{c.height}{surplus}"]
        if c.references:
            head.append(f"refs  {len(c.references)} image(s), letterboxed on white to {c.width}x{c.height}")
        head += describe_chunks(self.chunks, self.frame_num, self.chunk_anchor)
        return head + [f"note  {note}" for note in self.notes]


def parse_size(size: str) -> tuple[int, int]:
    """ "480p", "720p" or "W*H" -> (width, height). ``InputError`` for anything else or not in multiples of 16."""
    name = str(size).strip().lower()
    if name in NAMED_SIZES:
        return NAMED_SIZES[name]
    match = re.fullmatch(r"([0-9]{1,9})\s*[*x\u00d7]\s*([0-9]{1,9})", name)
    if match is None:
        raise InputError(f'size {size!r} is not understood: use "480p", "720p" or "W*H", for example "832*480"')
    width, height = int(match[1]), int(match[2])
    if width % CELL or height % CELL or not width or not height:
        near = "*".join(str(max(CELL, round(v / CELL) * CELL)) for v in (width, height))
        raise InputError(f'size {size!r} must have both sides in multiples of {CELL}: the nearest is "{near}"')
    return width, height


def prepare(request: Request, defaults: Defaults) -> Prepared:
    """Check ``request``, read its files and lay out the condition. ``InputError`` names what does not fit."""
    _check(request)
    width, height = parse_size(request.size or defaults.size)
    if request.src_video is None:
        frames = request.frame_num or defaults.frame_num
        _check_volume(frames, height, width)
        notes: list[str] = []
        chunks = _chunks(request, frames, defaults, notes)
        shown, references = _references(request.src_ref_images, height, width, notes)
        condition = Condition(chunks[0].frames, height, width, references=references)
        rate, anchored = request.fps or defaults.fps, request.chunk_anchor
        return Prepared(
            condition, frames, rate, references=shown, notes=tuple(notes), chunks=chunks, chunk_anchor=anchored
        )
    if isinstance(request.src_video, np.ndarray):
        return _from_array(request, request.src_video, defaults)
    return _from_file(request, request.src_video, width * height, defaults)


def _chunks(request: Request, frames: int, defaults: Defaults, notes: list[str]) -> tuple[Chunk, ...]:
    """The passes that make ``frames`` frames."""
    length = request.chunk_frames or chunk_length(defaults.frame_num)
    most = max(chunk_length(defaults.frame_num), TRAINED_FRAMES)
    chunks = plan_chunks(frames, length, request.chunk_overlap)
    if chunks[0].frames > most:
        notes.append(f"{chunks[0].frames} frames at a time are more than this model was trained on: it may drift")
    return chunks


def _check(request: Request) -> None:
    _check_prompts(request)
    _check_whole("chunk_frames", request.chunk_frames, 1, MAX_FRAMES)
    _check_whole("chunk_overlap", request.chunk_overlap, 1, MAX_FRAMES)
    _check_whole("frame_num", request.frame_num, 1, MAX_FRAMES)
    _check_whole("seed", request.seed, 0, MAX_SEED)
    _check_real("context_scale", request.context_scale, 0, math.inf)
    _check_real("feather", request.feather, 0, math.inf)
    _check_real("fps", request.fps, 0.01, 1000)
    if request.frame_mode not in MODES:
        raise InputError(f"unknown frame_mode {request.frame_mode!r}: use {', '.join(MODES)}")
    for name in ("src_video", "src_mask"):
        value = getattr(request, name)
        if not isinstance(value, str | Path | np.ndarray | None):
            raise InputError(f"{name} must be a path or a uint8 array, got {type(value).__name__}")
    if request.src_mask is not None and request.src_video is None:
        raise InputError("a mask needs the source video it belongs to: add --src_video, or leave --src_mask out")


def _check_prompts(request: Request) -> None:
    if not isinstance(request.prompt, str) or not request.prompt.strip():
        raise InputError("the prompt is empty: describe the video in a sentence")
    if not isinstance(request.negative_prompt, str | None):
        raise InputError(f"negative_prompt must be text, got {type(request.negative_prompt).__name__}")
    try:
        (request.prompt + (request.negative_prompt or "")).encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid text: it holds bytes that are not UTF-8") from error


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        limit = f"at least {low}" if number < low else f"at most {high}"
        raise InputError(f"{name} must be {limit}, got {value!r}")


def _check_real(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    if not isinstance(value, Real) or not math.isfinite(value) or not low <= float(value) <= high:
        upper = "up" if math.isinf(high) else f"to {high:g}"
        raise InputError(f"{name} must be a number from {low:g} {upper}, got {value!r}")


def _check_volume(frames: int, height: int, width: int) -> None:
    if height * width > MAX_AREA:
        raise InputError(f"frames of {width}x{height} are more than one run can hold: use a smaller size")
    if frames * height * width > MAX_PIXELS:
        most = MAX_PIXELS // (height * width)
        raise InputError(f"{frames} frames of {width}x{height} are more than one run can hold: use at most {most}")


def _from_file(request: Request, path: str | Path, max_area: int, defaults: Defaults) -> Prepared:
    info = probe(path)
    mask_file = request.src_mask if isinstance(request.src_mask, str | Path) else None
    plan = plan_frames(
        info,
        max_area=max_area,
        frame_num=request.frame_num,
        mode=request.frame_mode,  # type: ignore[arg-type]
        mask=None if mask_file is None else _probe_mask(mask_file),
        budget_frames=defaults.frame_num,
        fps=request.fps,
    )
    size = (plan.height, plan.width)
    _check_volume(plan.model_frames, *size)
    notes = list(plan.notes)
    chunks = _chunks(request, plan.frame_num, defaults, notes)
    source = read_frames(path, plan.model_ids, size)
    mask = None
    if mask_file is not None:
        read = partial(read_mask, mask_file, height=plan.height, width=plan.width)
        mask = _in_pieces(read, plan.model_ids, len(chunks) > 1)
    elif request.src_mask is not None:
        mask = _mask_array(request.src_mask, plan.frame_num, *size, notes, len(chunks) > 1)
    return _finish(request, source, mask, plan.frame_num, plan.fps, notes, chunks, plan, info.has_audio)


def _probe_mask(path: str | Path) -> VideoInfo:
    return probe(path, allow_image=True)


def _from_array(request: Request, frames: np.ndarray, defaults: Defaults) -> Prepared:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"src_video must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    count, height, width = frames.shape[:3]
    if height % CELL or width % CELL:
        raise InputError(f"a src_video array is used as it is: H and W must be multiples of {CELL}: {height}x{width}")
    _check_volume(request.frame_num or count, height, width)
    notes: list[str] = []
    if request.size is not None and parse_size(request.size) != (width, height):
        notes.append(f"size {request.size} is not used: the source array is {width}x{height}")
    asked = request.frame_num or count
    chunks = _chunks(request, asked, defaults, notes)
    mask = None
    if isinstance(request.src_mask, str | Path):
        mask = _mask_file(request.src_mask, count, height, width, len(chunks) > 1)
    elif request.src_mask is not None:
        mask = _mask_array(request.src_mask, count, height, width, notes, len(chunks) > 1)
    if asked < count:
        notes.append(f"the first {asked} of the source array's {count} frames are used")
    elif asked > count:
        notes.append(f"the source array has {count} frames, {asked} were asked for: the last one is held")
    mask = None if mask is None else mask[:asked]
    return _finish(request, frames[:asked], mask, asked, request.fps or defaults.fps, notes, chunks, None)


def _finish(
    request: Request,
    source: np.ndarray,
    mask: Tensor | None,
    frame_num: int,
    fps: float,
    notes: list[str],
    chunks: tuple[Chunk, ...],
    plan: FramePlan | None,
    has_audio: bool = False,
) -> Prepared:
    total, first = model_frames(frame_num), chunks[0].frames
    source = np.concatenate([source, *[source[-1:]] * (total - len(source))])
    begin = None
    if mask is not None:
        mask = torch.cat([mask, *[mask[-1:]] * (total - len(mask))])
        notes += explain_mask(source, mask.numpy())
        begin = mask[:first] if mask.is_floating_point() else mask[:first].float().div_(255)
    height, width = source.shape[1:3]
    shown, references = _references(request.src_ref_images, height, width, notes)
    condition = Condition(first, height, width, to_model(source[:first]), begin, references)
    picture = None if mask is None else _bytes(mask).numpy()
    anchored = request.chunk_anchor
    return Prepared(condition, frame_num, fps, plan, source, shown, has_audio, tuple(notes), chunks, picture, anchored)


def _bytes(mask: Tensor) -> Tensor:
    """A mask in [0, 1] as grey levels; one that is of bytes already, as it is."""
    return (mask * 255).round().byte() if mask.is_floating_point() else mask


def _in_pieces(read: Callable[[Sequence[int]], Tensor], ids: Sequence[int], long: bool) -> Tensor:
    """What ``read`` gives for all frames ``ids``; of a long clip as bytes, and never all of it as numbers."""
    if not long:
        return read(ids)
    return torch.cat([_bytes(read(ids[at : at + PIECE])) for at in range(0, len(ids), PIECE)])


def _mask_file(path: str | Path, count: int, height: int, width: int, long: bool) -> Tensor:
    """A mask file for a source array: it must have a frame for each of the array's, or be a still."""
    info = _probe_mask(path)
    if not is_image(path) and info.frames not in (1, count):
        raise InputError(f"the mask {path} has {info.frames} frames, the source array {count}: make them equal")
    return _in_pieces(partial(read_mask, path, height=height, width=width), range(count), long)


def _mask_array(mask: Any, count: int, height: int, width: int, notes: list[str], long: bool) -> Tensor:
    """uint8 0..255, bool, or float in [0, 1], ``[T, H, W]`` or ``[H, W]`` -> float32 ``[T, H, W]`` in [0, 1].

    Of a long clip it is uint8.
    """
    array = np.asarray(mask)
    if array.ndim == 2:
        array = np.broadcast_to(array, (count, *array.shape))
    if array.shape != (count, height, width):
        raise InputError(f"src_mask is {list(array.shape)}, the source gives {[count, height, width]}: make them equal")
    full = 255 if array.dtype == np.uint8 and array.max() > 1 else 1
    if array.dtype == np.uint8 and full == 1 and array.any():
        notes.append("mask: its values are 0 and 1: 1 is taken for white")

    def read(ids: Sequence[int]) -> Tensor:
        values = array[ids[0] : ids[-1] + 1].astype(np.float32) / full
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError("src_mask must be uint8 0 to 255, bool, or float from 0 to 1 (white or 1 generates)")
        return torch.from_numpy(values)

    return _in_pieces(read, range(count), long)


def reference_list(images: Sequence[Media] | Media | None, folder: Path | str = "") -> list[Media]:
    """One path or array, a comma-separated string of paths, or a list of them -> a list.

    A comma inside a file name is understood where that file exists, from here or beside ``folder``.
    """
    if images is None:
        return []
    if isinstance(images, str):
        return list(_split_paths(images, folder))
    if isinstance(images, Path | np.ndarray):
        return [images]
    return list(images)


def _split_paths(text: str, folder: Path | str) -> Iterator[str]:
    parts = text.split(",")
    while parts:
        runs = (",".join(parts[:n]).strip() for n in range(len(parts), 1, -1))
        whole = next((run for run in runs if any(os.path.isfile(p) for p in (run, os.path.join(folder, run)))), None)
        name = parts[0].strip() if whole is None else whole
        del parts[: 1 if whole is None else whole.count(",") + 1]
        if name:
            yield name


def _references(
    images: Sequence[Media] | Media | None, height: int, width: int, notes: list[str]
) -> tuple[tuple[np.ndarray, ...], list[Tensor]]:
    """The pictures as shown and as the model gets them, letterboxed on white."""
    shown, tensors = [], []
    for image in reference_list(images):
        if not isinstance(image, str | Path | np.ndarray):
            raise InputError(f"a reference must be a path or a uint8 array, got {type(image).__name__}")
        pixels = image if isinstance(image, np.ndarray) else read_image(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise InputError(f"a reference must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        canvas = letterbox(pixels, height, width)
        tensors.append(canvas)
        shown.append(((canvas[:, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    if len(tensors) > TRAINED_REFERENCES:
        notes.append(f"{len(tensors)} references are more than the {TRAINED_REFERENCES} the model was trained with")
    return tuple(shown), tensors
