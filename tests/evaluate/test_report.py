"""The table: complete, deterministic, ordered as quality is, and honest about what was not measured."""

import json

import numpy as np
import pytest

from tests.evaluate.conftest import worn
from vdot.data.sprites import TASKS, draw_task, split_of
from vdot.errors import InputError
from vdot.evaluate import (
    METRICS,
    Measurer,
    benchmark_prompts,
    benchmark_tasks,
    compare,
    compare_scores,
    evaluate,
    reference_points,
)
from vdot.evaluate.benchmark import COUNT
from vdot.evaluate.report import ALL, Row, Table, tabulate

FEW = ("gray", "inpainting", "r2v")


@pytest.fixture(scope="module")
def tasks() -> list:
    return list(benchmark_tasks(6, FEW, frames=9))


@pytest.fixture(scope="module")
def points(tasks) -> dict:
    return reference_points(tasks)


@pytest.fixture(scope="module")
def truth(tasks, points) -> Table:
    return evaluate([(task, task.video) for task in tasks], points=points, resamples=200)


@pytest.fixture(scope="module")
def damaged(tasks, points) -> Table:
    made = [(task, worn(task.video, 1.2, 6, i)) for i, task in enumerate(tasks)]
    return evaluate(made, points=points, resamples=200)


def test_the_truth_gets_the_whole_score(truth):
    assert truth.scores[ALL][0] > 99
    for task in FEW:
        assert truth.scores[task][0] == pytest.approx(100, abs=0.1)
    cells = truth.cells[ALL]
    assert cells["gray_error"].mean == 0 and cells["kept_psnr"].mean == 60 and cells["seam"].mean == 0
    assert cells["gray_error"].n == 2 and cells["present"].n == 6
    assert "scribble_f1" not in cells  # no such task: not measured


def test_damage_costs_and_says_where(truth, damaged):
    score, low, high = damaged.scores[ALL]
    assert low <= score <= high < 95
    worse = compare(damaged, truth, resamples=200)
    assert worse["kept_psnr"].high < 0 < worse["gray_error"].low
    assert worse["sharpness"].low > 0  # of magnitudes: further from 0
    assert worse["kept_psnr"].n == 2
    same = compare(truth, truth)["flicker"]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_what_deserves_nothing_gets_nothing(tasks, points):
    """A grey still, for every task."""
    made = [(task, np.full_like(task.video, 127)) for task in tasks if task.task == "r2v"]
    table = evaluate(made, points=points, resamples=50)
    assert table.scores[ALL][0] < 50  # it neither flickers nor drifts
    cells = table.cells[ALL]
    assert cells["things_right"].mean == cells["things_right"].skill == 0
    assert "shape_overlap" not in cells  # nothing was found: nothing to measure
    assert cells["sharpness"].skill == 0


