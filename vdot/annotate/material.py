"""What goes into preparing an input and what comes out: raw clips, pictures and words; source, mask and references."""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import vdot
from vdot.conditioning import UNKNOWN_GREY
from vdot.errors import InputError
from vdot.video import contact_sheet, write_image, write_video
from vdot.video.output import atomic_path

UNKNOWN = np.uint8(UNKNOWN_GREY)  # what a source shows where nothing is known
FPS = 16.0  # what the published models move at; of clips that are made of pictures
SIDECAR = "annotate.json"
_OWN_FILES = r"src_(video|mask)\.mp4|src_ref_image_\d+\.png|preview\.(mp4|png)"

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, the last two exclusive


@dataclass(frozen=True)
class Material:
    """Raw material. What a task does not use must be left out; ``annotate`` says what it wants.

    ``video`` uint8 ``[T, H, W, 3]`` (``end_video``: the second clip of ``firstlastclip``), ``images`` uint8
    ``[H, W, 3]``, ``mask`` bool or uint8 ``[H, W]`` or ``[T, H, W]`` (white is the thing), ``bbox`` boxes left, top,
    right, bottom in pixels. ``mode`` and the rest are VACE's options of the same name.
    """

    video: np.ndarray | None = None
    images: Sequence[np.ndarray] = ()
    mask: np.ndarray | None = None
    bbox: Sequence[Sequence[float]] | None = None
    label: str | None = None
    caption: str | None = None
    mode: str | None = None
    direction: Sequence[str] | str | None = None
    expand_ratio: float | None = None
    expand_num: int | None = None
    maskaug_mode: str | None = None
    maskaug_ratio: float | None = None
    control: str | None = None
    fps: float | None = None
    end_video: np.ndarray | None = None


