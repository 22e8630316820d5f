"""A benchmark's videos measured: known scores of degenerate videos, tables read row by row, results and their page."""

import json
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.evaluate.conftest import moving, noise_picture
from vdot.annotate import control
from vdot.errors import CheckpointError, InputError
from vdot.evaluate import kept
from vdot.evaluate.cases import COMPOSITE, SINGLE, UVC, Case, Loader, Sample, canonical, read_bench, read_settings
from vdot.evaluate.identity import reference_similarity
from vdot.evaluate.page import preview, render
from vdot.evaluate.report import ALL
from vdot.evaluate.results import NOT_MEASURED, SCORE, Measured, compare, load_results, tabulate
from vdot.evaluate.uvcbench import (
    INSTEAD,
    PAPER,
    SCALES,
    VBENCH,
    depth_agreement,
    group_skills,
    line_agreement,
    measure_video,
    score_of,
    vbench_average,
)
from vdot.evaluate.vbench import DRIVER, check_python, read_vbench, run_vbench
from vdot.video import plan_frames, probe, read_frames, write_image, write_video

BENCH = ROOT / "benchmarks" / "uvcbench_tiny"
CLIP = moving((2, 1), 9)
NOISE = np.random.default_rng(0).integers(0, 256, CLIP.shape, np.uint8)
STILL = np.repeat(CLIP[:1], len(CLIP), axis=0)
SHUFFLED = CLIP[[4, 0, 7, 2, 8, 1, 5, 3, 6]]


def case(kind: str = "", frames: np.ndarray = CLIP, **changes) -> Case:
    """A control made from ``frames`` by the project's own annotator, or ``frames`` themselves."""
    source = frames if not kind else control(kind, frames)
    return replace(Case(kind or "inpainting", "words", source, None, (), kind), **changes)


# --- degenerate videos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name, best", [
    ("gray", "gray_error", 0), ("gray", "gray_ssim", 1), ("scribble", "scribble_agreement", 1),
    ("flow", "flow_agreement", 0),
])  # fmt: skip
def test_the_same_video_gets_the_best_and_others_less(kind, name, best):
    values = {
        who: measure_video(case(kind), frames)[0][name]
        for who, frames in {"same": CLIP, "shuffled": SHUFFLED, "still": STILL, "noise": NOISE}.items()
    }
    assert values["same"] == pytest.approx(best, abs=1e-6)
    skills = {who: SCALES[name].skill(value) for who, value in values.items()}
    assert skills["same"] == pytest.approx(1, abs=1e-6)
    assert all(skills[who] < 0.8 for who in ("shuffled", "still", "noise")), skills


def test_noise_has_no_structure_of_the_control():
    """Structural similarity of independent noise is 0 within sampling error; lines hit by chance only."""
    values, _ = measure_video(case("gray"), NOISE)
    assert abs(values["gray_ssim"]) < 0.05
    assert values["gray_error"] > 40  # E|a - b| of N(128, 55)-ish luminance and noise


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_ramp_moved_by_k_pixels_is_off_by_its_slope_times_k(k):
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8)[None, None, :, None], (5, 64, 64, 3))
    moved = np.minimum(ramp.astype(int) + 2 * k, 255).astype(np.uint8)
    values, _ = measure_video(case("gray", np.ascontiguousarray(ramp)), moved)
    assert values["gray_error"] == pytest.approx(2 * k, abs=1e-6)


@pytest.mark.parametrize("k, score", [(0, 1.0), (1, 1.0), (4, 0.0)])
def test_lines_moved_by_k_pixels_are_right_within_the_tolerance(k, score):
    """Of 64 pixels the tolerance is one; upright lines 16 apart do not meet others when moved by 4."""
    lines = np.zeros((3, 64, 64, 3), np.uint8)
    lines[:, :, 8::16] = 255
    shown = np.ones(lines.shape[:3], bool)
    assert line_agreement(np.roll(lines, k, axis=2), lines, shown) == score