def test_tables_are_written_and_deterministic(truth, tasks, tmp_path):
    again = evaluate([(task, task.video) for task in tasks[:4:3]], resamples=50)
    assert again.rows == (truth.rows[0], truth.rows[3])  # the two grey ones
    assert tabulate(truth.rows, resamples=200).to_dict() == truth.to_dict()
    truth.save(tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scores"][ALL]["score"] == truth.scores[ALL][0]
    assert saved["clips"][0]["values"]["scribble_f1"] is None
    assert set(saved["metrics"]) == set(METRICS)
    text = truth.markdown()
    assert "| scribble_f1 | 0..1 | higher | not measured |" in text
    assert all(f"| {task} |" in text for task in (*FEW, ALL))


def test_reference_points_are_of_the_tasks_and_survive_json(tasks, points):
    with pytest.raises(InputError, match="reference points"):
        evaluate([(tasks[0], tasks[0].video)], points={})
    assert json.loads(json.dumps(points)) == points
    assert len(points) == len(tasks)
    alone = reference_points(tasks[:1])
    (only,) = alone.values()
    assert only["floor"]["present"] is None and only["floor"]["flicker"] is not None  # there is no other clip


def row(task: str, value: float | None, ceiling: float = 1.0, floor: float = 0.0) -> Row:
    return Row(task, "p", {"present": value}, {"present": ceiling}, {"present": floor})


def test_the_score_is_its_formula():
    rows = [row("a", 0.6), row("a", 0.2), row("b", 1.0, floor=0.5), row("b", None)]
    table = tabulate(rows, resamples=500)
    assert table.cells["a"]["present"].skill == pytest.approx(0.4)
    assert table.cells["b"]["present"].skill == pytest.approx(1.0)
    assert table.cells["b"]["present"].n == 1
    assert table.scores["a"][0] == pytest.approx(40) and table.scores[ALL][0] == pytest.approx(70)
    assert table.scores["a"][1:] == pytest.approx((20, 60))  # of two clips, one may be drawn twice
    flat = tabulate([row("a", 0.6, 0.5, 0.5)])
    assert flat.cells["a"]["present"].skill is None  # the metric tells nothing here
    with pytest.raises(InputError, match="no clip"):
        tabulate([])


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        table = tabulate([row("a", float(v)) for v in rng.normal(0.5, 0.1, 40)], resamples=200, seed=trial)
        cell = table.cells["a"]["present"]
        covered += cell.low <= 0.5 <= cell.high
    assert 0.88 <= covered / 200 <= 0.99


def test_tables_of_other_clips_are_not_compared(truth):
    other = tabulate([row("a", 1.0)], resamples=200)
    with pytest.raises(InputError, match="not of the same clips"):
        compare(truth, other)
    with pytest.raises(InputError, match="not of the same clips"):
        compare_scores([truth], [other])
    with pytest.raises(InputError, match="run by run"):
        compare_scores([truth], [truth, truth])


def test_scores_are_compared_on_the_same_clips():
    """Clips differ by far more than the models do; the gap of a clip is 0.02 with deviation 0.01, two tasks of 40."""
    rng = np.random.default_rng(0)
    easy, gaps = rng.uniform(0.2, 0.8, 80), rng.normal(0.02, 0.01, 80)
    tables = [tabulate([row("ab"[i % 2], float(v)) for i, v in enumerate(z)]) for z in (easy + gaps, easy)]
    found = compare_scores(tables[:1], tables[1:])
    assert found.mean == pytest.approx(100 * gaps.mean())
    # The bootstrap's width is 2 x 1.96 standard errors, within a fifth.
    error = 100 * np.sqrt(np.mean([gaps[i::2].var() / 40 for i in range(2)]) / 2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert tables[0].scores[ALL][2] - tables[0].scores[ALL][1] > 10 * (found.high - found.low)
    # Runs that disagree widen it, however sure the clips are.
    lower = tabulate([row("ab"[i % 2], float(v)) for i, v in enumerate(easy - 0.1)])
    both = compare_scores([tables[0], lower], [tables[1], tables[1]])
    assert both.n == 2 and both.low < -9 < 1 < both.high


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_measured(task):
    """With what belongs to it, and nothing else."""
    clip = draw_task(7, task, "test", frames=5)
    values = Measurer(clip)(clip.video)
    assert set(values) == set(METRICS)
    known = {METRICS[name].group for name, value in values.items() if value is not None}
    assert {"content", "motion", "picture"} <= known
    assert ("control" in known) == bool(clip.control)
    assert ("kept" in known) == (clip.src_mask is not None)
    assert ("identity" in known) == bool(clip.references)
    assert ("place" in known) == (clip.src_video is not None)
    assert all(value is None or np.isfinite(value) for value in values.values())


def test_the_benchmark_is_held_out_and_always_the_same():
    first, second = (list(benchmark_tasks(6)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.task == b.task and a.prompt == b.prompt and np.array_equal(a.video, b.video)
        assert all(split_of(*key) == "test" for key in a.scene.keys)
    with pytest.raises(InputError, match="unknown tasks"):
        next(benchmark_tasks(3, ["nonsense"]))


def test_there_are_five_hundred_prompts_to_ask():
    assert COUNT >= 500
    prompts = benchmark_prompts(100, ("t2v",))
    assert len(set(prompts)) == 100
