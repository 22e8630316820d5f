"""The whole command on a benchmark of a few small samples: generated, measured, reported, resumed, compared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vdot.bench.scoring
import vdot.cli
from tests.conftest import ROOT, TINY
from vdot import VdotPipeline
from vdot.bench.run import main, parse_options, with_settings
from vdot.bench.scoring import cost
from vdot.config import GenerateConfig
from vdot.errors import ConfigError
from vdot.evaluate.cases import read_bench
from vdot.evaluate.report import ALL
from vdot.evaluate.results import SCORE, load_results
from vdot.video import read_frames, write_image, write_video

SHARE = ROOT / "benchmarks" / "uvcbench_tiny"
SMALL = ("--size", "32*32", "--sample_steps", "1", "--report_videos", "1")
PLANS: list = []  # what a video takes is counted once: the counting itself is tested elsewhere
COST = ("seconds", "peak_memory")  # differ from run to run


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    """Three samples of five 32x32 frames: a control, a masked clip, a reference."""
    folder = tmp_path_factory.mktemp("bench")
    y, x = np.mgrid[:32, :32]
    clip = np.stack([np.stack([8 * x, 8 * y, 0 * x + 40 * t], -1) for t in range(5)]).astype(np.uint8)
    grey = np.repeat(clip[..., :1], 3, -1)
    mask = np.zeros_like(clip)
    mask[:, :, 16:] = 255
    for name, frames in {"gray": grey, "clip": clip, "mask": mask}.items():
        write_video(folder / f"{name}.mp4", frames, 8)
    write_image(folder / "toy.png", clip[2])
    given = (
        {"subtask": "gray", "src_video": "gray.mp4"},
        {"subtask": "outpainting", "src_video": "clip.mp4", "src_mask": "mask.mp4"},
        {"subtask": "reference+gray", "src_video": "gray.mp4", "src_ref_images": ["toy.png"]},
    )
    (folder / "indices").mkdir()
    lines = (json.dumps({"sample_id": "00", "en_prompt": "a toy", **row}) for row in given)
    (folder / "indices" / "uvcbench_all.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(bench, capsys, tiny, monkeypatch):
    """``run(args...) -> (exit code, stdout, stderr)`` with the pipeline of all tests and one memory plan."""
    count = vdot.cli.plan_generation
    monkeypatch.setattr(VdotPipeline, "from_pretrained", lambda *args: tiny)
    monkeypatch.setattr(vdot.cli, "plan_generation", lambda *args: (PLANS or PLANS.append(count(*args)) or PLANS)[0])

    def call(*args, at: Path = bench):
        code = main([str(a) for a in ("--bench_dir", at, "--ckpt_dir", TINY, *SMALL, *args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def scores(folder: Path) -> list[dict]:
    rows = json.loads((folder / "scores.json").read_text())["samples"]
    return [{**row, "values": {k: v for k, v in row["values"].items() if k not in COST}} for row in rows]


def test_one_command_makes_and_measures_everything(run, bench, tmp_path):
    code, out, _ = run("--save_dir", tmp_path)
    assert code == 0 and "3 samples of 3 tasks" in out and "generated: 3 done, 0 skipped, 0 failed" in out
    assert "3 of 3 samples measured" in out
    for name in ("gray", "outpainting", "reference+gray"):
        assert read_frames(tmp_path / name / "00.mp4", range(5)).shape == (5, 32, 32, 3)
    found = load_results(tmp_path)
    values = {row.task: row.values for row in found.samples}
    assert values["gray"]["gray_error"] > 1 and values["gray"]["kept_psnr"] is None
    assert values["outpainting"]["kept_psnr"] > 20 and values["outpainting"]["seam"] is not None
    assert values["reference+gray"]["reference_colour"] is not None
    assert all(v["evaluations"] == 1 and v["seconds"] > 0 and v["peak_memory"] > 0 for v in values.values())
    assert found.cells[ALL][SCORE].n == 3
    notes = json.loads((tmp_path / "manifest.json").read_text())
    assert "unknown" not in notes["hashes"].values() and len(set(notes["hashes"].values())) == 4
    assert notes["model"]["schedule"]["steps"] == 1 and set(notes["videos"]) == set(notes["samples"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 3 and notes["hashes"]["videos"] in page

    # Again: nothing is made or measured anew, and the numbers are the same.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/00*") if path.is_file()}
    code, out, _ = run("--save_dir", tmp_path)
    assert code == 0 and "0 done, 3 skipped, 0 failed" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert load_results(tmp_path).samples == found.samples

    # The same benchmark elsewhere, the same hashes: two people see that they measured the same thing.
    moved = tmp_path / "moved"
    shutil.copytree(bench, moved)
    run("--save_dir", tmp_path / "b", at=moved)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["hashes"] == notes["hashes"]


def test_what_was_corrupted_or_asked_otherwise_is_made_again(run, tmp_path):
    run("--save_dir", tmp_path)
    first = scores(tmp_path)
    video = tmp_path / "gray" / "00.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])  # a killed copy
    (tmp_path / "outpainting" / "00" / "run.json").unlink()
    code, out, _ = run("--save_dir", tmp_path)
    assert code == 0 and "2 done, 1 skipped, 0 failed" in out and video.read_bytes() == whole
    assert scores(tmp_path) == first
    code, out, _ = run("--save_dir", tmp_path, "--base_seed", "7")
    assert "3 done, 0 skipped" in out
    assert [row["key"] for row in scores(tmp_path)] == [row["key"] for row in first] and scores(tmp_path) != first


def test_videos_of_others_are_measured_and_bad_ones_say_so(run, bench, tmp_path):
    """``--score_only``: the source itself as the result, a missing video, half a file."""
    (tmp_path / "gray").mkdir()
    (tmp_path / "reference+gray").mkdir()
    shutil.copy(bench / "gray.mp4", tmp_path / "gray" / "00.mp4")
    (tmp_path / "reference+gray" / "00.mp4").write_bytes((bench / "gray.mp4").read_bytes()[:700])
    code, out, _ = run("--score_only", "--save_dir", tmp_path)
    assert code == 1 and "1 of 3 samples measured" in out
    rows = {row["key"]: row for row in json.loads((tmp_path / "scores.json").read_text())["samples"]}
    assert rows["gray/00"]["values"]["gray_error"] == 0 and rows["gray/00"]["values"]["seconds"] is None
    assert rows["outpainting/00"]["message"] == "no video" and rows["outpainting/00"]["score"] is None
    assert "00.mp4" in rows["reference+gray/00"]["message"]
    assert json.loads((tmp_path / "manifest.json").read_text())["hashes"]["model"] == "unknown"


def test_a_folder_without_a_video_is_said_so(run, tmp_path):
    code, _, err = run("--score_only", "--save_dir", tmp_path / "empty")
    assert code == 2 and "holds no video of this benchmark" in err and not (tmp_path / "empty").exists()


def test_one_failure_costs_one_sample(run, tmp_path, monkeypatch):
    prepare = vdot.cli.Session.prepare

    def fragile(self, config):
        if "mask" in (config.src_mask or ""):
            raise RuntimeError("a bug")
        return prepare(self, config)

    monkeypatch.setattr(vdot.cli.Session, "prepare", fragile)
    code, out, _ = run("--save_dir", tmp_path)
    assert code == 1 and "2 done, 0 skipped, 1 failed" in out
    rows = {row["key"]: row["message"] for row in json.loads((tmp_path / "scores.json").read_text())["samples"]}
    assert rows["outpainting/00"] == "unexpected RuntimeError: a bug" and rows["gray/00"] == ""


def test_a_stopped_run_goes_on_where_it_was(run, tiny, tmp_path, monkeypatch):
    """Ctrl-C within the second video; the table is that of a run that was never stopped."""
    run("--save_dir", tmp_path / "whole")
    generate, calls = type(tiny).generate, []

    def stopped(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny), "generate", stopped)
        code, _, err = run("--save_dir", tmp_path / "cut")
    assert code == 130 and "interrupted" in err and not (tmp_path / "cut" / "scores.json").exists()
    code, out, _ = run("--save_dir", tmp_path / "cut")
    assert code == 0 and "2 done, 1 skipped, 0 failed" in out
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")


def test_a_bug_in_a_measurement_costs_one_sample(run, tmp_path, monkeypatch):
    measure = vdot.bench.scoring.measure_video

    def fragile(case, frames):
        if case.src_mask is not None:
            raise ZeroDivisionError("here")
        return measure(case, frames)

    monkeypatch.setattr(vdot.bench.scoring, "measure_video", fragile)
    code, out, _ = run("--save_dir", tmp_path)
    assert code == 1 and "2 of 3 samples measured" in out and "unexpected ZeroDivisionError: here" in out


def test_two_results_are_compared(run, tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "2")):
        run("--save_dir", tmp_path / name, "--base_seed", seed)
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--save_dir", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "| all | score | higher |" in out and "| all | gray_error | lower |" in out and "| gray | score |" in out
    assert "| gray | gray_error | lower |" in (tmp_path / "c" / "comparison.md").read_text()
    saved = json.loads((tmp_path / "c" / "comparison.json").read_text())["differences"]
    assert saved["gray"]["gray_error"]["n"] == 1 and saved["all"]["score"]["n"] == 3
    run("--save_dir", tmp_path / "few", "--split", "single")
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "few")]) == 2
    assert "differ in benchmark" in capsys.readouterr().err


def test_rows_are_checked_before_anything_is_made(run, bench, tmp_path):
    other = tmp_path / "bench"
    shutil.copytree(bench, other)
    with (other / "indices" / "uvcbench_all.txt").open("a") as index:
        index.write('{"subtask": "depth", "sample_id": "01", "en_prompt": "x", "src_video": "gone.mp4"}\n')
    code, out, err = run("--save_dir", tmp_path / "out", at=other)
    assert code == 2 and err.count("\n") == 1 and "line 4" in err and "--skip_bad_rows" in err
    assert "line 4: " in out and not (tmp_path / "out").exists()
    code, out, _ = run("--save_dir", tmp_path / "out", "--skip_bad_rows", "--dry_run", at=other)
    assert code == 0 and "0 of 3 would fail" in out and not (tmp_path / "out").exists()


def test_vbench_results_are_laid_beside(run, bench, tmp_path):
    shutil.copytree(bench, tmp_path / "gray")
    (tmp_path / "gray" / "gray.mp4").rename(tmp_path / "gray" / "00.mp4")
    rows = [{"video_path": "x/gray/00.mp4", "video_results": 0.25}]
    (tmp_path / "v.json").write_text(json.dumps({"aesthetic_quality": [0.25, rows]}))
    run("--score_only", "--save_dir", tmp_path, "--vbench_results", tmp_path / "v.json")
    values = load_results(tmp_path).samples[0].values
    assert values["vbench_aesthetic_quality"] == 0.25 and values["vbench_dynamic_degree"] is None
    (tmp_path / "v.json").write_text("{}")
    code, out, _ = run("--score_only", "--save_dir", tmp_path, "--vbench_results", tmp_path / "v.json")
    assert code == 1 and "VBench: " in out  # it costs its own numbers alone, and is not passed over
    assert load_results(tmp_path).samples[0].score is not None


def test_vbench_is_run_on_what_was_made(run, tmp_path):
    """A stand-in for its python: the real one was not run."""
    stub = tmp_path / "python"
    stub.write_text(f"""#!{sys.executable}
