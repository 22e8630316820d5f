"""Files out: video with sound, PNG, GIF, contact sheet. Each appears whole under its name or not at all."""

import logging
import os
import platform
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any

import av
import numpy as np
import psutil
from av.error import FFmpegError

from vdot.errors import InputError, OutputError

_log = logging.getLogger("vdot.video")

# Same frames, same bytes: x264's choices depend on the number of threads, so that is fixed, and its macroblock tree
# gives other bytes from run to run (seen with libavcodec 62 on AVX-512), so that is off.
_X264 = {"crf": "16", "preset": "medium", "threads": "4", "x264-params": "mbtree=0:log-level=none"}
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[str]:
    """A temporary name beside ``path`` that replaces it on success and vanishes on any failure, Ctrl-C included.

    Missing folders are made, and unmade again on failure.

    Raises:
        OutputError: the folder or the disk refuses.
    """
    name = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(name)
    temporary = os.path.join(folder, f".vdot-{_host()}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
    made = missing_folders(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.isdir(name):
            raise IsADirectoryError(f"{name} is a folder")
        yield temporary
        os.replace(temporary, name)
        made = []
    except OutputError as error:  # of a file written inside this one: the user knows it by the outer name
        raise OutputError(f"{name} could not be written: {error.reason or error}.", error.reason) from error
    except (OSError, FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{name} could not be written: {reason}.", reason) from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)
        for missing in made:
            with suppress(OSError):  # not empty: somebody else's
                os.rmdir(missing)


def missing_folders(folder: str) -> list[str]:
    """The folders that ``makedirs`` would make, innermost first."""
    missing = []
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _host() -> str:
    return "".join(c for c in platform.node() if c.isalnum())[:16] or "host"


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete temporary files in ``folder`` of processes of this machine that were killed while they wrote."""
    for entry in os.scandir(os.fspath(folder)):
        match = re.fullmatch(rf"\.vdot-{_host()}-(\d+)-[0-9a-f]{{32}}\.tmp", entry.name)
        if match and not psutil.pid_exists(int(match[1])):
            with suppress(OSError):
                os.unlink(entry.path)


def bad_name(value: Any, added: str = "") -> str | None:
    """Why ``value`` cannot name a file (``<value><added>``) or a folder on every file system; None if it can."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "it must be text"
    name = str(value)
    if not name or name != name.strip() or name.startswith(".") or name.endswith("."):
        return "it is empty, or begins or ends with a dot or a space"
    if any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        return 'it holds one of / \\ : * ? " < > | or an invisible character'
    if added and name.lower().endswith(added):
        return f"leave out {added}, it is added"
    return "it is longer than 200 bytes" if len(name.encode()) > 200 else None


def write_image(path: str | os.PathLike, array: np.ndarray) -> None:
    """uint8 ``[H,W,3]``, ``[H,W,4]`` or ``[H,W]`` -> PNG, whatever the suffix.

    Raises:
        InputError: another shape or type. OutputError: not writable.
    """
    from PIL import Image

    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise InputError(f"An image is uint8 [H,W], [H,W,3] or [H,W,4]; got {array.dtype} {list(array.shape)}.")
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG")


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: float,
    *,
    audio_from: str | os.PathLike | None = None,
    audio_start: float = 0.0,
    audio_end: float | None = None,
) -> None:
    """uint8 ``[T,H,W,3]`` -> H.264 mp4 that plays everywhere, at visually lossless quality; same input, same bytes.

    An odd side gains one repeated row or column (4:2:0 needs even sizes). With ``audio_from``, seconds
    ``audio_start`` to ``audio_end`` of that file's sound (counted from its first frame; default: as long as the
    frames last) are encoded as AAC; a file without sound gives a video without sound.

    Raises:
        InputError: frames or fps out of range. OutputError: not writable; nothing half-written is left.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"A video is uint8 [T,H,W,3]; got {frames.dtype} {list(frames.shape)}.")
    if not 0 < fps <= 1000:
        raise InputError(f"fps is {fps}; it must lie between 0 and 1000.")
    sound = None
    if audio_from is not None:
        end = audio_start + len(frames) / fps if audio_end is None else audio_end
        sound = _read_sound(os.fspath(audio_from), audio_start, end)
    with (
        atomic_path(path) as temporary,
        av.open(temporary, "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container,
    ):
        _encode(container, frames, Fraction(fps).limit_denominator(1001), sound)


def _encode(container: Any, frames: np.ndarray, rate: Fraction, sound: tuple[np.ndarray, int] | None) -> None:
    video = container.add_stream("libx264", rate=rate, options=_X264)
    video.width, video.height = (side + side % 2 for side in frames.shape[2:0:-1])
    video.pix_fmt = "yuv420p"
    _tag_colours(video.codec_context)
    voice: Any = None
    if sound is not None:
        samples, sample_rate = sound
        voice = container.add_stream("aac", rate=sample_rate)
        voice.bit_rate = 96_000 * len(samples)
        voice.layout = "stereo" if len(samples) == 2 else "mono"
    at = 0
    for number, frame in enumerate(frames):
        container.mux(video.encode(_picture(frame)))
        if sound is not None:  # interleaved, so that players need not seek
            until = int((number + 1) / rate * sound[1])
            at = _encode_sound(container, voice, sound, at, until)
    container.mux(video.encode())
    if sound is not None:
        _encode_sound(container, voice, sound, at, sound[0].shape[1], last=True)
        container.mux(voice.encode())


def _tag_colours(context: Any) -> None:
    # BT.601 matrix, limited range: what untagged H.264 is taken for, so readers that ignore tags agree with those that
    # do not. Primaries and transfer stay BT.709, nearest to the sRGB that the pixels are.
    context.colorspace, context.color_range, context.color_primaries, context.color_trc = 6, 1, 1, 1


def _picture(frame: np.ndarray) -> Any:
    odd = [(0, side % 2) for side in frame.shape[:2]]
    if any(extra for _, extra in odd):
        frame = np.pad(frame, [*odd, (0, 0)], mode="edge")
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace="ITU601")


# --- sound -----------------------------------------------------------------------------------------------------------


def _encode_sound(
    container: Any, voice: Any, sound: tuple[np.ndarray, int], at: int, until: int, last: bool = False
) -> int:
    samples, rate = sound
    until = min(until, samples.shape[1])
    while at < until and (last or at + 1024 <= until):
        chunk = np.ascontiguousarray(samples[:, at : min(at + 1024, until)])
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=voice.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
        container.mux(voice.encode(frame))
        at += chunk.shape[1]
    return at


def _read_sound(name: str, start: float, end: float) -> tuple[np.ndarray, int] | None:
    """Seconds ``start`` to ``end`` after the first video frame -> float32 ``[C,S]`` (C 1 or 2) and its sample rate."""
    from vdot.video.source import first_frame_time

    try:
        with av.open(os.path.abspath(name), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                return None
            zero = first_frame_time(container)
            return _decode_sound(container, start + zero, end + zero)
    except (FFmpegError, OSError, ValueError) as error:
        # The picture took minutes to make; a damaged sound track is no reason to lose it.
        _log.warning("The sound of %s cannot be decoded (%s); the video is written without it.", name, error)
        return None


def _decode_sound(container: Any, start: float, end: float) -> tuple[np.ndarray, int] | None:
    stream = container.streams.audio[0]
    rate = stream.rate if stream.rate in _AAC_RATES else 48000
    layout = "mono" if stream.channels == 1 else "stereo"
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    samples = np.zeros((1 if layout == "mono" else 2, max(round((end - start) * rate), 0)), np.float32)
    if not samples.size:
        return None
    at: int | None = None
    for frame in container.decode(stream):
        if frame.time is not None and frame.time >= end:
            break
        for piece in resampler.resample(frame):
            stated = round(((piece.time or 0.0) - start) * rate)
            # Matroska rounds times to milliseconds: pieces follow each other unless a real hole lies between them
            if at is None or abs(stated - at) > 0.05 * rate:
                at = stated
            _place(samples, piece.to_ndarray(), at)
            at += piece.samples
    return samples, rate


def _place(target: np.ndarray, piece: np.ndarray, at: int) -> None:
    """Copy ``piece`` into ``target`` from sample ``at`` on; what lies outside is dropped, gaps stay silent."""
    first, last = max(at, 0), min(at + piece.shape[1], target.shape[1])
    if first < last:
        target[:, first:last] = piece[:, first - at : last - at]


# --- looking at videos -----------------------------------------------------------------------------------------------


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
    """uint8 ``[T, H, W, 3]`` -> an animation that plays in a loop wherever pictures are shown.

    All frames share one palette of 256 colours, chosen for all of them: one for each would flicker.

    Raises:
        OutputError: not writable.
    """
    from PIL import Image

    tall = Image.fromarray(np.ascontiguousarray(frames).reshape(-1, *frames.shape[2:]))
    palette = tall.quantize(256, method=Image.Quantize.MEDIANCUT)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)).quantize(palette=palette) for frame in frames]
    pause = max(20, round(1000 / fps))  # browsers slow down what is faster
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:], duration=pause, loop=0)


def contact_sheet(
    rows: list[tuple[str, np.ndarray]], path: str | os.PathLike, columns: int = 6, cell_width: int = 208
) -> None:
    """One row of up to ``columns`` evenly spaced frames per ``(label, uint8 [T,H,W,3])`` -> labelled PNG.

    Raises:
        InputError: no rows. OutputError: not writable.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise InputError("A contact sheet needs at least one row.")
    bar, gap, font = 22, 4, ImageFont.load_default(14)
    heights = [max(1, round(cell_width * clip.shape[1] / clip.shape[2])) for _, clip in rows]
    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, sum(h + bar + gap for h in heights) + gap), "silver")
    draw, top = ImageDraw.Draw(sheet), gap
    for (label, clip), height in zip(rows, heights, strict=True):
        draw.text((gap, top), label, fill="black", font=font)
        picks = np.unique(np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int))
        for column, pick in enumerate(picks):
            cell = Image.fromarray(np.ascontiguousarray(clip[pick])).resize(
                (cell_width, height), Image.Resampling.LANCZOS
            )
            left = gap + column * (cell_width + gap)
            sheet.paste(cell, (left, top + bar))
            draw.text(
                (left + 3, top + bar + 1), str(pick), fill="white", font=font, stroke_width=1, stroke_fill="black"
            )
        top += height + bar + gap
    write_image(path, np.asarray(sheet))
