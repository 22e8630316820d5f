"""vdot.video against the original's numbers, against made media of known content, and against files users break."""

import gzip
import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vdot.errors import InputError, OutputError
from vdot.video import (
    VideoInfo,
    contact_sheet,
    describe,
    fit_frames,
    from_model,
    is_image,
    letterbox,
    original_rule,
    output,
    output_size,
    plan_frames,
    probe,
    read_frames,
    read_image,
    read_mask,
    to_model,
    write_gif,
    write_image,
    write_video,
)

AREAS = {"480p": 480 * 832, "720p": 720 * 1280}


# --- media of known content ------------------------------------------------------------------------------------------


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames that carry their index in 8 black or white squares at the upper left, as the golden clips do."""
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([x + 2 * i, 2 * y, 0 * x + 3 * i], -1) % 200 for i in range(count)]).astype(np.uint8)
    for i in range(count):
        for bit in range(8):
            frames[i, :8, 8 * bit : 8 * bit + 8] = 255 * (i >> bit & 1)
    return frames


def indices(frames: np.ndarray, side: int = 8, margin: int = 0) -> list[int]:
    """Read the squares back."""
    row, first = margin + side // 2, margin + side // 2
    return [sum(int(f[row, first + side * bit].mean() > 128) << bit for bit in range(8)) for f in frames]


def make(path: Path, count: int = 20, *, size: tuple[int, int] = (64, 96), fps: Any = 25, **how: Any) -> Path:
    """A numbered clip through PyAV. ``how``: codec, pix_fmt, options, pts (ms), start, faststart, tone, colours."""
    container = av.open(str(path), "w", options={"movflags": "faststart"} if how.get("faststart") else {})
    options = how.get("options", {"x264-params": "log-level=none"} if how.get("codec", "libx264") == "libx264" else {})
    stream = container.add_stream(how.get("codec", "libx264"), rate=fps, options=options)
    stream.height, stream.width = size
    stream.pix_fmt = how.get("pix_fmt", "yuv420p")
    for name, value in how.get("colours", {}).items():
        setattr(stream.codec_context, name, value)
    base = Fraction(1, 1000) if "pts" in how else 1 / Fraction(fps)
    stream.time_base = stream.codec_context.time_base = base
    voice = container.add_stream("aac", rate=how["rate"]) if "rate" in how else None
    if voice is not None:
        voice.layout = how.get("layout", "mono")
    for i, pixels in enumerate(numbered(count, *size)):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = how["pts"][i] if "pts" in how else i + how.get("start", 0), base
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if voice is not None:
        sing(container, voice, how["rate"], count / float(fps), how.get("start", 0) / float(fps))
    container.close()
    return path


def sing(container: Any, voice: Any, rate: int, seconds: float, start: float) -> None:
    """A tone of 440 Hz for the first half of the clip, 880 Hz for the rest."""
    time = np.arange(round(rate * seconds)) / rate
    tone = np.where(time < seconds / 2, np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 880 * time))
    channels = 2 if voice.layout.name == "stereo" else 1
    samples = np.repeat(0.3 * tone[None], channels, 0).astype(np.float32)
    for at in range(0, samples.shape[1], 1024):
        chunk = np.ascontiguousarray(samples[:, at : at + 1024])
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=voice.layout.name)
        frame.sample_rate, frame.pts = rate, at + round(start * rate)
        container.mux(voice.encode(frame))
    container.mux(voice.encode())


def turn(source: Path, target: Path, clockwise: int) -> Path:
    """Copy an mp4 with a display matrix in its track header, as phones write it."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def clip(frames: int = 81, width: int = 832, height: int = 480, fps: float = 16, **how: Any) -> VideoInfo:
    """A VideoInfo without a file, at an even rate."""
    starts = np.arange(frames) / fps
    times = np.stack([starts, starts + 1 / fps], 1).astype(np.float32)
    facts = dict(path="clip", duration=frames / fps, rotation=0, has_audio=False, timestamps=times)
    return VideoInfo(frames=frames, width=width, height=height, fps=fps, **{**facts, **how})


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".vdot-")]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def plain(media: Path) -> Path:
    return make(media / "plain.mp4", 40)


@pytest.fixture(scope="module")
def cases(reference: Path) -> dict:
    return json.loads(gzip.decompress((reference / "video/cases.json.gz").read_bytes()))


# --- goldens ---------------------------------------------------------------------------------------------------------


def test_golden_frames_and_sizes_of_every_clip(reference: Path, cases: dict) -> None:
    for name, want in cases["files"].items():
        info = probe(reference / f"video/mp4/{name}.mp4")
        assert (info.frames, info.width, info.height) == (want["frames"], want["width"], want["height"])
        assert abs(info.fps - want["decord_avg_fps"]) < 1e-6
        np.testing.assert_allclose(info.timestamps, np.array(want["frame_timestamps"], np.float32), atol=1e-6)
        for limit, area in AREAS.items():
            ids, height, width = original_rule(info.timestamps, info.height, info.width, area)
            golden = want[limit]
            assert (list(ids), height, width) == (golden["frame_ids"], golden["out_h"], golden["out_w"]), name
            plan = plan_frames(info, max_area=area)
            assert (plan.height, plan.width) == (height, width)
            if len(ids) <= 81:
                assert plan.frame_ids == ids
            assert plan.frame_num == min(len(ids), 81)