import json, os, sys
videos, results, device, *dimensions = sys.argv[3:]
rows = [dict(video_path=os.path.join(videos, name), video_results=0.5) for name in os.listdir(videos)]
json.dump({{d: [0.5, rows] for d in dimensions}}, open(os.path.join(results, "videos_eval_results.json"), "w"))
""")
    stub.chmod(0o755)
    code, out, _ = run("--save_dir", tmp_path / "out", "--vbench_python", stub)
    assert code == 0 and "VBench on 3 videos" in out
    found = load_results(tmp_path / "out")
    assert found.cells[ALL]["vbench_average"].mean == 50 and found.cells[ALL]["vbench_average"].n == 3
    assert found.manifest["vbench"] == f"by {stub}" and "not measured |" not in found.markdown().split("\n\n")[0]
    stub.write_text("#!/bin/sh\necho it broke; exit 3\n")
    code, out, _ = run("--save_dir", tmp_path / "out", "--vbench_python", stub, "--base_seed", "9")
    assert code == 1 and "VBench ended with code 3: it broke" in out
    found = load_results(tmp_path / "out")
    assert found.cells[ALL][SCORE].n == 3 and "vbench_average" not in found.cells[ALL]


@pytest.mark.parametrize("args, words", [
    ([], "--bench_dir is missing"),
    (["--bench_dir", "x", "--prompt", "y"], "--prompt is about one video"),
    (["--bench_dir", "x", "--limit", "0"], "--limit must be at least 1"),
    (["--bench_dir", "x", "--limit", "few"], "--limit"),
    (["--bench_dir", "x", "--split", "double"], "--split"),
    (["--bench_dir", "x", "--score_only"], "needs --save_dir"),
    (["--bench_dir", "x", "--benchdir", "y"], "unknown option --benchdir"),
    (["--bench_dir", "x", "--vbench_python", "a", "--vbench_results", "b"], "give one of them"),
])  # fmt: skip
def test_options_are_checked(args, words):
    with pytest.raises(ConfigError, match=words):
        parse_options(args, "uvcbench.py")


def test_options_of_the_generator_go_through():
    options, config = parse_options(["--bench_dir", "b", "--limit", "2", "--size", "64*64", "sample_steps=3"], "p")
    assert (options.limit, options.split, config.size, config.sample_steps) == (2, "all", "64*64", 3)


def test_a_benchmark_says_its_size_and_options_overrule_it():
    said = with_settings(GenerateConfig(), str(SHARE))
    assert (said.size, said.frame_num) == ("64*64", 17)
    assert with_settings(GenerateConfig(size="32*32"), str(SHARE)) == GenerateConfig(size="32*32", frame_num=17)


@pytest.mark.parametrize("options, words", [
    (("--clip_model", "gone"), "holds no model"),
    (("--vbench_python", "/gone/python"), "cannot be run"),
    (("--vbench_results", "/gone"), "does not exist"),
])  # fmt: skip
def test_tools_that_are_not_there_end_the_run_before_it_begins(run, tmp_path, options, words):
    code, _, err = run("--save_dir", tmp_path / "out", *options)
    assert code == 2 and words in err and not (tmp_path / "out").exists()


def test_what_a_video_took():
    record = {"seconds": {"load": 9, "sample": 2, "decode": 1}, "schedule": {"steps": 4, "guide_scale": 1.0},
              "machine": {"peak_memory": 2**31}}  # fmt: skip
    assert cost(record) == {"seconds": 3, "evaluations": 4, "peak_memory": 2}
    record["schedule"]["guide_scale"] = 5.0
    assert cost(record)["evaluations"] == 8
    assert cost({}) == {"seconds": None, "evaluations": None, "peak_memory": None}


def test_all_18_tasks_of_the_shipped_benchmark_at_reduced_size(run, tmp_path):
    """Smaller and shorter than its truth is, so measured against its files."""
    code, out, _ = run("--save_dir", tmp_path, "--limit", 1, "--frame_num", 5, at=SHARE)
    assert code == 0 and "18 samples of 18 tasks" in out and "18 of 18 samples measured" in out
    cells = load_results(tmp_path).cells
    assert len(cells) == 19 and all(SCORE in row and "things_right" not in row for row in cells.values())
    for task, metric in {"firstframe+flow": "flow_agreement", "reference+scribble": "scribble_agreement",
                         "depth": "depth_edges", "gray": "gray_ssim", "extension": "joint", "r2v": "reference_colour",
                         "outpainting": "seam"}.items():  # fmt: skip
        assert metric in cells[task], task


def test_a_benchmark_of_example_folders(run, bench, tmp_path):
    """VACE-Benchmark's layout."""
    for task, names in {"gray": ("gray",), "outpainting": ("clip", "mask")}.items():
        example = tmp_path / "bench" / "assets" / "examples" / task
        example.mkdir(parents=True)
        (example / "prompt.txt").write_text("a toy\n")
        for name, role in zip(names, ("src_video", "src_mask"), strict=False):
            shutil.copy(bench / f"{name}.mp4", example / f"{role}.mp4")
    code, out, _ = run("--save_dir", tmp_path / "out", at=tmp_path / "bench")
    assert code == 0 and "2 of 2 samples measured" in out
    assert load_results(tmp_path / "out").samples[1].values["kept_psnr"] > 20
    assert (tmp_path / "out" / "gray" / "gray.mp4").exists()