@pytest.mark.parametrize("step", [(1, 0), (2, 1), (0, 3)])
def test_motion_of_k_pixels_a_frame_and_none(step):
    values, _ = measure_video(case(), moving(step, 9))
    assert values["motion_amount"] == pytest.approx(np.hypot(*step) / 64, rel=0.1)
    still, _ = measure_video(case(), STILL)
    assert still["motion_amount"] < 1e-4 and still["flicker"] < 0.05 and still["motion_jerk"] < 0.05
    assert SCALES["motion_amount"].skill(still["motion_amount"]) < 0.05  # so that a still does not pass for smooth


def test_frames_in_random_order_are_jerky():
    smooth, _ = measure_video(case(), CLIP)
    jumbled, _ = measure_video(case(), SHUFFLED)
    assert jumbled["motion_jerk"] > 1.0 > 4 * smooth["motion_jerk"]
    assert jumbled["flicker"] > 5 * smooth["flicker"]


def test_depth_agreement_is_free_of_scale_and_shift():
    depth = np.repeat(noise_picture(smooth=6)[None, ..., :1], 4, 0).repeat(3, -1)
    everywhere = np.ones(depth.shape[:3], bool)
    halved = (depth // 2 + 60).astype(np.uint8)
    assert depth_agreement(halved, depth, everywhere) == pytest.approx(1, abs=1e-3)
    assert depth_agreement(255 - depth, depth, everywhere) == pytest.approx(-1, abs=1e-6)
    other = np.repeat(noise_picture(smooth=2, seed=9)[None, ..., :1], 4, 0).repeat(3, -1)
    assert abs(depth_agreement(other, depth, everywhere)) < 0.25
    assert depth_agreement(np.full_like(depth, 7), depth, everywhere) is None


def test_kept_pixels_seams_and_joints():
    mask = np.zeros(CLIP.shape[:3], np.uint8)
    mask[:, :, 32:] = 255
    values, _ = measure_video(case(src_mask=mask), CLIP)
    assert values["kept_psnr"] == 60 and values["kept_ssim"] == pytest.approx(1)
    brighter = CLIP.copy()
    brighter[:, :, 32:] = np.clip(CLIP[:, :, 32:].astype(int) + 30, 0, 255)
    off, _ = measure_video(case(src_mask=mask), brighter)
    assert off["kept_psnr"] == 60 and off["seam"] > values["seam"] + 5
    assert off["joint"] is None  # nothing is kept for a while and generated later


@pytest.mark.parametrize("jump", [0, 10, 40])
def test_a_jump_from_kept_to_generated_frames_is_its_height(jump):
    frames = np.full((9, 32, 32, 3), 100, np.uint8)
    frames[4:] += np.uint8(jump)
    mask = np.zeros((9, 32, 32), np.uint8)
    mask[4:] = 255
    assert kept.joint(frames, mask) == pytest.approx(jump)
    steady = np.stack([np.full((32, 32, 3), 100 + 5 * t, np.uint8) for t in range(9)])
    assert kept.joint(steady, mask) == pytest.approx(0)  # as fast there as beside it
    assert kept.joint(frames, np.zeros_like(mask)) is None


def test_references_are_looked_for_everywhere():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:48, 16:48] = (200, 30, 40)
    blank = np.full((5, 64, 64, 3), 90, np.uint8)
    there = blank.copy()
    there[:, 8:48, 10:50] = (200, 30, 40)
    got = [
        measure_video(Case("r2v", "x", None, None, (picture,)), frames)[0]["reference_colour"]
        for frames in (there, blank)
    ]
    assert got[0] > 0.95 and got[1] < 0.2


def test_what_has_no_annotator_here_is_not_measured(monkeypatch):
    monkeypatch.setattr("vdot.annotate.backends.local_model", lambda name: None)
    values, by = measure_video(case(control="depth"), CLIP)
    assert values["depth_agreement"] is None and "depth" in by["depth"]
    assert values["depth_edges"] is not None  # the stand-in that needs no network
    assert values["things_right"] is None and values["clip_text"] is None and values["vbench_imaging_quality"] is None


