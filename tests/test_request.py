"""Requests: every shape of input that works, and every one that does not, with its typed error."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.test_video import BROKEN, make, turn
from vdot.errors import CheckpointError, InputError
from vdot.request import Defaults, Request, parse_size, prepare, reference_list
from vdot.video import write_video

SMALL = Defaults(size="64*32", frame_num=5, fps=8.0)


def ask(**values):
    return prepare(Request(**{"prompt": "x", **values}), SMALL)


# --- sizes -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["*", "x", "X", " * ", "×"]))
def test_sizes_in_cells_parse(w, h, times):
    assert parse_size(f"{16 * w}{times}{16 * h}") == (16 * w, 16 * h)


@given(st.text(max_size=12) | st.integers() | st.none())
def test_any_other_size_is_a_sentence(size):
    try:
        width, height = parse_size(size)
    except InputError:
        return
    assert width % 16 == height % 16 == 0 and width > 0 < height


@pytest.mark.parametrize(
    "size", ["500p", "832", "832*", "*480", "832*480*3", "-832*480", "1e3*480", "²*16", "٣٢*٣٢", ""]
)
def test_unknown_sizes(size):
    with pytest.raises(InputError, match="not understood"):
        parse_size(size)


@pytest.mark.parametrize(
    "size, near", [("833*480", "832*480"), ("0*480", "16*480"), ("1*1", "16*16"), ("832*470", "832*464")]
)
def test_sizes_off_the_grid_name_the_nearest(size, near):
    with pytest.raises(InputError, match=near.replace("*", r"\*")):
        parse_size(size)


# --- numbers and text ------------------------------------------------------------------------------------------------

WRONG = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"),
    ({"prompt": None}, "prompt is empty"),
    ({"prompt": 5}, "prompt is empty"),
    ({"prompt": "\udcff"}, "not UTF-8"),
    ({"negative_prompt": 5}, "negative_prompt must be text"),
    ({"frame_num": 0}, "frame_num must be at least 1"),
    ({"frame_num": -3}, "frame_num must be at least 1"),
    ({"frame_num": 2.5}, "whole number"),
    ({"frame_num": "5"}, "whole number"),
    ({"frame_num": True}, "frame_num"),
    ({"frame_num": 10**30}, "at most"),
    ({"frame_num": 60000, "size": "1280*720"}, "more than one run can hold"),
    ({"size": "99999984*99999984"}, "more than one run can hold"),
    ({"size": "480"}, "not understood"),
    ({"size": (832, 480)}, "not understood"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"seed": 2**63}, "seed must be at most"),
    ({"seed": 1.5}, "whole number"),
    ({"context_scale": math.nan}, "context_scale must be a number"),
    ({"context_scale": -0.1}, "context_scale must be a number"),
    ({"context_scale": math.inf}, "context_scale must be a number"),
    ({"context_scale": "1"}, "context_scale must be a number"),
    ({"feather": math.nan}, "feather must be a number"),
    ({"fps": 0}, "fps must be a number"),
    ({"fps": math.inf}, "fps must be a number"),
    ({"fps": 1001}, "fps must be a number"),
    ({"frame_mode": "most"}, "unknown frame_mode 'most'"),
    ({"src_mask": "mask.mp4"}, "a mask needs the source video"),
    ({"src_mask": np.zeros((5, 32, 64), np.uint8)}, "a mask needs the source video"),
    ({"src_video": 5}, "src_video must be a path"),
    ({"src_video": [np.zeros((32, 64, 3), np.uint8)]}, "src_video must be a path"),
    ({"src_video": np.zeros((5, 32, 64, 3), np.float32)}, "uint8"),
    ({"src_video": np.zeros((0, 32, 64, 3), np.uint8)}, "uint8"),
    ({"src_video": np.zeros((5, 32, 64), np.uint8)}, "uint8"),
    ({"src_video": np.zeros((5, 30, 64, 3), np.uint8)}, "multiples of 16"),
    ({"src_ref_images": [5]}, "a reference must be a path"),
    ({"src_ref_images": np.zeros((8, 8), np.uint8)}, "a reference must be uint8"),
    ({"src_ref_images": np.zeros((0, 8, 3), np.uint8)}, "a reference must be uint8"),
    ({"src_ref_images": "nowhere.png"}, "nowhere.png does not exist"),
    ({"src_video": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
]


@pytest.mark.parametrize("values, words", WRONG)
def test_what_cannot_be_used_is_an_input_error_of_one_sentence(values, words):
    with pytest.raises(InputError, match=words) as caught:
        ask(**values)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40))
def test_n_frames_asked_are_n_frames_got(frames):
    """Without a source, of a short array (the last is held) and of a longer one (the first are used)."""
    clip = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    mask = np.full((9, 16, 16), 255, np.uint8)
    for values in ({"size": "16*16"}, {"src_video": clip}, {"src_video": clip, "src_mask": mask}):
        got = ask(frame_num=frames, **values)
        made = got.chunks[-1].stop
        assert got.frame_num == frames and frames <= made < frames + 4 and made % 4 == 1
        assert got.condition.frames == min(made, 5)  # a longer clip is made in chunks
        if got.source is not None:
            assert got.source[:, 0, 0, 0].tolist() == [min(i, frames - 1, 8) for i in range(made)]
            assert any("array" in note for note in got.notes) == (frames != 9)


def test_what_an_array_does_not_use_is_said():
    clip = np.zeros((5, 32, 64, 3), np.uint8)
    assert any("480p is not used" in note for note in ask(src_video=clip, size="480p").notes)
    assert ask(src_video=clip, size="64*32").notes == ()
    assert any("drift" in note for note in ask(frame_num=100, size="16*16", chunk_frames=101).notes)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_mask_arrays_of_every_kind_mean_the_same():
    clip = np.zeros((5, 32, 64, 3), np.uint8)
    half = np.zeros((5, 32, 64), bool)
    half[:, :, 32:] = True
    for mask in (half, half * np.uint8(255), half.astype(np.uint8), half.astype(np.float64), half[0]):
        got = ask(src_video=clip, src_mask=mask).condition.mask
        assert np.array_equal(got.numpy(), half.astype(np.float32))


@pytest.mark.parametrize(
    "mask",
    [
        np.full((5, 32, 64), np.nan),
        np.full((5, 32, 64), 1.5),
        np.full((5, 32, 64), -1),
        np.ones((4, 32, 64)),
        np.ones((5, 16, 64)),
        np.ones(5),
    ],
)
def test_mask_arrays_that_do_not_fit(mask):
    with pytest.raises(InputError, match="src_mask"):
        ask(src_video=np.zeros((5, 32, 64, 3), np.uint8), src_mask=mask)


def test_masks_of_other_lengths_and_sizes_are_fixed_and_said(inputs, tmp_path):
    white = np.full((20, 48, 96, 3), 255, np.uint8)
    write_video(tmp_path / "longer.mp4", white, 8)
    write_video(tmp_path / "shorter.mp4", white[:6], 8)
    for name in ("longer.mp4", "shorter.mp4"):
        got = ask(src_video=inputs / "clip.mp4", src_mask=tmp_path / name, size="480p")
        notes = " / ".join(got.notes)
        assert "both are cut" in notes and "resized to match" in notes
        assert got.condition.mask.shape == got.condition.source.shape[1:]
        assert got.frame_num <= 9 and got.condition.mask.min() > 0.95


def test_a_mask_may_be_a_picture(inputs):
    got = ask(src_video=inputs / "clip.mp4", src_mask=inputs / "mask.png", frame_num=5)
    assert got.condition.mask[:, :, :30].max() == 0 and got.condition.mask[:, :, 34:].min() == 1
    assert any("holds for all frames" in note for note in got.notes)


def test_a_mask_file_for_a_source_array(inputs):
    clip = np.zeros((9, 32, 64, 3), np.uint8)
    got = ask(src_video=clip, src_mask=inputs / "mask.mp4")  # 9 frames where 5 are made at a time
    assert got.mask.shape == (9, 32, 64) and got.condition.mask.shape == (5, 32, 64)
    with pytest.raises(InputError, match="9 frames, the source array 5"):
        ask(src_video=clip[:5], src_mask=inputs / "mask.mp4")


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["L", "1", "I;16", "RGBA", "P", "LA", "CMYK", "exif", "gif", "webp", "bmp", "tiff"])
def test_every_kind_of_picture_is_a_reference(kind, tmp_path):
    """The left half is dark, the right half light, after any EXIF rotation: tolerance 30 of 255."""
    grey = np.full((32, 64), 40, np.uint8)
    grey[:, 32:] = 200
    image, path = Image.fromarray(grey), tmp_path / "a.png"
    if kind == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif kind == "exif":
        path, exif = tmp_path / "a.jpg", Image.Exif()
        exif[274] = 6  # stored turned: show it a quarter clockwise
        image.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    elif kind in ("gif", "webp", "bmp", "tiff"):
        path = tmp_path / f"a.{kind}"
    elif kind == "CMYK":
        path, image = tmp_path / "a.tif", image.convert("RGB").convert("CMYK")
    else:
        image = image.convert(kind, dither=Image.Dither.NONE)
    if kind != "exif":
        image.save(path)
    shown = ask(src_ref_images=str(path)).references[0]
    assert shown.shape == (32, 64, 3)
    dark, light = shown[:, 4:28].mean(), shown[:, 36:60].mean()
    expected = (0, 255) if kind == "1" else (40, 200)
    assert abs(light - expected[1]) < 30 and (kind == "1" or abs(dark - expected[0]) < 30)


def test_transparency_becomes_white(tmp_path):
    Image.fromarray(np.zeros((32, 64, 4), np.uint8)).save(tmp_path / "clear.png")
    assert (ask(src_ref_images=tmp_path / "clear.png").references[0] == 255).all()


def test_reference_lists(tmp_path):
    for name in ("a.png", "b,c.png", "d e.png", "é,ü.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    a, bc, de, eu = (str(tmp_path / name) for name in ("a.png", "b,c.png", "d e.png", "é,ü.png"))
    assert reference_list(f"{a},{bc}, {de} ,{eu}") == [a, bc, de, eu]
    assert reference_list("x.png,y.png,") == ["x.png", "y.png"]
    assert reference_list("b,c.png,a.png", tmp_path) == ["b,c.png", "a.png"]
    assert reference_list(None) == reference_list("") == reference_list(" , ") == []
    assert reference_list(Path(bc)) == [Path(bc)]
    assert len(ask(src_ref_images=f"{a},{bc}").references) == 2


def test_many_references_are_allowed_and_remarked(inputs):
    got = ask(src_ref_images=[inputs / "toy.png"] * 5)
    assert len(got.references) == 5 and any("5 references are more" in note for note in got.notes)


# --- files as users have them ----------------------------------------------------------------------------------------


def broken(tmp_path: Path, inputs: Path, kind: str) -> Path:
    """A file that is no whole video, in one of the ways that test_video.py knows or cut off at the end."""
    path = tmp_path / f"{kind}.mp4"
    if kind == "truncated":
        path.write_bytes((inputs / "clip.mp4").read_bytes()[:-400])
    elif kind == "half":
        data = make(tmp_path / "whole.mp4", 40).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    else:
        BROKEN[kind][0](path)
    return path


KINDS = [*BROKEN, "truncated", "half"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_sources_and_masks_are_input_errors(kind, tmp_path, inputs):
    path = broken(tmp_path, inputs, kind)
    with pytest.raises(InputError) as caught:
        ask(src_video=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if kind != "picture":
        with pytest.raises(InputError):
            ask(src_video=inputs / "clip.mp4", src_mask=path)
        with pytest.raises(InputError):
            ask(src_ref_images=path)


@pytest.mark.parametrize(
    "how, size",
    [
        ({"size": (96, 64)}, (64, 96)),  # portrait, as (width, height)
        ({"size": (33 * 2, 47 * 2)}, None),  # odd
        ({"fps": Fraction(30000, 1001)}, (96, 64)),
        ({"pts": [0, 10, 200, 210, 400, 900, 910, 1000]}, (96, 64)),  # variable rate
        ({"suffix": ".gif", "codec": "gif", "pix_fmt": "rgb8", "fps": 10}, (96, 64)),
        ({"suffix": ".webm", "codec": "libvpx-vp9"}, (96, 64)),
        ({"turn": 90}, (64, 96)),
    ],
)
def test_sources_of_every_shape(how, size, tmp_path):
    how = dict(how)
    path, clockwise = tmp_path / f"a ü,b{how.pop('suffix', '.mp4')}", how.pop("turn", 0)
    make(path, 8, **how)
    if clockwise:
        path = turn(path, tmp_path / "turned.mp4", clockwise)
    got = ask(src_video=path, size="480p", frame_num=5)
    assert got.frame_num == 5 and got.plan is not None
    assert got.condition.height % 16 == got.condition.width % 16 == 0
    if size is not None:
        assert (got.condition.width, got.condition.height) == size


# --- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_checked(tmp_path):
    SMALL.save(tmp_path)
    assert Defaults.from_dict({"size": "64*32", "fps": 8}) == Defaults(size="64*32", fps=8.0)
    for values in ({"sise": "64*32"}, {"frame_num": "many"}, {"fps": None}):
        with pytest.raises(CheckpointError):
            Defaults.from_dict(values)