@pytest.mark.parametrize("split", ["single", "composite"])
def test_scripts_pass_on_what_they_are_given(split, tmp_path):
    """With a python that says its arguments in place of the environment's."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    sums = subprocess.run("cat setup.py requirements.txt | cksum", shell=True, cwd=ROOT, capture_output=True, text=True)
    (tmp_path / ".vdot-installed").write_text(f"{sums.stdout.strip()} []\n")
    script = ["bash", str(ROOT / "benchmarks" / f"uvcbench_{split}.sh")]

    def said(*args: str, **environment: str) -> str:
        given = {**os.environ, "VDOT_VENV": str(tmp_path), **environment}
        return subprocess.run([*script, *args], env=given, capture_output=True, text=True, check=True).stdout.strip()

    command = f"{ROOT}/inference/uvcbench.py --split {split}"
    assert said("--limit", "2") == f"python {command} --bench_dir {ROOT}/benchmarks/uvcbench_tiny --limit 2"
    assert (
        said("--bench_dir", "a b", NPROC="4") == f"torchrun --standalone --nproc_per_node=4 {command} --bench_dir a b"
    )


# --- the command as it is typed --------------------------------------------------------------------------------------


def command(*args: object, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(ROOT / "inference" / "uvcbench.py"), *map(str, args)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "VDOT_RANK_PATIENCE": "240"}


@pytest.mark.slow
def test_one_two_and_three_processes_give_the_same_table(bench, tmp_path):
    """Each process makes whole videos; the CPU's numbers do not depend on which."""
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        args = ("--bench_dir", bench, "--ckpt_dir", TINY, *SMALL, "--save_dir", folder)
        ended = subprocess.run(
            command(*args, ranks=ranks), env=ENVIRONMENT, capture_output=True, text=True, timeout=900
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found[ranks] = scores(folder)
        hashes = json.loads((folder / "manifest.json").read_text())["hashes"]
        assert hashes == json.loads((tmp_path / "1" / "manifest.json").read_text())["hashes"]
    assert found[1] == found[2] == found[3]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(bench, tmp_path):
    args = ("--bench_dir", bench, "--ckpt_dir", TINY, *SMALL, "--save_dir")
    whole = subprocess.run(command(*args, tmp_path / "whole"), env=ENVIRONMENT, capture_output=True, timeout=900)
    assert whole.returncode == 0
    killed = subprocess.Popen(command(*args, tmp_path / "cut"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while not (tmp_path / "cut" / "gray" / "00.mp4").exists() and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "scores.json").exists()
    again = subprocess.run(
        command(*args, tmp_path / "cut"), env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert again.returncode == 0 and "0 failed" in again.stdout
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vdot-tiny", "vace-tiny"])
def test_the_shipped_benchmark_by_the_small_models(model, tmp_path):
    """18 tasks, one sample each; the truth itself scores far above what a small model makes."""
    folder = TINY.with_name(model)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    args = (
        "--bench_dir",
        SHARE,
        "--ckpt_dir",
        folder,
        "--limit",
        1,
        "--report_videos",
        1,
        "--save_dir",
        tmp_path / "a",
    )
    ended = subprocess.run(command(*args), env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0 and "18 of 18 samples measured" in ended.stdout, ended.stdout + ended.stderr
    made = subprocess.run(
        [sys.executable, str(SHARE / "make.py"), "--truth", str(tmp_path / "t"), "--samples", "1"], timeout=900
    )
    assert made.returncode == 0
    args = ("--bench_dir", SHARE, "--limit", 1, "--report_videos", 0, "--score_only", "--save_dir", tmp_path / "t")
    assert subprocess.run(command(*args), env=ENVIRONMENT, capture_output=True, timeout=900).returncode == 0
    truth = load_results(tmp_path / "t").cells[ALL][SCORE].mean
    assert truth > 88 and truth > load_results(tmp_path / "a").cells[ALL][SCORE].mean + 3


@pytest.mark.slow
def test_the_shipped_benchmark_is_what_its_script_draws(tmp_path):
    made = subprocess.run(
        [sys.executable, str(SHARE / "make.py"), "--out", str(tmp_path), "--samples", "2"], timeout=900
    )
    assert made.returncode == 0
    drawn, shipped = (read_bench(folder, "all", 2)[0] for folder in (tmp_path, SHARE))
    for one, other in zip(drawn, shipped, strict=True):
        assert (one.key, one.prompt, one.world) == (other.key, other.prompt, other.world)
        for name, paths in one.files.items():
            for mine, theirs in zip(paths, other.files[name], strict=True):
                if mine.suffix == ".png":
                    assert mine.read_bytes() == theirs.read_bytes()
                else:  # another libx264 may compress otherwise
                    a, b = (read_frames(path, range(17)).astype(int) for path in (mine, theirs))
                    assert np.abs(a - b).mean() < 2
