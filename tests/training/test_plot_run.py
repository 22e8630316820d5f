"""The figure of a run: panels for what is there, numbers of the lines, errors in a sentence."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from vdot.errors import InputError

pytest.importorskip("matplotlib")
SCRIPT = ROOT / "scripts" / "plot_run.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_run"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def write(folder: Path, steps: int = 60, seed: int = 0) -> Path:
    """A run as the loop logs it: the generator in every fifth step, transport in every tenth, one bad step."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        line = {"loss_fake": 1 / step, "norm_critic": None if step == 7 else 1 + rng.random(), "bad_steps": step >= 7}
        line |= {"time_backward": 1.0, "time_other": 0.5, "tokens_per_second": 1e4, "lr_critic": 1e-5}
        if step % 5 == 1:
            line |= {"norm_generator": 2.0, "time_scores": 0.25, "logit_gap": rng.standard_normal()}
        if step % 10 == 1:
            line |= {"ot_marginal_error": 1e-3 * (1 + rng.random()), "cosine_dmd_ot": 0.5}
        lines.append(json.dumps({"step": step, "time": 0.0} | line))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "loss_fa']))
    return folder


def test_a_figure_of_one_run_and_of_several(plot, tmp_path, capsys):
    one, two = write(tmp_path / "a" / "run"), write(tmp_path / "b" / "run", 30, seed=1)
    assert plot.main([str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "metrics.png")
    assert (one / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    both = tmp_path / "new" / "both.pdf"
    assert plot.main([str(one), str(two / "metrics.jsonl"), "-o", str(both), "--smooth", "3"]) == 0
    assert both.read_bytes()[:4] == b"%PDF"
    assert sorted(path.name for path in tmp_path.rglob("*.tmp")) == []


def test_panels_for_what_is_there_and_names_that_tell_apart(plot, tmp_path):
    runs = [plot.read_run(write(tmp_path / name / "run"), (1, 60)) for name in "ab"]
    runs = plot.distinct(runs)
    assert [run.name for run in runs] == ["run", "run (2)"]
    figure = plot.figure(runs[:1], [], None, None)
    shown = [ax.get_title("left") for ax in figure.axes if ax.get_visible()]
    assert shown == [
        "Losses",
        "Agreement of the terms",
        "Gradient norms",
        "Transport: marginal error",
        "Discriminator logits",
        "Learning rate",
        "Where the time goes",
        "Throughput",
    ]
    norms = next(ax for ax in figure.axes if ax.get_title("left") == "Gradient norms")
    assert norms.get_yscale() == "log"
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["critic", "generator"]
    losses = next(ax for ax in figure.axes if ax.get_title("left") == "Losses")
    (bad,) = [line for line in losses.lines if line.get_marker() == "|"]
    assert list(bad.get_xdata()) == [7]
    assert len(plot.figure(runs, ["time", "lr"], None, "title").axes) == 2


def test_numbers_are_those_of_the_lines(plot, tmp_path):
    run = plot.read_run(write(tmp_path / "run"), (3, 20))
    steps, values = run.series["loss_fake"]
    assert list(steps) == list(range(3, 21)) and values[0] == 1 / 3
    assert np.isnan(run.series["norm_critic"][1][4]) and list(run.series["ot_marginal_error"][0]) == [11]
    steps, (backward, scores) = plot.aligned(run, ["time_backward", "time_scores"])
    assert backward.sum() == 18 and list(steps[scores > 0]) == [6, 11, 16]


def test_smoothing(plot):
    x = np.array([1.0, 2, np.nan, 4, 5])
    np.testing.assert_allclose(plot.smooth(x, 3, False), [1.5, 1.5, 3, 4.5, 4.5])
    np.testing.assert_allclose(plot.smooth(np.array([1.0, 100, -1]), 3, True), [10, 10, 100])
    np.testing.assert_allclose(plot.smooth(np.array([1.0, 2, 3]), 99, False), [1.5, 2, 2.5])
    assert [plot.window_for(n, None) for n in (5, 100, 4000)] == [1, 3, 101] and plot.window_for(5, 2) == 2


@pytest.mark.parametrize(
    "case,message", [("nothing", "does not exist"), ("empty", "has no metrics yet"), ("other", "which logged: speed")]
)
def test_errors_say_what_is_missing(plot, tmp_path, capsys, case, message):
    if case != "nothing":
        tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1, "speed": 2}\n' if case == "other" else "")
    assert plot.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_formats_steps_and_help(plot, tmp_path, capsys):
    with pytest.raises(InputError, match="neither"):
        plot.write(None, tmp_path / "a.txt")
    assert plot.steps_span("5:") == (5, float("inf")) and plot.steps_span(":7")[1] == 7
    for arguments in (["run", "--steps", "a:b"], ["run", "--smooth", "0"], ["run", "--only", "colour"]):
        with pytest.raises(SystemExit):
            plot.parse(arguments)
    assert [plot.short(v) for v in (0.25, 65000, 1.2e6, 2e-06)] == ["0.25", "65k", "1.2M", "2e-06"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        plot.parse(["--help"])
    assert "panels, each drawn if the run has its numbers" in capsys.readouterr().out


def test_runs_as_a_script(tmp_path):
    result = subprocess.run([sys.executable, SCRIPT, tmp_path / "gone"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and "Traceback" not in result.stderr
