"""Video files in: what a file holds (:func:`probe`) and its exact frames (:func:`read_frames`).

PyAV reads the table of frames from the packets, without decoding, so a truncated file is found before a decoder sees
it (decord may hang on one). Frames then come from decord where it is installed and the table is of the plain kind it
is right about, and from PyAV otherwise; both decode the same pixels, bit for bit.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from vdot.errors import InputError

# Demuxers of self-contained files. Playlists, concat scripts and image patterns would open other paths and addresses.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,ivf,nut,apng"
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
# Pillow's other plugins include one that runs Ghostscript and one that takes MPEG files for pictures.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
# decord 0.6 has wrong times for AVI and wrong pixels for 10-bit, and fails on MPEG-TS and GIF.
_DECORD_FORMATS = ("mov", "matroska")
_DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


@dataclass(frozen=True)
class VideoInfo:
    """What :func:`probe` finds. Sizes are as displayed: after the rotation metadata is applied."""

    path: str
    frames: int
    width: int
    height: int
    fps: float  # average frames per second; 0 for a still picture
    duration: float  # seconds, from the start of the first frame to the end of the last
    rotation: int  # clockwise degrees from stored to displayed picture: 0, 90, 180, 270
    has_audio: bool
    timestamps: np.ndarray = field(repr=False, compare=False)  # float32 [N,2] seconds (start, end), first start 0
    pixel_aspect: float = 1.0  # width of a pixel over its height, as displayed

    @property
    def is_still(self) -> bool:
        """A picture without time: an image file, or a video of one frame."""
        return self.frames == 1


@dataclass(frozen=True)
class _Scan:
    """The frame table of a file, read from its packets in presentation order."""

    path: str
    container: str
    pixel_format: str
    pts: np.ndarray  # int64 [N], in units of the stream's time base
    keyframes: np.ndarray  # int64 [K], indices of frames that decode alone
    timestamps: np.ndarray  # float32 [N,2]
    fps: float
    # AVI stores decoding times only, so its frames are known by their order and not by their pts
    by_order: bool
    height: int  # stored, before rotation
    width: int
    turns: int  # quarter turns counter-clockwise that display the stored picture
    pixel_aspect: float
    has_audio: bool


def probe(path: str | os.PathLike, *, allow_image: bool = False) -> VideoInfo:
    """Read a video's frame table, size, rate and rotation; decodes one frame only.

    With ``allow_image`` an image file is a video of one frame with fps 0 (a still mask).

    Raises:
        InputError: missing, a folder, not a video, truncated, damaged or without frames.
    """
    name = _existing_file(path)
    if is_image(name):
        if not allow_image:
            raise InputError(f"{name} is an image, not a video: pass it as a reference image or as a mask.")
        return _still_info(name)
    scan = _scan(name)
    height, width, aspect = scan.height, scan.width, scan.pixel_aspect
    if scan.turns % 2:
        height, width, aspect = width, height, 1 / aspect
    return VideoInfo(
        path=name,
        frames=len(scan.pts),
        width=width,
        height=height,
        fps=scan.fps,
        duration=float(scan.timestamps[-1, 1]),
        rotation=(-90 * scan.turns) % 360,
        has_audio=scan.has_audio,
        timestamps=scan.timestamps,
        pixel_aspect=aspect,
    )


def is_image(path: str | os.PathLike) -> bool:
    """Whether the file is a still picture by its content (an animated GIF, WebP or PNG is not)."""
    from PIL import Image

    try:
        with open_image(path) as image:
            return not (image.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(image, "is_animated", False))
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's plugins raise many types on foreign bytes; all mean "not an image"
        return False


def open_image(path: str | os.PathLike) -> Any:
    """``PIL.Image.open`` restricted to picture formats; lazy, nothing is decoded yet."""
    from PIL import Image

    Image.init()  # Pillow raises KeyError on the name of a format that this build of it lacks
    return Image.open(path, formats=[name for name in _IMAGE_FORMATS if name in Image.OPEN])


def read_frames(
    path: str | os.PathLike, frame_ids: Sequence[int], size: tuple[int, int] | None = None, *, decoder: str = "auto"
) -> np.ndarray:
    """Decode the frames of these indices, in the order asked and repeats included -> uint8 RGB ``[T,H,W,3]``.

    Rotation metadata is applied. ``size=(height, width)`` passes each frame through
    :func:`vdot.video.fit_frames` as it is decoded, so that a long 4K clip never lies in memory at its full size.
    ``decoder`` is "auto", "decord" or "pyav".

    Raises:
        InputError: as :func:`probe`, an index out of range, or a frame that does not decode.
    """
    name = _existing_file(path)
    if is_image(name):
        raise InputError(f"{name} is an image, not a video.")
    scan = _scan(name)
    if not len(frame_ids):
        raise InputError(f"No frames of {name} were asked for.")
    if min(frame_ids) < 0 or max(frame_ids) >= len(scan.pts):
        raise InputError(f"{name} has {len(scan.pts)} frames; {min(frame_ids)}..{max(frame_ids)} were asked for.")
    wanted = sorted(set(frame_ids))
    decoded = _decode(scan, wanted, decoder)
    return _assemble(decoded, frame_ids, size)


def _assemble(
    decoded: Iterable[tuple[int, np.ndarray]], ids: Sequence[int], size: tuple[int, int] | None
) -> np.ndarray:
    from vdot.video.pixels import fit_frames

    out: np.ndarray | None = None
    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(ids):
        slots.setdefault(index, []).append(slot)
    for index, frame in decoded:
        if size is not None:
            frame = fit_frames(frame[None], *size)[0]
        if out is None:
            out = np.empty((len(ids), *frame.shape), np.uint8)
        out[slots[index]] = frame
    assert out is not None
    return out


# --- the frame table ---------------------------------------------------------------------------------------------


def _existing_file(path: str | os.PathLike) -> str:
    name = os.fspath(path)
    if os.path.isdir(name):
        raise InputError(f"{name} is a folder, not a file.")
    if not os.path.isfile(name):
        raise InputError(f"{name} does not exist.")
    if not os.access(name, os.R_OK):
        raise InputError(f"{name} cannot be read: permission denied.")
    if os.path.getsize(name) == 0:
        raise InputError(f"{name} is empty (0 bytes).")
    return name


def _open(name: str) -> Any:
    try:
        # absolute, because a relative "a:b.mp4" would be read as protocol "a"
        return av.open(os.path.abspath(name), options=dict(_OPTIONS))
    except (FFmpegError, OSError, ValueError) as error:
        with open(name, "rb") as file:
            is_mp4 = file.read(12)[4:8] in (b"ftyp", b"moov", b"mdat")
        if is_mp4:
            raise InputError(f"{name} is a damaged or truncated mp4: its index is missing or unreadable.") from error
        raise InputError(f"{name} is not a video file that can be read.") from error


def _video_stream(container: Any, name: str) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic:  # an album cover is no video
            return stream
    raise InputError(f"{name} has no video stream" + (" (audio only)." if container.streams.audio else "."))


def _scan(name: str) -> _Scan:
    stat = os.stat(name)
    return _scan_file(name, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _scan_file(name: str, size: int, modified: int) -> _Scan:
    """Demux the whole file (reads it once, decodes one frame) and check that it is all there.

    Cached by size and date, because a source is probed, planned and read, each from its path alone.
    """
    with _open(name) as container:
        stream = _video_stream(container, name)
        packets, last_end = _packets(container, stream, name)
        _check_complete(container, stream, packets, last_end, name)
        packets = _decodable(packets)
        if not packets:
            raise InputError(f"{name} has no frames.")
        by_order = container.format.name == "avi" or any(p[0] is None for p in packets)
        packets = sorted(packets, key=lambda p: p[1] if p[0] is None else p[0])
        by_order = by_order or any(a[0] == b[0] for a, b in pairwise(packets))
        pts = np.array([p[1] if p[0] is None else p[0] for p in packets], np.int64)
        fps, timestamps = _times(pts, packets[-1][2], float(stream.time_base), stream.average_rate)
        aspect = stream.sample_aspect_ratio
        facts = dict(
            container=container.format.name.split(",")[0],
            pixel_format=stream.codec_context.pix_fmt or "",
            pixel_aspect=float(aspect) if aspect else 1.0,
            has_audio=bool(container.streams.audio),
        )
    first = _first_frame(name)
    return _Scan(
        path=name,
        pts=pts,
        keyframes=np.flatnonzero([p[3] for p in packets]),
        timestamps=timestamps,
        fps=fps,
        by_order=by_order,
        height=first.height,
        width=first.width,
        turns=round(getattr(first, "rotation", 0) / 90) % 4,
        **facts,
    )


_Packet = tuple[int | None, int, int, bool, bool]  # pts, dts, duration, keyframe, discarded by an edit list


def _packets(container: Any, video: Any, name: str) -> tuple[list[_Packet], float]:
    """Packets of the video stream, and the time in seconds at which the last packet of any stream ends."""
    found: list[_Packet] = []
    last_end = 0.0
    try:
        for packet in container.demux():
            if packet.dts is None and not packet.size:
                continue  # the marker at the end of a stream
            if packet.is_corrupt:
                raise InputError(f"{name} is truncated or damaged: frame {len(found)} is incomplete.")
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                last_end = max(last_end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream is video and packet.size:
                dts = packet.dts if packet.dts is not None else len(found)
                found.append((packet.pts, dts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
    except FFmpegError as error:
        raise InputError(f"{name} is truncated or damaged after frame {len(found)}.") from error
    return found, last_end


def _check_complete(container: Any, stream: Any, packets: list[_Packet], last_end: float, name: str) -> None:
    if container.format.name.startswith("mov") and len(packets) < stream.frames:
        if packets:
            raise InputError(f"{name} is truncated: {len(packets)} of its {stream.frames} frames are there.")
        raise InputError(f"{name} is truncated: none of its {stream.frames} frames is there.")
    if container.format.name.startswith("matroska") and container.duration:
        promised = (container.duration + (container.start_time or 0)) / av.time_base
        if last_end < promised - 0.3:  # codec delays round the promise by less
            raise InputError(f"{name} is truncated: it ends at {last_end:.1f} s of {promised:.1f} s.")


def _decodable(packets: list[_Packet]) -> list[_Packet]:
    """Drop what a decoder drops: frames hidden by an edit list, and a cut clip's frames before its first keyframe."""
    first = next((i for i, packet in enumerate(packets) if packet[3]), 0)
    return [packet for packet in packets[first:] if not packet[4]]