def test_golden_frames_of_synthetic_timestamps(reference: Path) -> None:
    for name, want in json.loads((reference / "video/synthetic_timestamps.json").read_text()).items():
        if "frame_timestamps" in want:
            times = np.array(want["frame_timestamps"], np.float32)
            height, width, areas = want["height"], want["width"], list(AREAS.values())[:1]
        else:
            shape, limit = name.split("/")
            size, rate = shape.split("@")
            width, height = map(int, size.split("x"))
            fps, count = map(int, rate.split("x"))
            times, areas = clip(count, width, height, fps).timestamps, [AREAS[limit]]
        for area in areas:
            ids, out_h, out_w = original_rule(times, height, width, area)
            assert (list(ids), out_h, out_w) == (want["frame_ids"], want["out_h"], want["out_w"]), name


def test_a_gap_in_frame_times_shows_the_nearest_frame_not_the_first(reference: Path) -> None:
    want = json.loads((reference / "video/synthetic_timestamps.json").read_text())["irregular"]
    times = np.array(want["frame_timestamps"], np.float32)
    golden = np.array(want["frame_ids"])
    ours = np.array(original_rule(times, want["height"], want["width"], AREAS["480p"], gap="nearest")[0])
    in_gap = (golden == 0) & (np.arange(len(golden)) > 0)
    assert in_gap.any()
    np.testing.assert_array_equal(ours[~in_gap], golden[~in_gap])
    assert (np.diff(ours) >= 0).all() and set(ours[in_gap]) <= {19, 20}  # the frames on either side


def test_golden_pixels_of_a_clip(reference: Path, cases: dict) -> None:
    info = probe(reference / "video/mp4/d_854x480_25fps_50.mp4")
    plan = plan_frames(info, max_area=AREAS["480p"])
    video = to_model(read_frames(info.path, plan.frame_ids, (plan.height, plan.width)))
    mean, std, low, high = cases["files"]["d_854x480_25fps_50"]["480p"]["video_mean_std_min_max"]
    assert video.shape == (3, 49, 480, 832)
    assert abs(video.mean() - mean) < 1e-3 and abs(video.std() - std) < 1e-3
    assert (video.min(), video.max()) == (low, high)


def test_golden_source_and_mask_of_different_length(reference: Path, cases: dict) -> None:
    want, folder = cases["pair"], reference / "video/mp4"
    source, mask = probe(folder / want["source"]), probe(folder / want["mask"])
    plan = plan_frames(source, max_area=AREAS["480p"], mask=mask)
    assert list(plan.frame_ids) == want["frame_ids"] and plan.frame_num == plan.model_frames == 61
    assert [3, plan.frame_num, plan.height, plan.width] == want["shape"]
    assert "mask has 61 frames, source 81: both are cut to 61" in plan.notes
    areas = read_mask(mask.path, plan.frame_ids, plan.height, plan.width).mean((1, 2))
    np.testing.assert_allclose(areas, want["mask_area_per_frame"], atol=1e-4)


@pytest.mark.parametrize("case", range(5))
def test_golden_resize_and_crop(golden: Callable, case: int) -> None:
    tensors = golden("video/resize_crop")
    frames, want = tensors[f"resize_crop.{case}.in_u8"].numpy(), tensors[f"resize_crop.{case}.out"]
    got = to_model(fit_frames(frames, *want.shape[2:]))
    assert (got - want).abs().max() <= 2 / 255 + 1e-6  # one grey level: integer kernels differ by CPU
    assert torch.equal(to_model(fit_frames(frames[:1], *want.shape[2:])), got[:, :1])


def test_golden_letterbox(reference: Path, golden: Callable, golden_json: Callable) -> None:
    for name, facts in golden_json("video/letterbox")["info"].items():
        image = read_image(reference / f"video/ref_images/{name.split('.')[1]}.png", alpha="drop")
        canvas = letterbox(image, *facts["canvas_hw"])
        assert list(canvas.shape) == facts["shape"]
        assert abs(float(canvas.double().sum()) - facts["sum"]) < 0.01
        assert abs(float(canvas.double().square().sum()) - facts["sum_sq"]) < 0.01
        assert (canvas[:, 0, 3::16, 5::16] - golden("video/letterbox")[f"{name}.stride16"]).abs().max() < 1e-5


# --- decoding --------------------------------------------------------------------------------------------------------