def test_the_score_is_its_formula():
    values = dict.fromkeys(SCALES) | {
        "gray_error": 32.0, "gray_ssim": 1.0,  # control: 0.5 and 1
        "kept_psnr": 20.0,  # kept: a quarter of the way from 10 to 50
        "brightness_drift": -8.0,  # picture: 8 of 32 by magnitude
        "clip_text": 0.3, "seconds": 5.0,  # told, not scored
    }  # fmt: skip
    assert group_skills(values) == pytest.approx({"control": 0.75, "kept": 0.25, "picture": 0.75})
    assert score_of(values) == pytest.approx(100 * (0.75 + 0.25 + 0.75) / 3)
    assert score_of(dict.fromkeys(SCALES)) is None
    moved = values | {"motion_amount": 0.0}
    assert group_skills(moved)["motion"] == 0
    assert group_skills(moved | {"motion_ratio": 0.0})["motion"] == 1  # the truth says how much is right
    lines = dict.fromkeys(SCALES) | {"scribble_f1": 0.5}
    assert group_skills(lines)["control"] == 0.5 and group_skills(lines | {"scribble_agreement": 1.0})["control"] == 1
    assert set(INSTEAD) | set(INSTEAD.values()) <= set(SCALES)
    six = {f"vbench_{name}": 0.1 * i for i, name in enumerate(VBENCH)}
    assert vbench_average(six) == pytest.approx(25)
    assert vbench_average({**six, "vbench_dynamic_degree": None}) is None  # five of six are no average


def test_every_metric_says_what_it_is():
    for name, scale in SCALES.items():
        assert scale.about and scale.unit and scale.source and scale.better in ("higher", "lower", "zero"), name
        if scale.worst is not None:
            assert scale.skill(scale.worst) == 0 and scale.skill(scale.best) == 1
            if scale.better != "zero":
                assert (scale.best > scale.worst) == (scale.better == "higher"), name
        else:
            assert scale.skill(1.0) is None
    assert all(set(numbers) == set(SINGLE) for numbers in PAPER.values())


# --- reading a benchmark ---------------------------------------------------------------------------------------------


def test_the_shipped_benchmark_is_whole_and_exact():
    samples, problems = read_bench(BENCH)
    assert not problems and len(samples) == 360
    assert [s.task for s in samples[::20]] == list(UVC) and len(UVC) == 18
    assert read_settings(BENCH) == {"size": "64*64", "frame_num": 17}
    assert {s.task for s in read_bench(BENCH, "single")[0]} == set(SINGLE)
    assert {s.task for s in read_bench(BENCH, "composite")[0]} == set(COMPOSITE)
    few = read_bench(BENCH, "all", 2)[0]
    assert len(few) == 36 and sum(os.path.getsize(p) for p in BENCH.rglob("*") if p.is_file()) < 15e6
    for sample in few[::3]:
        world = Loader(sample).world
        files = Loader(replace(sample, world=None))(world.video.shape)
        assert world.prompt == sample.prompt and len(files.references) == len(world.references)
        assert files.control == world.control or sample.task in ("extension", "outpainting")
        for ours, exact in ((files.src_video, world.src_video), (files.src_mask, world.src_mask)):
            assert (ours is None) == (exact is None)
            if ours is not None:  # 4:2:0 blurs colours at this size; masks come back whole
                assert np.abs(ours.astype(int) - exact).mean() < 6
        if files.src_mask is not None:
            assert (kept.generated(files.src_mask) == kept.generated(world.src_mask)).mean() > 0.999
        for ours, exact in zip(files.references, world.references, strict=True):
            np.testing.assert_array_equal(ours, exact)