def _times(pts: np.ndarray, last_duration: int, time_base: float, rate: Any) -> tuple[float, np.ndarray]:
    """Average fps, and float32 ``[N,2]`` start and end seconds that begin at 0 (decord's get_frame_timestamp).

    A frame lasts until the next one starts: a packet's own duration counts in decoding order, which is another order.
    """
    starts = (pts - pts[0]) * time_base
    gaps = np.diff(starts)
    usual = float(np.median(gaps)) if len(gaps) else (1 / float(rate) if rate else 0.04)
    last = last_duration * time_base
    if not usual / 10 < last < usual * 10:
        last = usual
    ends = np.append(starts[1:], starts[-1] + last)
    fps = float(rate) if rate else 0.0
    # Containers may state a rate that their frame times deny; the times are what is played.
    if fps <= 0 or abs(fps * ends[-1] / len(pts) - 1) > 0.02:
        fps = len(pts) / float(ends[-1])
    return fps, np.stack([starts, ends], axis=1).astype(np.float32)


def _first_frame(name: str) -> Any:
    try:
        with _open(name) as container:
            for frame in container.decode(_video_stream(container, name)):
                return frame
    except FFmpegError as error:
        raise InputError(f"{name} cannot be decoded: {error.strerror or error}.") from error
    raise InputError(f"{name} has no frame that can be decoded.")


