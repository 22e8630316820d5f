"""Material out of files, as the command line names them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdot.annotate.material import FPS, Material
from vdot.errors import InputError
from vdot.request import MAX_PIXELS, reference_list
from vdot.video import VideoInfo, is_image, probe, read_frames, read_image, read_mask

Paths = str | os.PathLike | Sequence[str | os.PathLike] | None


@dataclass(frozen=True)
class Read:
    """Material and the facts of the file it came from."""

    material: Material
    video: VideoInfo | None = None
    notes: tuple[str, ...] = ()


def read_material(
    video: str | None = None,
    image: str | None = None,
    mask: str | None = None,
    bbox: str | None = None,
    direction: str | None = None,
    save_fps: float | None = None,
    **rest: object,
) -> Read:
    """Files and texts as on the command line -> arrays, with every frame of the clip; ``rest`` goes on as it is.

    Raises:
        InputError: a file that cannot be read, a mask of another shape, boxes or numbers that are not understood.
    """
    clips = [str(path) for path in reference_list(video)]
    if len(clips) > 2:
        raise InputError(f"at most two videos are taken, got {len(clips)}")
    infos = [_probe(path) for path in clips]
    frames = [read_frames(info.path, range(info.frames)) for info in infos]
    images = [read_image(str(path)) for path in reference_list(image)]
    shape = frames[0].shape[:3] if frames else (1, *images[0].shape[:2]) if images else None
    if mask and shape is None:
        raise InputError("a mask needs the video or image it belongs to: add --video or --image")
    notes = [note for info in infos[:1] for note in _timing(info)]
    if save_fps is not None and not 0 < save_fps <= 1000:
        raise InputError(f"save_fps must be a number above 0 and up to 1000, got {save_fps!r}")
    fps = save_fps or (infos[0].fps if infos else FPS) or FPS
    material = Material(
        video=frames[0] if frames else None,
        end_video=frames[1] if len(frames) > 1 else None,
        images=tuple(images),
        mask=None if not mask or shape is None else _mask(mask, *shape),
        bbox=parse_boxes(bbox),
        direction=direction or None,
        fps=fps,
        **rest,  # type: ignore[arg-type]
    )
    return Read(material, infos[0] if infos else None, tuple(notes))


def _probe(path: str) -> VideoInfo:
    info = probe(path)
    if info.frames * info.width * info.height > MAX_PIXELS:
        most = MAX_PIXELS // (info.width * info.height)
        raise InputError(
            f"{path}: {info.frames} frames of {info.width}x{info.height} do not fit: cut it to {most} frames"
        )
    return info


def _timing(info: VideoInfo) -> list[str]:
    steps = np.diff(info.timestamps[:, 0])
    if len(steps) and steps.max() > 1.5 * np.median(steps) + 1e-3:
        return [f"frame times of {Path(info.path).name} are irregular: they are written at an even {info.fps:.4g} fps"]
    return []


def _mask(path: str, count: int, height: int, width: int) -> np.ndarray:
    """Bool ``[H, W]`` of a picture, ``[T, H, W]`` of a video."""
    info = probe(path, allow_image=True)
    if abs(info.width * height - info.height * width) > 0.02 * info.height * width:
        raise InputError(
            f"the mask {path} is {info.width}x{info.height}, the picture {width}x{height}: draw it on the picture"
        )
    if is_image(path) or info.is_still:
        return read_mask(path, [0], height, width).numpy()[0] > 0.5
    if info.frames != count:
        raise InputError(
            f"the mask {path} has {info.frames} frames, the video {count}: make them equal, or use a picture"
        )
    return read_mask(path, range(count), height, width).numpy() > 0.5


def parse_boxes(text: str | None) -> tuple[tuple[float, ...], ...] | None:
    """ "l,t,r,b l,t,r,b" -> boxes. ``InputError`` for anything else."""
    if text is None or not text.strip():
        return None
    boxes = []
    for part in re.split(r"[\s;]+", text.strip()):
        try:
            numbers = tuple(float(number) for number in part.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 4:
            raise InputError(
                f'box {part!r} is not understood: use "left,top,right,bottom", several with spaces between'
            )
        boxes.append(numbers)
    return tuple(boxes)