@pytest.mark.parametrize("written, meant", [
    ("Reference+Grey", "reference+gray"), ("first_frame_depth", "firstframe+depth"), ("R2v", "r2v"),
    ("firstframe+pose", "firstframe+pose"), ("r2v_several", "r2v"), ("grey", "gray"), ("Inpainting", "inpainting"),
    ("swap_anything", "swap_anything"), ("first frame + flow", "firstframe+flow"),
])  # fmt: skip
def test_names_of_tasks(written, meant):
    assert canonical(written) == meant


@pytest.fixture
def bench(tmp_path):
    """``bench(rows) -> folder`` with a clip, a mask and a picture beside the index."""
    write_video(tmp_path / "clip.mp4", CLIP, 8)
    write_video(tmp_path / "mask.mp4", np.full_like(CLIP, 255), 8)
    write_image(tmp_path / "toy.png", CLIP[0])

    def write(*rows):
        lines = [
            row if isinstance(row, str) else json.dumps({"sample_id": "1", "en_prompt": "x", **row}) for row in rows
        ]
        (tmp_path / "indices").mkdir(exist_ok=True)
        (tmp_path / "indices" / "uvcbench_single.txt").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


BAD = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ({"subtask": "depth", "en_prompt": ""}, "en_prompt is missing"),
    ({"subtask": "depth"}, "src_video is missing, which depth is about"),
    ({"subtask": "depth", "src_video": "gone.mp4"}, "gone.mp4 does not exist"),
    ({"subtask": "depth", "src_video": "toy.png"}, "is an image, not a video"),
    ({"subtask": "outpainting", "src_video": "clip.mp4"}, "src_mask is missing"),
    ({"subtask": "R2V", "src_ref_images": []}, "src_ref_images is missing"),
    ({"subtask": "R2V", "src_ref_images": ["clip.mp4"]}, "not an image"),
    ({"subtask": "R2V", "src_ref_images": [3]}, "a list of text"),
    ({"subtask": "../up", "src_video": "clip.mp4"}, "cannot name a file"),
    ({"subtask": "depth", "sample_id": "a/b", "src_video": "clip.mp4"}, "cannot name a file"),
    ({"subtask": "inpainting", "src_mask": "mask.mp4"}, "src_mask needs the src_video"),
    ({"subtask": "depth", "src_video": "clip.mp4", "world": {"task": "depth"}}, "world must be"),
    ({"subtask": "DEPTH", "sample_id": "ok", "src_video": "clip.mp4"}, "is there already"),
]


@pytest.mark.parametrize("row, words", BAD, ids=[words for _, words in BAD])
def test_a_bad_row_is_named_with_its_line_and_spares_the_others(row, words, bench):
    good = {"subtask": "depth", "sample_id": "ok", "src_video": "clip.mp4"}
    samples, problems = read_bench(bench(good, row))
    assert [s.key for s in samples] == ["depth/ok"]
    assert len(problems) == 1 and words in str(problems[0]) and "line 2" in str(problems[0])


def test_a_task_gets_what_it_is_about(bench):
    everything = {"src_video": "clip.mp4", "src_mask": "mask.mp4", "src_ref_images": ["toy.png"]}
    names = ("R2V", "depth", "firstframe+depth", "reference+depth", "outpainting", "inpainting")
    samples, problems = read_bench(bench(*({"subtask": name, **everything} for name in names)))
    got = {s.subtask: (s.src_video is not None, s.src_mask is not None, len(s.references)) for s in samples}
    assert not problems and got == {
        "R2V": (False, False, 1), "depth": (True, False, 0), "firstframe+depth": (True, True, 0),
        "reference+depth": (True, False, 1), "outpainting": (True, True, 0), "inpainting": (True, True, 1),
    }  # fmt: skip