@dataclass(frozen=True)
class Annotated:
    """An input of the model. Without a mask all of the source may change; without a source nothing is known.

    ``src_video`` uint8 ``[T, H, W, 3]``, ``src_mask`` uint8 ``[T, H, W]`` of 255 (generate) and 0 (keep),
    ``references`` uint8 ``[H, W, 3]`` each; ``backends``: what did each part of the work.
    """

    task: str
    src_video: np.ndarray | None = None
    src_mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    fps: float = FPS
    notes: tuple[str, ...] = ()
    backends: dict[str, str] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Arguments of :class:`vdot.request.Request` and ``VdotPipeline``, prompt aside."""
        return {
            "src_video": self.src_video,
            "src_mask": self.src_mask,
            "src_ref_images": list(self.references) or None,
            "fps": self.fps,
        }

    def facts(self) -> dict[str, Any]:
        """What the sidecar says of the pictures."""
        clip = self.src_video
        return {
            "task": self.task,
            "frames": None if clip is None else len(clip),
            "fps": None if clip is None else self.fps,
            "size": None if clip is None else f"{clip.shape[2]}*{clip.shape[1]}",
            "generated_share": None if self.src_mask is None else round(float((self.src_mask > 127).mean()), 4),
            "references": [f"{image.shape[1]}*{image.shape[0]}" for image in self.references],
            "backends": self.backends,
            "notes": list(self.notes),
            "vdot": vdot.__version__,
        }

    def save(
        self, folder: str | os.PathLike, facts: dict[str, Any] | None = None, sound: str | None = None
    ) -> list[Path]:
        """Write ``src_video.mp4, src_mask.mp4, src_ref_image_<i>.png``, a preview and, last, ``annotate.json``.

        Each appears whole or not at all. What an earlier call left in ``folder`` and this one does not write goes.
        ``facts`` join the sidecar; ``sound`` is a file whose sound the source takes over.

        Raises:
            OutputError: the folder or the disk refuses.
        """
        folder = Path(folder)
        files = self._files(folder, sound)
        _remove_earlier(folder, set(files))
        for path, write in files.items():
            write(path)
        sidecar = folder / SIDECAR
        values = {**self.facts(), **(facts or {}), "files": [path.name for path in files]}
        with atomic_path(sidecar) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(values, indent=2, ensure_ascii=True) + "\n")
        return [*files, sidecar]

    def _files(self, folder: Path, sound: str | None) -> dict[Path, Callable[[Path], None]]:
        files: dict[Path, Callable[[Path], None]] = {}
        if self.src_video is not None:
            files[folder / "src_video.mp4"] = partial(
                write_video, frames=self.src_video, fps=self.fps, audio_from=sound
            )
        if self.src_mask is not None:
            shown = np.repeat(self.src_mask[..., None], 3, axis=-1)
            files[folder / "src_mask.mp4"] = partial(write_video, frames=shown, fps=self.fps)
        for i, reference in enumerate(self.references):
            files[folder / f"src_ref_image_{i}.png"] = partial(write_image, array=reference)
        if self.src_video is not None and self.src_mask is not None:
            files[folder / "preview.mp4"] = partial(write_video, frames=self.overlay(), fps=self.fps)
        files[folder / "preview.png"] = partial(contact_sheet, self.rows())
        return files

    def overlay(self) -> np.ndarray:
        """The source with the part that will be generated tinted red, uint8 ``[T, H, W, 3]``."""
        assert self.src_video is not None
        if self.src_mask is None:
            return self.src_video
        out = self.src_video.copy()
        white = self.src_mask > 127
        out[white] = (out[white] * 0.5 + np.array([127.5, 0, 0])).astype(np.uint8)
        return out

    def rows(self) -> list[tuple[str, np.ndarray]]:
        """Labelled clips of the contact sheet."""
        rows = []
        if self.src_video is not None:
            rows.append(("src_video", self.src_video))
        if self.src_mask is not None:
            rows.append(("src_mask: white generates", np.repeat(self.src_mask[..., None], 3, axis=-1)))
            rows.append(("preview: red will be generated", self.overlay()))
        return rows + [(f"src_ref_image_{i}", image[None]) for i, image in enumerate(self.references)]


def _remove_earlier(folder: Path, keep: set[Path]) -> None:
    """The sidecar of an earlier call, and those of its files that this one does not replace."""
    try:
        earlier = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))["files"]
        (folder / SIDECAR).unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in (folder / name for name in earlier if re.fullmatch(_OWN_FILES, str(name))):
        if path not in keep:
            with suppress(OSError):
                path.unlink()


# --- checks ----------------------------------------------------------------------------------------------------------


def check_frames(frames: Any, name: str = "video") -> np.ndarray:
    """``InputError`` unless uint8 ``[T, H, W, 3]`` with something in it."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        kind = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise InputError(f"{name} must be uint8 [T, H, W, 3], got {kind}")
    if 0 in frames.shape:
        raise InputError(f"{name} is empty: {list(frames.shape)}")
    return frames


def check_image(image: Any, name: str = "image") -> np.ndarray:
    if isinstance(image, np.ndarray) and image.ndim == 3:
        return check_frames(image[None], name)[0]
    raise InputError(f"{name} must be uint8 [H, W, 3]")


def check_mask(mask: Any, height: int, width: int, frames: int | None = None) -> np.ndarray:
    """Bool, or uint8 whose upper half is white, ``[H, W]`` or ``[T, H, W]`` -> bool of that shape.

    Raises:
        InputError: another shape, or nothing in it is white.
    """
    array = np.asarray(mask)
    shapes = [(height, width)] if frames is None else [(height, width), (frames, height, width)]
    if array.shape not in shapes:
        raise InputError(
            f"the mask is {list(array.shape)}, the picture needs {' or '.join(str(list(s)) for s in shapes)}"
        )
    white = array if array.dtype == bool else array > (127 if array.max(initial=0) > 1 else 0)
    if not white.any():
        raise InputError("the mask is black everywhere: paint the thing white")
    return white


def check_box(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom -> whole pixels inside the picture. ``InputError`` if nothing of it is inside."""
    try:
        left, top, right, bottom = (float(value) for value in box)
    except (TypeError, ValueError):
        raise InputError(f"a box is left,top,right,bottom in pixels, got {box!r}") from None
    if not np.isfinite([left, top, right, bottom]).all() or right <= left or bottom <= top:
        raise InputError(f"a box is left,top,right,bottom with right > left and bottom > top, got {list(box)}")
    inside = (max(round(left), 0), max(round(top), 0), min(round(right), width), min(round(bottom), height))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise InputError(f"the box {list(box)} lies outside the picture, which is {width}x{height}")
    return inside