def _still_info(name: str) -> VideoInfo:
    from vdot.video.pixels import read_image

    height, width = read_image(name).shape[:2]
    return VideoInfo(name, 1, width, height, 0.0, 0.0, 0, False, np.zeros((1, 2), np.float32))


# --- the one reader seam: (scan, sorted distinct indices) -> (index, uint8 [H,W,3] as displayed) ---------------------


def _decode(scan: _Scan, ids: list[int], decoder: str) -> Iterable[tuple[int, np.ndarray]]:
    if decoder not in ("auto", "decord", "pyav"):
        raise InputError(f"Unknown decoder {decoder!r}: auto, decord or pyav.")
    plain = scan.container in _DECORD_FORMATS and scan.pixel_format in _DECORD_PIXELS and not scan.by_order
    if decoder == "decord" or (decoder == "auto" and plain):
        reader = _decord_reader(scan)
        if reader is not None:
            return _decord_frames(reader, scan, ids)
        if decoder == "decord":
            raise InputError(f"decord is not installed or does not read {scan.path}.")
    return _pyav_frames(scan, ids)


def _decord_reader(scan: _Scan) -> Any:
    try:
        import decord
    except (ImportError, OSError):  # no wheel for this machine, or a wheel that does not load
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(os.path.abspath(scan.path), num_threads=2)
        return reader if len(reader) == len(scan.pts) else None
    except (decord.DECORDError, RuntimeError):
        return None