def test_folders_of_examples_are_a_benchmark_too(tmp_path):
    """VACE-Benchmark's layout; the repository's own examples have it."""
    samples, problems = read_bench(ROOT)
    assert not problems and {"inpainting", "layout", "reference+pose"} <= {s.task for s in samples}
    inner = tmp_path / "assets" / "examples" / "depth" / "first"
    inner.mkdir(parents=True)
    write_video(inner / "src_video.mp4", CLIP, 8)
    (tmp_path / "assets" / "examples" / "t2v").mkdir()
    samples, problems = read_bench(tmp_path)
    assert samples == [] and [str(p) for p in problems] == [
        "depth/first: prompt.txt is missing: write what the video shows",
        "t2v: prompt.txt is missing: write what the video shows",
    ]


def test_no_benchmark_is_said_so(tmp_path):
    with pytest.raises(InputError, match="holds no benchmark"):
        read_bench(tmp_path)
    with pytest.raises(InputError, match="no benchmark folder"):
        read_bench(tmp_path / "gone")
    (tmp_path / "bench.json").write_text('{"steps": 4}')
    with pytest.raises(InputError, match="size and frame_num"):
        read_settings(tmp_path)


def test_sources_lie_on_the_videos_own_grid(bench):
    """A video of fewer frames and another size is measured against the frames that it was made from."""
    sample = read_bench(bench({"subtask": "depth", "src_video": "clip.mp4"}))[0][0]
    loaded = Loader(sample)((5, 32, 32, 3))
    assert loaded.src_video.shape == (5, 32, 32, 3) and loaded.control == "depth"
    spread = read_frames(sample.src_video, [0, 2, 4, 6, 8], (32, 32))
    np.testing.assert_array_equal(loaded.src_video, spread)
    trimmed = Loader(sample, "trim")((5, 32, 32, 3))
    np.testing.assert_array_equal(trimmed.src_video, read_frames(sample.src_video, range(5), (32, 32)))


@pytest.mark.parametrize("frames, size", [(5, 64), (9, 64), (17, 32), (50, 48), (97, 32), (131, 16)])
def test_the_frames_measured_against_are_those_generated_from(frames, size, tmp_path):
    """Known from the video alone: its number of frames and its size give the plan that it was made by."""
    write_video(tmp_path / "c.mp4", np.zeros((frames, size, size, 3), np.uint8), 12)
    info = probe(tmp_path / "c.mp4")
    for area in (16 * 16, 480 * 832):
        for asked in (None, 5, 16, 40):
            made = plan_frames(info, max_area=area, frame_num=asked)
            again = plan_frames(
                info, max_area=made.height * made.width, frame_num=made.frame_num, budget_frames=made.frame_num
            )
            assert again.frame_ids == made.frame_ids and (again.height, again.width) == (made.height, made.width)


# --- results ---------------------------------------------------------------------------------------------------------


def rows(shift: float = 0.0, count: int = 6) -> list[Measured]:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 3, (2, count))
    return [
        Measured(f"{task}/{i}", task, str(i), task, f"words <b>{i}</b>", dict.fromkeys(SCALES) | {
            "gray_error": 20 + noise[k, i] + shift, "brightness_drift": -2.0, "flicker": 3.0 if i else None})
        for k, task in enumerate(("gray", "reference+gray")) for i in range(count)
    ]  # fmt: skip


def results(shift: float = 0.0, **hashes: str):
    return tabulate(rows(shift), {"hashes": {"benchmark": "b", "measurement": "m", **hashes}}, resamples=300)


def test_means_intervals_and_what_was_not_measured(tmp_path):
    found = results()
    cell = found.cells["gray"]["gray_error"]
    assert cell.mean == pytest.approx(np.mean([r.values["gray_error"] for r in rows()[:6]])) and cell.n == 6
    assert cell.low < cell.mean < cell.high and found.cells["gray"]["flicker"].n == 5
    assert found.cells["gray"]["brightness_drift"].mean == 2  # by magnitude
    both = [found.cells[t][SCORE].mean for t in ("gray", "reference+gray")]
    assert found.cells[ALL][SCORE].mean == pytest.approx(np.mean(both))
    assert "clip_text" not in found.cells[ALL]
    found.save(tmp_path)
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["tasks"]["gray"]["clip_text"] is None and saved["samples"][0]["values"]["kept_psnr"] is None
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("subtask,sample_id,task,message,score,things_right")
    cells = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert cells["clip_text"] == cells["kept_psnr"] == cells["flicker"] == ""  # empty, not zero
    text = (tmp_path / "scores.md").read_text()
    assert "| clip_text | text | -1..1 | higher | not measured | | 0 |" in text and "82.54" in text and "81.32" in text
    again = load_results(tmp_path)
    assert again.samples == found.samples and again.cells[ALL][SCORE].mean == found.cells[ALL][SCORE].mean