def test_golden_clips_decode_to_the_frames_asked_for(reference: Path, cases: dict) -> None:
    for name in ("m_848x480_ntsc_85", "h_320x240_30fps_200", "k_64x64_16fps_17", "g_641x359_25fps_40_yuv444"):
        info = probe(reference / f"video/mp4/{name}.mp4")
        ids = [0, 3, info.frames // 2, info.frames // 2, info.frames - 1]
        frames = read_frames(info.path, ids)
        assert frames.shape == (5, info.height, info.width, 3)
        side = max(4, min(info.width, info.height) // 16)
        assert indices(frames, side, margin=side // 2) == ids


FILES: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {},
    "faststart.mp4": {"faststart": True, "rate": 44100},
    "open_gop.mp4": {"options": {"x264-params": "keyint=6:open-gop=1:bframes=3:log-level=none"}},
    "matroska.mkv": {},
    "webm.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "mpeg4_b.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "h264.avi": {},
    "transport.ts": {},
    "quicktime.mov": {"codec": "mpeg4"},
    "late_start.mp4": {"start": 50},
    "bt709.mp4": {"colours": {"colorspace": 1, "color_range": 1}},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "odd.mp4": {"pix_fmt": "yuv444p", "size": (65, 97)},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "ntsc.mp4": {"fps": Fraction(30000, 1001)},
}


@pytest.mark.parametrize("name", FILES)
def test_exact_frames_from_every_container_and_both_decoders(media: Path, name: str) -> None:
    path = make(media / name, 30, **FILES[name])
    info = probe(path)
    height, width = FILES[name].get("size", (64, 96))
    fps = float(FILES[name].get("fps", 25))
    assert (info.frames, info.height, info.width) == (30, height, width)
    assert info.fps == pytest.approx(fps, rel=1e-3) and info.duration == pytest.approx(30 / fps, abs=2e-3)
    np.testing.assert_allclose(info.timestamps[:, 0], np.arange(30) / fps, atol=2e-3)
    for ids in (range(30), [29], [17, 3, 3, 28]):
        frames = read_frames(path, ids, decoder="pyav")
        assert indices(frames) == list(ids)
        np.testing.assert_array_equal(read_frames(path, ids), frames)


@pytest.mark.parametrize(
    "name", ["b_frames.mp4", "open_gop.mp4", "matroska.mkv", "bt709.mp4", "full_range.mp4", "odd.mp4"]
)
def test_decord_and_pyav_decode_the_same_pixels(media: Path, name: str) -> None:
    pytest.importorskip("decord")
    path = make(media / f"both_{name}", 30, **FILES[name])
    ids = [0, 7, 8, 22, 29]
    a, b = (read_frames(path, ids, decoder=decoder) for decoder in ("decord", "pyav"))
    np.testing.assert_array_equal(a, b)


def test_without_decord_everything_decodes(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_decord = read_frames(plain, [0, 20, 39])
    monkeypatch.setitem(sys.modules, "decord", None)  # an import of it now raises
    np.testing.assert_array_equal(read_frames(plain, [0, 20, 39]), with_decord)
    with pytest.raises(InputError, match="decord is not installed"):
        read_frames(plain, [0], decoder="decord")


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotation_metadata_is_applied(media: Path, plain: Path, clockwise: int) -> None:
    path = turn(plain, media / f"turned{clockwise}.mp4", clockwise)
    info = probe(path)
    assert info.rotation == clockwise
    assert (info.height, info.width) == ((96, 64) if clockwise % 180 else (64, 96))
    upright = np.rot90(read_frames(plain, [1, 30]), -clockwise // 90, axes=(1, 2))
    for decoder in ("auto", "pyav"):
        np.testing.assert_array_equal(read_frames(path, [1, 30], decoder=decoder), upright)
    plan = plan_frames(info, max_area=64 * 96)
    assert (plan.height, plan.width) == (info.height, info.width)


def test_variable_frame_rate(media: Path) -> None:
    pts = np.cumsum([0, *np.random.default_rng(0).choice([10, 20, 33, 40, 100, 200], 59)])
    path = make(media / "vfr.mp4", 60, pts=[int(p) for p in pts], rate=44100)
    info = probe(path)
    np.testing.assert_allclose(info.timestamps[:, 0], pts / 1000, atol=1e-3)
    np.testing.assert_array_equal(info.timestamps[1:, 0], info.timestamps[:-1, 1])
    assert info.fps == pytest.approx(60 / info.duration, rel=0.03)
    plan = plan_frames(info, max_area=64 * 96, frame_num=21)
    middle = np.linspace(0, info.timestamps[-1].mean(), 21)
    assert plan.frame_ids == tuple(np.searchsorted(info.timestamps[:, 1], middle))
    assert plan.keeps_timing and plan.fps == pytest.approx(21 / info.duration)
    assert indices(read_frames(path, plan.frame_ids)) == list(plan.frame_ids)
    trimmed = plan_frames(info, max_area=64 * 96, mode="trim")
    assert not trimmed.keeps_timing and any("irregular" in note for note in trimmed.notes)
    assert any("sound is left out" in note for note in trimmed.notes)


def test_frames_are_resized_as_they_are_decoded(plain: Path) -> None:
    ids = [5, 0, 39]
    np.testing.assert_array_equal(read_frames(plain, ids, (32, 80)), fit_frames(read_frames(plain, ids), 32, 80))


def test_frame_indices_out_of_range(plain: Path) -> None:
    for ids in ([40], [-1], []):
        with pytest.raises(InputError):
            read_frames(plain, ids)
    with pytest.raises(InputError, match="auto, decord or pyav"):
        read_frames(plain, [0], decoder="cv2")


def test_animated_gif_is_a_video(media: Path) -> None:
    frames = [Image.fromarray(frame) for frame in numbered(8)]
    frames[0].save(media / "moving.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    info = probe(media / "moving.gif")
    assert (info.frames, info.fps) == (8, 10) and not is_image(media / "moving.gif")
    assert indices(read_frames(media / "moving.gif", range(8))) == list(range(8))


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_clips(media: Path) -> dict[str, Path]:
    made = {"index_last.mp4": {}, "index_first.mp4": {"faststart": True}, "matroska.mkv": {}}
    return {name: make(media / f"long_{name}", 100, size=(120, 160), rate=44100, **how) for name, how in made.items()}


@pytest.mark.parametrize("name", ["index_last.mp4", "index_first.mp4", "matroska.mkv"])
@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_truncated(tmp_path: Path, long_clips: dict[str, Path], name: str, percent: int) -> None:
    whole = long_clips[name].read_bytes()
    assert probe(long_clips[name]).frames == 100
    path = tmp_path / name
    path.write_bytes(whole[: len(whole) * percent // 100])
    for call in (lambda: probe(path), lambda: read_frames(path, [0])):
        with pytest.raises(InputError, match=r"truncated|damaged|not a video"):
            call()


def test_bytes_lost_in_the_middle(tmp_path: Path, long_clips: dict[str, Path], capfd: pytest.CaptureFixture) -> None:
    whole = bytearray(long_clips["index_first.mp4"].read_bytes())
    whole[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    path = tmp_path / "holed.mp4"
    path.write_bytes(whole)
    with pytest.raises(InputError, match="damaged"):
        read_frames(path, range(100))
    assert capfd.readouterr() == ("", "")  # decoders' own complaints stay off the terminal


def no_frames(path: Path) -> None:
    container = av.open(str(path), "w")
    stream = container.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    container.start_encoding()
    container.close()


def audio_only(path: Path) -> None:
    container = av.open(str(path), "w")
    sing(container, container.add_stream("aac", rate=44100, layout="mono"), 44100, 0.5, 0)
    container.close()


def picture_named_mp4(path: Path) -> None:
    Image.new("RGB", (20, 20)).save(path, format="PNG")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "garbage": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a video"),
    "text": (lambda path: path.write_text("not a video\n" * 100), "not a video"),
    "playlist": (lambda path: path.write_text("#EXTM3U\n#EXTINF:5,\nother.mp4\n"), "not a video"),
    "concat": (lambda path: path.write_text("ffconcat version 1.0\nfile other.mp4\n"), "not a video"),
    "no_frames": (no_frames, "no frames|no video|truncated|damaged"),
    "audio_only": (audio_only, "no video stream .audio only"),
    "picture": (picture_named_mp4, "is an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_a_video(tmp_path: Path, name: str, capfd: pytest.CaptureFixture) -> None:
    write, message = BROKEN[name]
    path = tmp_path / f"{name}.mp4"
    write(path)
    for call in (lambda: probe(path), lambda: read_frames(path, [0])):
        with pytest.raises(InputError, match=message) as caught:
            call()
        text = str(caught.value)
        assert text.endswith(".") and "\n" not in text and str(path) in text
    assert capfd.readouterr() == ("", "")


# --- the plan --------------------------------------------------------------------------------------------------------


def check_invariants(info: VideoInfo, plan: Any, area: int) -> None:
    assert plan.height % 16 == plan.width % 16 == 0 and plan.height >= 16 and plan.width >= 16
    assert plan.height * plan.width <= area
    assert list(plan.frame_ids) == sorted(plan.frame_ids)
    assert 0 <= plan.frame_ids[0] and plan.frame_ids[-1] < info.frames
    assert len(plan.frame_ids) == plan.frame_num
    assert plan.model_frames % 4 == 1 and 0 <= plan.model_frames - plan.frame_num < 4
    assert len(plan.model_ids) == plan.model_frames and plan.model_ids[: plan.frame_num] == plan.frame_ids
    assert set(plan.model_ids[plan.frame_num :]) <= {plan.frame_ids[-1]}
    assert plan.fps > 0 and 0 <= plan.audio_start < plan.audio_end <= info.duration * (1 + 1e-6)


@settings(max_examples=150, deadline=None)
@given(
    frames=st.integers(1, 400),
    width=st.integers(16, 4096),
    height=st.integers(16, 4096),
    fps=st.floats(1, 120),
    area=st.integers(256, 1280 * 720),
    frame_num=st.none() | st.integers(1, 200),
    mode=st.sampled_from(["spread", "trim", "resample", "all"]),
    rate=st.none() | st.floats(1, 60),
)
def test_plan_properties(frames, width, height, fps, area, frame_num, mode, rate) -> None:  # type: ignore[no-untyped-def]
    info = clip(frames, width, height, fps)
    frame_num = None if mode == "all" else frame_num
    plan = plan_frames(info, max_area=area, frame_num=frame_num, mode=mode, fps=rate)
    check_invariants(info, plan, area)
    assert describe(plan)
    if mode == "all":
        assert plan.frame_ids == tuple(range(frames))
    elif frame_num is not None:
        assert plan.frame_num == frame_num
    else:
        assert plan.frame_num <= 81
        if mode == "spread":
            assert plan.frame_num == plan.model_frames
    if rate is not None:
        assert plan.fps == rate


@settings(max_examples=150, deadline=None)
@given(height=st.integers(16, 3000), width=st.integers(16, 3000), cells=st.integers(1, 15_000))
def test_size_properties(height: int, width: int, cells: int) -> None:
    area = 256 * cells  # every size in multiples of 16
    rows, cols = (side // 16 for side in output_size(height, width, area))
    assert rows * cols * 256 <= area
    if min(rows, cols) >= 2:  # rows are rounded to the nearest, then columns down
        error = (cols / rows) / (width / height)
        assert ((rows - 0.5) / rows) ** 2 * cols / (cols + 1) - 1e-6 <= error <= ((rows + 0.5) / rows) ** 2 + 1e-6
    ids, out_h, out_w = original_rule(clip(81, width, height).timestamps, height, width, area)
    assert (out_h // 16, out_w // 16) == (rows, cols) and len(ids) % 4 == 1


def test_a_source_below_one_cell_names_the_minimum() -> None:
    for width, height in ((15, 100), (100, 15), (8, 8)):
        with pytest.raises(InputError, match="at least 16 pixels"):
            plan_frames(clip(10, width, height), max_area=AREAS["480p"])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(frame_num=0),
        dict(frame_num=-4),
        dict(max_area=0),
        dict(mode="most"),
        dict(mode="all", frame_num=5),
        dict(fps=0),
        dict(fps=np.nan),
    ],
)
def test_numbers_out_of_range(wrong: dict) -> None:
    with pytest.raises(InputError):
        plan_frames(clip(), **{"max_area": AREAS["480p"], **wrong})


def test_the_cap_on_small_videos_is_stated() -> None:
    info = clip(500, 400, 400)
    assert len(original_rule(info.timestamps, 400, 400, AREAS["720p"])[0]) == 477
    plan = plan_frames(info, max_area=AREAS["720p"])
    assert plan.frame_num == 81 and plan.frame_ids[-1] == 499
    assert any("at most 81 frames" in note and "477" in note for note in plan.notes)


def test_spread_keeps_real_speed_and_says_so() -> None:
    plan = plan_frames(clip(767, fps=25, has_audio=True), max_area=AREAS["480p"])
    assert "767 frames at 25 fps are spread over 81 frames" in plan.notes
    assert plan.fps == pytest.approx(81 / (767 / 25)) and plan.keeps_timing
    assert (plan.audio_start, plan.audio_end) == (0, pytest.approx(767 / 25))
    dropped = plan_frames(clip(50, fps=25), max_area=AREAS["480p"])
    assert dropped.frame_num == 49 and any("50 frames become 49" in note for note in dropped.notes)
    same = plan_frames(clip(81, fps=30000 / 1001), max_area=AREAS["480p"])
    assert same.fps == 30000 / 1001 and same.frame_ids == tuple(range(81)) and not same.notes


def test_spread_over_more_frames_than_there_are() -> None:
    plan = plan_frames(clip(10, fps=10), max_area=AREAS["480p"], frame_num=20)
    assert set(plan.frame_ids) == set(range(10)) and plan.fps == pytest.approx(20) and plan.keeps_timing
    assert any("shown twice" in note for note in plan.notes)


def test_trim_takes_the_first_frames_and_holds_the_last() -> None:
    plan = plan_frames(clip(200, fps=24, has_audio=True), max_area=AREAS["480p"], frame_num=50, mode="trim")
    assert plan.frame_ids == tuple(range(50)) and plan.fps == 24 and plan.model_frames == 53
    assert plan.keeps_timing and plan.audio_end == pytest.approx(50 / 24)
    assert any("first 50 of 200" in note for note in plan.notes)
    held = plan_frames(clip(10, fps=24, has_audio=True), max_area=AREAS["480p"], frame_num=16, mode="trim")
    assert held.frame_ids == (*range(10), *[9] * 6) and held.fps == 24 and held.keeps_timing
    assert held.audio_end == pytest.approx(10 / 24) and any("last one is held" in note for note in held.notes)
    free = plan_frames(clip(50, fps=25), max_area=AREAS["480p"], mode="trim")
    assert (free.frame_num, free.model_frames, free.notes) == (50, 53, ())


def test_all_takes_every_frame_however_long_and_spread_tells_of_it() -> None:
    source = clip(767, fps=25, has_audio=True)
    plan = plan_frames(source, max_area=AREAS["480p"], mode="all")
    assert plan.frame_ids == tuple(range(767)) and plan.fps == 25 and plan.keeps_timing and not plan.notes
    assert plan.audio_end == pytest.approx(767 / 25)
    assert any("frame_mode all" in note for note in plan_frames(source, max_area=AREAS["480p"]).notes)
    assert not any("all" in note for note in plan_frames(clip(81), max_area=AREAS["480p"]).notes)


def test_resample_takes_frames_at_a_rate_and_keeps_speed() -> None:
    plan = plan_frames(clip(300, fps=30, has_audio=True), max_area=AREAS["480p"], mode="resample", fps=10)
    assert plan.frame_num == 81 and plan.fps == 10 and plan.keeps_timing
    assert plan.frame_ids[:4] == (1, 4, 7, 10) and plan.audio_end == pytest.approx(8.1)
    slow = plan_frames(clip(10, fps=2), max_area=AREAS["480p"], mode="resample")
    assert slow.fps == 16 and slow.frame_num == 80 and slow.keeps_timing


def test_a_rate_that_changes_the_speed_leaves_the_sound_out() -> None:
    plan = plan_frames(clip(81, fps=32, has_audio=True), max_area=AREAS["480p"], fps=16)
    assert plan.fps == 16 and not plan.keeps_timing
    assert any("0.5 times as fast" in note for note in plan.notes)
    assert any("sound is left out" in note for note in plan.notes)
    assert plan_frames(clip(81, fps=32, has_audio=True), max_area=AREAS["480p"], fps=32).keeps_timing


def test_mask_of_another_shape_rate_or_kind_is_stated() -> None:
    source = clip()
    plan = plan_frames(source, max_area=AREAS["480p"], mask=clip(81, 480, 480, fps=8))
    text = " ".join(plan.notes)
    assert "480x480" in text and "differ in shape" in text and "frame by frame" in text
    still = plan_frames(source, max_area=AREAS["480p"], mask=clip(1, fps=1))
    assert still.frame_num == 81 and any("one mask picture" in note for note in still.notes)
    picture = replace(clip(1), fps=0.0, duration=0.0, timestamps=np.zeros((1, 2), np.float32))
    assert plan_frames(source, max_area=AREAS["480p"], mask=picture).frame_num == 81
    assert not plan_frames(source, max_area=AREAS["480p"], mask=clip()).notes


def test_crop_and_non_square_pixels_are_stated() -> None:
    plan = plan_frames(clip(81, 60, 46, pixel_aspect=16 / 15), max_area=AREAS["480p"])
    text = " ".join(plan.notes)
    assert "is cropped to fit 48x32" in text and "taken as square" in text


def test_description_reads() -> None:
    lines = describe(plan_frames(clip(767, 1920, 1080, 25), max_area=AREAS["480p"], frame_num=50)).splitlines()
    assert lines[0] == "in    767 frames, 25 fps, 1920x1080"
    assert lines[1] == "used  50 of them, 0 to 766 (spread), 0.00 s to 30.68 s"
    assert lines[2].startswith("out   50 frames, 1.63 fps, 30.68 s, 832x480 (the model makes 53;")
    assert lines[3] == "note  767 frames at 25 fps are spread over 50 frames"


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_uint8_survives_the_way_through_the_model_range() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), np.uint8)
    video = to_model(frames)
    assert video.shape == (3, 11, 6, 5) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1
    np.testing.assert_array_equal(from_model(video), frames)
    np.testing.assert_array_equal(from_model(video.bfloat16() * 3), from_model((video.bfloat16() * 3).clamp(-1, 1)))
    assert (from_model(torch.full((3, 1, 2, 2), float("nan"))) == 0).all()


RAMP = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(RAMP).convert("P")
    if transparent:
        image.info["transparency"] = 0
    return image


IMAGES: dict[str, tuple[Callable[[], Image.Image], Callable[[], np.ndarray]]] = {
    "one_bit.png": (lambda: Image.fromarray(RAMP > 100), lambda: np.where(RAMP > 100, 255, 0)),
    "grey.png": (lambda: Image.fromarray(RAMP), lambda: RAMP),
    "sixteen.png": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), lambda: RAMP),
    "sixteen.tiff": (lambda: Image.fromarray(RAMP.astype(np.uint16) * 257), lambda: RAMP),
    "float.tiff": (lambda: Image.fromarray(RAMP.astype(np.float32) / 255), lambda: RAMP),
    "palette.png": (lambda: palette(False), lambda: RAMP),
    "palette_transparent.png": (lambda: palette(True), lambda: np.where(RAMP == 0, 255, RAMP)),
    "rgba.png": (
        lambda: Image.merge("RGBA", [Image.new("L", (48, 32), 60)] * 3 + [Image.fromarray(RAMP)]),
        lambda: np.rint(60 * (RAMP / 255) + 255 * (1 - RAMP / 255)),
    ),
    "grey_alpha.png": (
        lambda: Image.merge("LA", [Image.new("L", (48, 32), 60), Image.fromarray(RAMP)]),
        lambda: np.rint(60 * (RAMP / 255) + 255 * (1 - RAMP / 255)),
    ),
    "cmyk.jpg": (lambda: Image.fromarray(RAMP).convert("RGB").convert("CMYK"), lambda: RAMP),
    "rgb.webp": (lambda: Image.fromarray(RAMP).convert("RGB"), lambda: RAMP),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_modes(tmp_path: Path, name: str) -> None:
    made, want = IMAGES[name]
    made().save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (32, 48, 3) and image.dtype == np.uint8 and is_image(tmp_path / name)
    tolerance = 12 if name.endswith(("jpg", "webp")) else 1
    assert np.abs(image.astype(int) - want()[..., None]).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 255  # white quarter at the upper left of the stored picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "o.png", exif=exif)
    image = read_image(tmp_path / "o.png")
    assert image.shape[:2] == ((16, 32) if orientation <= 4 else (32, 16))
    # corner where the stored row 0, column 0 is shown, by the EXIF standard
    bottom = {1: 0, 2: 0, 3: 1, 4: 1, 5: 0, 6: 0, 7: 1, 8: 1}[orientation]
    right = {1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 1, 7: 1, 8: 0}[orientation]
    assert image[-bottom, -right].min() == 255 and image[bottom - 1, right - 1].max() == 0


@pytest.mark.parametrize("name", ["missing", "folder", "empty", "garbage", "text", "cut", "video"])
def test_what_is_not_an_image(tmp_path: Path, plain: Path, name: str) -> None:
    path = tmp_path / "bad.png"
    if name == "folder":
        path.mkdir()
    elif name in ("empty", "garbage", "text"):
        BROKEN[name][0](path)
    elif name == "cut":
        Image.fromarray(numbered(1)[0]).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "video":
        path.write_bytes(plain.read_bytes())
    with pytest.raises(InputError, match=r"bad\.png"):
        read_image(path)


def test_still_mask_is_repeated_and_transparency_counts_as_white(tmp_path: Path) -> None:
    picture = np.zeros((32, 64), np.uint8)
    picture[:, 32:] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", range(5), 32, 64)
    assert mask.shape == (5, 32, 64) and mask.dtype == torch.float32
    assert (mask[:, :, :32] == 0).all() and (mask[:, :, 32:] == 1).all()
    Image.fromarray(np.stack([0 * picture] * 3 + [255 - picture], -1)).save(tmp_path / "alpha.png")
    assert torch.equal(read_mask(tmp_path / "alpha.png", range(5), 32, 64), mask)
    info = probe(tmp_path / "mask.png", allow_image=True)
    assert info.is_still and (info.width, info.height, info.frames) == (64, 32, 1)


def test_mask_video_follows_the_frames_and_the_crop_of_the_source(media: Path, plain: Path) -> None:
    ids = (0, 4, 9)
    mask = read_mask(plain, ids, 32, 64)
    want = fit_frames(read_frames(plain, ids), 32, 64)[..., 0] / np.float32(255)
    np.testing.assert_array_equal(mask, want)
    write_video(media / "one.mp4", np.full((1, 32, 64, 3), 255, np.uint8), 16)
    assert read_mask(media / "one.mp4", range(7), 32, 64).shape == (7, 32, 64)


def test_letterbox_of_extreme_shapes_keeps_a_pixel() -> None:
    canvas = letterbox(np.zeros((1, 500, 3), np.uint8), 64, 64)
    assert canvas.shape == (3, 1, 64, 64) and float((canvas < 0).sum()) == 3 * 64


# --- writing ---------------------------------------------------------------------------------------------------------


def smooth(count: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 20
    frames = [np.stack([np.sin(x + i / 5), np.cos(y + i / 7), np.sin(x + y)], -1) for i in range(count)]
    return (127.5 + 110 * np.stack(frames)).round().astype(np.uint8)


@pytest.mark.parametrize("fps", [16, 25, 30000 / 1001, 13.51111125946045, 2.64, 243.0])
def test_write_and_read_back(tmp_path: Path, fps: float) -> None:
    frames = smooth(21, 96, 128)
    write_video(tmp_path / "new" / "out.mp4", frames, fps)
    info = probe(tmp_path / "new" / "out.mp4")
    assert (info.frames, info.height, info.width) == (21, 96, 128)
    assert info.fps == pytest.approx(fps, rel=1e-4) and info.duration == pytest.approx(21 / fps, rel=1e-3)
    assert psnr(read_frames(info.path, range(21)), frames) > 38
    data = (tmp_path / "new" / "out.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # a browser can start before the download ends
    with av.open(info.path) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, int(codec.colorspace)) == ("h264", "yuv420p", 6)


def test_odd_sizes_gain_a_row_and_a_column(tmp_path: Path) -> None:
    frames = smooth(5, 65, 97)
    write_video(tmp_path / "odd.mp4", frames, 16)
    back = read_frames(tmp_path / "odd.mp4", range(5))
    assert back.shape == (5, 66, 98, 3) and psnr(back[:, :65, :97], frames) > 36


def test_same_frames_same_bytes(tmp_path: Path, media: Path) -> None:
    sung = make(media / "sung.mp4", 40, rate=44100)
    frames = numbered(40, 120, 160)
    written = []
    for run in range(4):
        write_video(tmp_path / f"{run}.mp4", frames, 25, audio_from=sung)
        written.append((tmp_path / f"{run}.mp4").read_bytes())
    assert len(set(written)) == 1


def sound_of(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], 1), stream.rate


def pitch(samples: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax()) * rate / len(samples)


@pytest.mark.parametrize(
    "name,how",
    [
        ("mono.mp4", {"rate": 44100}),
        ("stereo.mkv", {"rate": 48000, "layout": "stereo"}),
        ("late.mp4", {"rate": 44100, "start": 50}),
    ],
)
def test_sound_is_carried_and_trimmed(tmp_path: Path, name: str, how: dict) -> None:
    source = make(tmp_path / name, 50, **how)  # 2 s: 440 Hz, from 1 s on 880 Hz
    info = probe(source)
    plan = plan_frames(info, max_area=64 * 96, frame_num=25)
    assert info.has_audio and plan.keeps_timing
    frames = read_frames(source, plan.frame_ids)
    span = {"audio_start": plan.audio_start, "audio_end": plan.audio_end}
    write_video(tmp_path / "whole.mp4", frames, plan.fps, audio_from=source, **span)
    samples, rate = sound_of(tmp_path / "whole.mp4")
    assert len(samples) == (2 if "stereo" in name else 1) and rate == how["rate"]
    assert samples.shape[1] / rate == pytest.approx(2, abs=0.05)
    assert pitch(samples[0, : int(0.9 * rate)], rate) == pytest.approx(440, abs=5)
    assert pitch(samples[0, int(1.1 * rate) : int(1.9 * rate)], rate) == pytest.approx(880, abs=5)
    assert samples[0].std() == pytest.approx(0.3 / np.sqrt(2), rel=0.05)
    write_video(tmp_path / "part.mp4", frames[:13], 25, audio_from=source, audio_start=0.75, audio_end=1.25)
    samples, rate = sound_of(tmp_path / "part.mp4")
    assert samples.shape[1] / rate == pytest.approx(0.5, abs=0.05)
    assert pitch(samples[0, : int(0.22 * rate)], rate) == pytest.approx(440, abs=10)
    assert pitch(samples[0, int(0.28 * rate) : int(0.48 * rate)], rate) == pytest.approx(880, abs=10)
    assert probe(tmp_path / "part.mp4").frames == 13


def test_a_source_without_sound_gives_a_video_without_sound(tmp_path: Path, plain: Path) -> None:
    write_video(tmp_path / "silent.mp4", smooth(5, 32, 32), 16, audio_from=plain)
    assert not probe(tmp_path / "silent.mp4").has_audio


def test_a_damaged_sound_track_does_not_lose_the_picture(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    write_video(tmp_path / "out.mp4", smooth(5, 32, 32), 16, audio_from=tmp_path / "bad.mp4")
    assert probe(tmp_path / "out.mp4").frames == 5 and "written without it" in caplog.text


@pytest.mark.parametrize("shape,fps", [((0, 32, 32, 3), 16), ((4, 32, 32), 16), ((4, 32, 32, 3), 0)])
def test_what_is_not_a_clip(tmp_path: Path, shape: tuple[int, ...], fps: float) -> None:
    with pytest.raises(InputError):
        write_video(tmp_path / "out.mp4", np.zeros(shape, np.uint8), fps)
    with pytest.raises(InputError):
        write_image(tmp_path / "out.png", np.zeros((4, 4, 3), np.float32))
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    frames, path = smooth(21, 96, 128), tmp_path / "out.mp4"
    write_video(path, frames, 16)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0, 0.5, 0.99):  # writing fails at the start, midway, and while the index moves to the front
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(old)), hard))
        try:
            with pytest.raises(OutputError, match="could not be written"):
                write_video(path, frames, 16)
            with pytest.raises(OutputError, match="could not be written"):
                write_image(tmp_path / "new.png", np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == old and os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    real, seen = output._picture, []

    def fails_late(frame: np.ndarray) -> Any:
        seen.append(1)
        if len(seen) == 15:
            assert leftovers(tmp_path)  # it was being written
            raise error
        return real(frame)

    monkeypatch.setattr(output, "_picture", fails_late)
    expected = OutputError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        write_video(tmp_path / "out.mp4", smooth(21, 32, 32), 16)
    assert not os.listdir(tmp_path)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "out.png", tmp_path / "folder", Path("/proc/nowhere/out.png")):
        with pytest.raises(OutputError, match="could not be written"):
            write_image(path, np.zeros((8, 8, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_images_round_trip(tmp_path: Path) -> None:
    for array in (numbered(1)[0], RAMP, np.dstack([numbered(1)[0], np.full((64, 96), 255, np.uint8)])):
        write_image(tmp_path / "image.png", array)
        back = read_image(tmp_path / "image.png")
        np.testing.assert_array_equal(back, array[..., :3] if array.ndim == 3 else np.repeat(array[..., None], 3, -1))


def test_contact_sheet(tmp_path: Path) -> None:
    rows = [("source", numbered(30)), ("one picture", numbered(1, 96, 64)), ("long label " * 30, numbered(3))]
    contact_sheet(rows, tmp_path / "sheet.png", columns=4)
    sheet = read_image(tmp_path / "sheet.png")
    assert sheet.shape[1] == 4 * 212 + 4 and sheet.std() > 20
    with pytest.raises(InputError):
        contact_sheet([], tmp_path / "none.png")


def test_gif_plays_what_it_was_given(tmp_path: Path) -> None:
    from PIL import Image

    colours = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 255], [240, 240, 20]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 24, 40, 3))
    write_gif(tmp_path / "new" / "clip.gif", frames, fps=20)
    animation = Image.open(tmp_path / "new" / "clip.gif")
    assert (animation.n_frames, animation.size, animation.info["duration"]) == (4, (40, 24), 50)
    for i, frame in enumerate(frames):
        animation.seek(i)
        np.testing.assert_allclose(np.asarray(animation.convert("RGB")), frame, atol=4)  # four colours fit a palette
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_gif(tmp_path / "file" / "clip.gif", frames, 8)


# --- real clips ------------------------------------------------------------------------------------------------------


def test_real_clips_are_planned_and_read(real_inputs: Path) -> None:
    source, mask = (probe(real_inputs / f"swap_anything/src_{kind}.mp4") for kind in ("video", "mask"))
    plan = plan_frames(source, max_area=AREAS["480p"], mask=mask, frame_num=9)
    frames = read_frames(source.path, plan.frame_ids, (plan.height, plan.width))
    hole = read_mask(mask.path, plan.frame_ids, plan.height, plan.width)
    assert frames.shape == (9, plan.height, plan.width, 3) and hole.shape == frames.shape[:3]
    assert 0 < float((hole > 0.5).float().mean()) < 1
    assert plan.keeps_timing and plan.fps == pytest.approx(9 / source.duration)
