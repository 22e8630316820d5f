"""The gallery of the demo: every task's condition beside its result."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, TINY
from vdot.data.sprites import draw_task
from vdot.data.sprites.look import MARK, NOTHING, framed_source, reference_cell
from vdot.video import probe, read_frames, read_image

SCRIPT = ROOT / "scripts" / "gallery.py"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gallery, monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gallery.py", *options])
    return gallery.main()


def test_every_part_is_written_and_is_what_its_name_says(gallery, monkeypatch, tmp_path, capsys):
    options = ("--ckpt_dir", str(TINY), "--out", str(tmp_path), "--tasks", "r2v,inpainting", "--side", "64")
    assert run(gallery, monkeypatch, *options, "--columns", "2", "--device", "cpu") == 0
    assert capsys.readouterr().out.split()[:2] == [str(tmp_path / "gallery.gif"), str(tmp_path / "gallery.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gallery.gif", "gallery.png", "inpainting.mp4", "r2v.mp4",
    ]  # fmt: skip
    animation = Image.open(tmp_path / "gallery.gif")
    wide = 3 * (64 + gallery.GAP)
    assert animation.n_frames == 17 and animation.size == (2 * wide, gallery.HEAD + 64 + gallery.GAP)
    assert animation.info["duration"] == 120 and animation.info["loop"] == 0  # 125 ms; GIF counts in hundredths
    made = draw_task(1, "inpainting", "test", view="near")
    info = probe(tmp_path / "inpainting.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (17, 64, 64, 8)
    animation.seek(8)
    shown = np.asarray(animation.convert("RGB"))[gallery.HEAD :]
    source, result = (shown[:64, wide + left :][:, :64].astype(float) for left in (0, 2 * (64 + gallery.GAP)))
    # 256 colours for everything; the result is compressed, and kept pixels are the source's own
    assert np.abs(source - framed_source(made)[8]).mean() < 12
    assert np.abs(result - read_frames(tmp_path / "inpainting.mp4", [8])[0]).mean() < 12
    kept = made.src_mask[8] == 0
    assert np.abs(result - made.src_video[8])[kept].mean() < 16
    assert read_image(tmp_path / "gallery.png").shape[1] == 9 * 100 + 4


def test_what_is_no_task_is_refused_in_a_sentence(gallery, monkeypatch, tmp_path, capsys):
    assert run(gallery, monkeypatch, "--tasks", "t2v,dance", "--out", str(tmp_path / "new")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown task 'dance': use one of t2v, ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_sources_are_framed_and_references_gathered():
    made = draw_task(5, "inpainting", "test")
    framed = framed_source(made)
    marked = (framed == np.array(MARK, np.uint8)).all(-1)
    assert marked.any(axis=(1, 2)).all() and (made.src_mask[marked] == 255).all()
    np.testing.assert_array_equal(framed[~marked], made.src_video[~marked])
    words = draw_task(5, "t2v", "test")
    assert (framed_source(words) == NOTHING).all() and (reference_cell(words) == 255).all()
    several = draw_task(5, "r2v_several", "test")
    cell = reference_cell(several)
    assert len(several.references) > 1 and (cell[:32, :32] != 255).any() and (cell[:32, 32:] != 255).any()