def test_a_failed_sample_is_not_a_zero():
    failed = replace(rows()[0], values=dict.fromkeys(SCALES), message="no video")
    found = tabulate([failed, *rows()[1:]], {}, resamples=100)
    assert found.cells["gray"][SCORE].n == 5 and "| 5 of 6 |" in found.markdown()
    assert found.worst_first("gray")[0].message == "no video"


def test_paired_differences_are_narrower_than_the_spread_and_know_their_direction():
    a, b = results(shift=1.0), results()
    found = compare(a, b, ("a", "b")).differences
    gap = found[ALL]["gray_error"]
    assert gap.mean == pytest.approx(1.0) and gap.low == pytest.approx(1.0) and gap.high == pytest.approx(1.0)
    assert gap.n == 12 and found["gray"]["gray_error"].n == 6
    text = compare(a, b, ("a", "b")).markdown()
    assert re.search(r"\| all \| gray_error \| lower \| \+1 \| 1 to 1 \| worse \| 12 \|", text)
    assert compare(a, a, ("a", "a")).differences[ALL][SCORE].mean == 0


@pytest.mark.parametrize("part", ["benchmark", "measurement"])
def test_what_was_not_measured_alike_is_not_compared(part):
    with pytest.raises(InputError, match=f"differ in {part}"):
        compare(results(), results(**{part: "other"}), ("a", "b"))


def test_no_results_is_said_so(tmp_path):
    with pytest.raises(InputError, match="holds no results"):
        load_results(tmp_path)


# --- the page --------------------------------------------------------------------------------------------------------


def page() -> str:
    mask = np.zeros(CLIP.shape[:3], np.uint8)
    mask[:, :, 32:] = 255
    made = [*rows()[:-1], replace(rows()[-1], values=dict.fromkeys(SCALES), message="it <failed>")]
    found = tabulate(made, {"hashes": {"benchmark": "b"}, "bad_rows": ["line 3: <gone>"]}, resamples=50)
    shown = preview(case(src_mask=mask, references=(CLIP[0],)), CLIP)
    return render(found, {row.key: shown for row in made[:2]})


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given():
    text = page()
    assert not re.search(r'(src|href)="https?:', text) and "<link" not in text and "import(" not in text
    assert "words &lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text
    assert "it &lt;failed&gt;" in text and "line 3: &lt;gone&gt;" in text
    assert text.count("data:video/mp4;base64,") == 2 and NOT_MEASURED in text


def test_a_preview_shows_all_panels_side_by_side(tmp_path):
    mask = np.full(CLIP.shape[:3], 255, np.uint8)
    names, data = preview(case(src_mask=mask, references=(CLIP[0],)), CLIP)
    assert names == "source, red is generated | reference | result"
    (tmp_path / "p.mp4").write_bytes(data)
    frames = read_frames(tmp_path / "p.mp4", range(9))
    assert frames.shape == (9, 64, 3 * 64 + 2 * 4, 3)
    assert np.abs(frames[:, :, -64:].astype(int) - CLIP).mean() < 12  # compressed
    red = frames[:, 8:56, 8:56].astype(int)
    assert (red[..., 0] - red[..., 1]).mean() > 40