def _decord_frames(reader: Any, scan: _Scan, ids: list[int], batch: int = 8) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(ids), batch):
        chunk = ids[at : at + batch]
        try:
            frames = reader.get_batch(chunk).asnumpy()
        except Exception:  # decord's own error type, raised lazily; PyAV tells whether the file is at fault
            yield from _pyav_frames(scan, ids[at:])
            return
        yield from zip(chunk, frames, strict=True)


def _pyav_frames(scan: _Scan, ids: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Seek to the keyframe before each run of wanted frames and decode on from there."""
    missing: list[int] = []
    for start, run in _runs(scan, ids):
        left = set(run)
        for index, frame in _decode_from(scan, start, run[-1]):
            if index in left:
                left.discard(index)
                yield index, _displayed(scan, frame)
            if not left:
                break
        missing += sorted(left)
    if missing:  # a seek landed late: the slow way, from the beginning
        left = set(missing)
        for index, frame in _decode_from(scan, 0, missing[-1]):
            if index in left:
                left.discard(index)
                yield index, _displayed(scan, frame)
        if left:
            raise InputError(f"{scan.path} is damaged: frame {min(left)} cannot be decoded.")


def _runs(scan: _Scan, ids: list[int]) -> list[tuple[int, list[int]]]:
    """Group indices by the keyframe to seek to; neighbouring groups of pictures are decoded in one go."""
    if scan.by_order or not len(scan.keyframes):
        return [(0, ids)]
    runs: list[tuple[int, list[int]]] = []
    previous = -2
    for index in ids:
        group = max(int(np.searchsorted(scan.keyframes, index, "right")) - 1, 0)
        if group > previous + 1:
            runs.append((int(scan.keyframes[group]), []))
        runs[-1][1].append(index)
        previous = group
    return runs


def _decode_from(scan: _Scan, start: int, last: int) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their indices, from the keyframe ``start`` on."""
    try:
        with _open(scan.path) as container:
            stream = _video_stream(container, scan.path)
            stream.thread_type = "AUTO"
            if start:
                container.seek(int(scan.pts[start]), stream=stream)
            for count, frame in enumerate(container.decode(stream)):
                index = count if scan.by_order else _index_of(scan, frame.pts)
                if index is not None:
                    yield index, frame
    except FFmpegError as error:
        raise InputError(f"{scan.path} is damaged: it does not decode up to frame {last}.") from error


def _index_of(scan: _Scan, pts: int | None) -> int | None:
    if pts is None:
        return None
    index = int(np.searchsorted(scan.pts, pts))
    return index if index < len(scan.pts) and scan.pts[index] == pts else None


def _displayed(scan: _Scan, frame: Any) -> np.ndarray:
    # a stream may change its size halfway; all frames take the size of the first
    pixels = frame.to_ndarray(format="rgb24", width=scan.width, height=scan.height)
    return np.ascontiguousarray(np.rot90(pixels, scan.turns)) if scan.turns else pixels


def first_frame_time(container: Any) -> float:
    """Container seconds of the first video frame (0 without video): the zero of ``VideoInfo.timestamps``."""
    for stream in container.streams.video:
        if stream.start_time is not None:
            return float(stream.start_time * stream.time_base)
    return 0.0