NAMES = (os.environ.get("VDOT_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if name and (found := shutil.which(name))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set VDOT_CHROMIUM")
def test_the_page_sorts_and_plays_in_a_browser(tmp_path):
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    (tmp_path / "report.html").write_text(page(), encoding="utf-8")
    with ThreadPoolExecutor(1) as thread:  # whose own loop gets on with that of another browser of this session
        thread.submit(_visit, f"file://{tmp_path}/report.html").result()


def _visit(address: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        tab.goto(address)
        title = tab.locator("#samples-gray thead th", has_text="gray_error")
        at = title.evaluate("th => [...th.parentNode.children].indexOf(th)")
        for way in ("ascending", "descending"):
            title.click()
            assert title.get_attribute("aria-sort") == way
            cells = tab.locator(f"#samples-gray tbody tr td:nth-child({at + 1})").all_inner_texts()
            numbers = [float(cell) for cell in cells]
            assert numbers == sorted(numbers, reverse=way == "descending") and len(set(numbers)) > 3
        failed = tab.locator("#samples-reference\\+gray tbody tr.failed")
        assert failed.count() == 1
        video = tab.locator("video").first
        video.scroll_into_view_if_needed()
        tab.wait_for_function("document.querySelector('video').readyState >= 2", timeout=120_000)
        assert video.evaluate("v => [v.videoWidth, v.videoHeight]") == [200, 64]
        assert wrong == []
        browser.close()


# --- VBench, as a stub executable: the real one was not run here -----------------------------------------------------


@pytest.fixture
def stub(tmp_path):
    """A python that does what VBench's would be asked to, and writes what VBench writes."""
    program = tmp_path / "envs" / "python"
    program.parent.mkdir()
    program.write_text(f"""#!{os.sys.executable}
import json, os, sys
assert sys.argv[1] == "-c" and "mode=\\"custom_input\\"" in sys.argv[2], sys.argv
assert "PYTHONPATH" not in os.environ
videos, results, device, *dimensions = sys.argv[3:]
if os.path.exists({str(tmp_path / "broken")!r}):
    sys.exit("ModuleNotFoundError: No module named 'vbench'")
names = sorted(os.listdir(videos))
assert all(os.path.getsize(os.path.join(videos, name)) for name in names)
found = {{d: [0.5, [dict(video_path=os.path.join(videos, n), video_results=(i % 2 == 0) if d == "dynamic_degree" else
    60.0 + i if d == "imaging_quality" else 0.9) for i, n in enumerate(names)]] for d in dimensions}}
json.dump(found, open(os.path.join(results, "videos_eval_results.json"), "w"))
open({str(tmp_path / "calls")!r}, "a").write("x")
print("done")
""")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_vbench_is_driven_in_its_own_environment(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    videos = {}
    for key in ("depth/00", "reference+gray/01"):
        videos[key] = tmp_path / f"{key}.mp4"
        write_video(videos[key], CLIP, 8)
    hashes = {"depth/00": "a", "reference+gray/01": "b"}
    values = run_vbench(stub, videos, tmp_path / "vbench", "cpu", hashes)
    assert values["depth/00"] == {
        "vbench_aesthetic_quality": 0.9, "vbench_background_consistency": 0.9, "vbench_dynamic_degree": 1.0,
        "vbench_imaging_quality": 0.6, "vbench_motion_smoothness": 0.9, "vbench_subject_consistency": 0.9,
    }  # fmt: skip
    assert values["reference+gray/01"]["vbench_dynamic_degree"] == 0.0
    assert values["reference+gray/01"]["vbench_imaging_quality"] == pytest.approx(0.61)
    assert run_vbench(stub, videos, tmp_path / "vbench", "cpu", hashes) == values
    assert (tmp_path / "calls").read_text() == "x"  # the same videos are not measured twice
    run_vbench(stub, videos, tmp_path / "vbench", "cpu", {**hashes, "depth/00": "other"})
    assert (tmp_path / "calls").read_text() == "xx"
    (tmp_path / "broken").touch()
    with pytest.raises(InputError, match="code 1: ModuleNotFoundError: No module named 'vbench'"):
        run_vbench(stub, videos, tmp_path / "vbench", "cpu", {})


def test_results_of_a_vbench_run_elsewhere_are_read(tmp_path):
    told = {"/theirs/out/depth/00.mp4": 0.8, "flow__02.mp4": 0.7, "other/00.mp4": 0.1}
    listed = [{"video_path": path, "video_results": value} for path, value in told.items()]
    found = {"motion_smoothness": [0.9, listed], "color": [0.1, []]}
    (tmp_path / "x_eval_results.json").write_text(json.dumps(found))
    keys = ["depth/00", "flow/02", "flow/03"]
    want = {"depth/00": {"vbench_motion_smoothness": 0.8}, "flow/02": {"vbench_motion_smoothness": 0.7}}
    assert read_vbench(tmp_path, keys) == read_vbench(tmp_path / "x_eval_results.json", keys) == want
    with pytest.raises(InputError, match="says nothing of these videos"):
        read_vbench(tmp_path, ["gray/00"])
    with pytest.raises(InputError, match="no VBench results"):
        read_vbench(tmp_path / "gone", keys)
    (tmp_path / "x_eval_results.json").write_text('{"motion_smoothness": 3}')
    with pytest.raises(InputError, match="not what VBench writes"):
        read_vbench(tmp_path, keys)
    with pytest.raises(InputError, match="cannot be run"):
        check_python(str(tmp_path / "gone"))
    compile(DRIVER, "driver", "exec")


# --- networks from local folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 16, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return folder


def test_clip_says_the_cosine_of_prompt_and_frames(clip_folder):
    from PIL import Image
    from transformers import AutoProcessor, CLIPModel

    from vdot.evaluate.networks import ClipText, spread

    value = ClipText(clip_folder, torch.device("cpu"))(CLIP, "a b")
    model, processor = CLIPModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    inputs = processor(text=["a b"], images=[Image.fromarray(f) for f in spread(CLIP)], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[:, 0]  # cosine times a learned factor
    assert value == pytest.approx(float(logits.mean() / model.logit_scale.detach().exp()), abs=1e-5)
    long = ClipText(clip_folder, torch.device("cpu"))(CLIP, "a b " * 100)  # cut to what the model reads
    assert -1 <= long <= 1


def test_dino_knows_the_same_picture(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    from vdot.evaluate.networks import DinoIdentity

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    dino = DinoIdentity(tmp_path, torch.device("cpu"))
    assert dino(STILL, (STILL[0],)) == pytest.approx(1, abs=1e-5)
    assert dino(NOISE, (STILL[0],)) < 0.999 and dino(STILL, ()) is None


def test_folders_without_a_model_are_refused(tmp_path):
    from vdot.evaluate.networks import ClipText, DinoIdentity

    with pytest.raises(InputError, match="holds no model"):
        ClipText(tmp_path, torch.device("cpu"))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a model"):
        DinoIdentity(tmp_path, torch.device("cpu"))


def test_samples_know_their_files(bench):
    folder = bench({"subtask": "reference+depth", "src_video": "clip.mp4", "src_ref_images": "toy.png"})
    sample = read_bench(folder)[0][0]
    assert sample == Sample("reference+depth", "1", "x", folder / "clip.mp4", None, (folder / "toy.png",))
    assert sample.files == {"src_video": [folder / "clip.mp4"], "src_mask": [], "src_ref_images": [folder / "toy.png"]}


def test_a_large_picture_is_searched_as_the_same_small_one():
    """Block means of whole blocks are the small picture's own pixels: the scores agree."""
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:48, 16:48] = (200, 30, 40)
    small = np.stack([noise_picture(96, 96, seed=k) for k in range(2)])
    small[:, 20:60, 30:70] = (200, 30, 40)
    large = small.repeat(3, 1).repeat(3, 2)
    assert reference_similarity(picture, large)[0] == pytest.approx(reference_similarity(picture, small)[0], abs=0.01)
