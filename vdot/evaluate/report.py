"""Many clips -> a table: means per task and metric with intervals, a normalised score, JSON and Markdown.

The score. Of task k and metric m, with v the mean of what was generated, c of the truth and f of what deserves nothing
(see :class:`vdot.evaluate.measure.Metric`): ``s = clip((v - f) / (c - f), 0, 1)``; where 0 is best, v is the mean of
the magnitudes and c = 0. The score of a task is the mean over its groups of the mean over their metrics; the score of
a table is the mean over tasks, times 100. A metric whose c and f do not differ clearly in a task is left out there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vdot.data.sprites.tasks import TaskClip
from vdot.errors import InputError
from vdot.evaluate.measure import GROUPS, METRICS, Measurer, Values
from vdot.video.output import atomic_path

RESAMPLES = 1000
LEVEL = 0.95
CLEAR = 0.05  # of the larger of |c| and |f|: what they must differ by for a metric to tell anything
ALL = "all"


@dataclass(frozen=True)
class Row:
    """One clip: what it got, what the truth gets, and what deserves nothing gets."""

    task: str
    prompt: str
    values: Values
    ceiling: Values
    floor: Values


@dataclass(frozen=True)
class Cell:
    """Mean of ``n`` clips and its bootstrap interval; ``skill`` is s above, ``None`` where it does not apply."""

    mean: float
    low: float
    high: float
    n: int
    ceiling: float | None
    floor: float | None
    skill: float | None


@dataclass(frozen=True)
class Table:
    """Cells by task (and :data:`ALL`) and metric; a metric that was measured on no clip is absent: not measured."""

    cells: dict[str, dict[str, Cell]]
    scores: dict[str, tuple[float, float, float]]  # by task and ALL: score, low, high
    rows: tuple[Row, ...]
    distances: dict[str, float] = field(default_factory=dict)  # of the whole set, such as those of distribution.py
    # The score of ALL in every resample; the same clips are drawn for every table of the same tasks.
    spread: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not measured is null."""
        cells = {task: {name: vars(cell) for name, cell in row.items()} for task, row in self.cells.items()}
        about = {name: vars(metric) for name, metric in METRICS.items()}
        scores = {task: dict(zip(("score", "low", "high"), s, strict=True)) for task, s in self.scores.items()}
        rows = [vars(row) for row in self.rows]
        return {"scores": scores, "distances": self.distances, "cells": cells, "clips": rows, "metrics": about}

    def save(self, path: Path | str) -> None:
        """As JSON, whole or not at all; ``OutputError`` if the disk refuses."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_path(path) as temporary:
            Path(temporary).write_text(text + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """Metrics of all clips with floor and ceiling, then the score of every task."""
        lines = [
            "| metric | unit | better | mean | 95% | truth | nothing | clips |",
            "|---|---|---|--:|---|--:|--:|--:|",
        ]
        for name, metric in METRICS.items():
            cell = self.cells[ALL].get(name)
            shown = "not measured | | | | 0" if cell is None else _cell_text(cell)
            lines.append(f"| {name} | {metric.unit} | {metric.better} | {shown} |")
        lines += ["", "| task | score | 95% | " + " | ".join(GROUPS) + " |", "|---|--:|---|" + "--:|" * len(GROUPS)]
        by_task = {
            task: _group_means({name: cell.skill for name, cell in self.cells[task].items()})
            for task in self.scores
            if task != ALL
        }
        for task, (score, low, high) in self.scores.items():
            groups = by_task.get(task) or _over_tasks(list(by_task.values()))
            shown = " | ".join(f"{100 * groups[g]:.1f}" if g in groups else "" for g in GROUPS)
            lines.append(f"| {task} | {score:.1f} | {low:.1f} to {high:.1f} | {shown} |")
        lines += [f"\n{name}: {value:.4g}" for name, value in self.distances.items()]
        return "\n".join(lines) + "\n"


def _cell_text(cell: Cell) -> str:
    marks = (f"{value:.3g}" if value is not None else "" for value in (cell.ceiling, cell.floor))
    return f"{cell.mean:.3g} | {cell.low:.3g} to {cell.high:.3g} | {' | '.join(marks)} | {cell.n}"


Points = dict[str, dict[str, Values]]  # by task clip: its "ceiling" and its "floor"; JSON-able, the same for all models
Progress = Callable[[int], None]


def key_of(task: TaskClip) -> str:
    """Of a task clip: its scene, its task and its words, hashed."""
    text = json.dumps([task.task, task.prompt, task.scene.to_dict()], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference_points(tasks: Iterable[TaskClip], progress: Progress | None = None) -> Points:
    """What the truth of each task gets, and what deserves nothing: worth keeping, it takes longer than one model.

    The other clip that a floor may need is the task's next, and the first for the last; with one clip of a task there
    is none, and metrics that need it have no skill.
    """
    known = {key_of(task): task for task in tasks}
    clips = list(known.items())
    points: Points = {}
    for index, (key, task) in enumerate(clips):
        later = [other for _, other in clips[index + 1 :] + clips[:index]]
        fits = (o.video for o in later if o.task == task.task and o.video.shape == task.video.shape)
        measurer = Measurer(task)
        points[key] = {"ceiling": measurer.ceiling(), "floor": measurer.floor(next(fits, None))}
        if progress is not None:
            progress(index + 1)
    return points


def measure_clips(
    clips: Iterable[tuple[TaskClip, np.ndarray]], points: Points, progress: Progress | None = None
) -> list[Row]:
    """``InputError`` when a video does not have its task's shape, or ``points`` were made of other tasks."""
    rows = []
    for index, (task, frames) in enumerate(clips):
        known = points.get(key_of(task))
        if known is None:
            raise InputError(f"the reference points hold no {task.task} clip {task.prompt!r}: make them of these tasks")
        rows.append(Row(task.task, task.prompt, Measurer(task)(frames), known["ceiling"], known["floor"]))
        if progress is not None:
            progress(index + 1)
    return rows


def evaluate(
    clips: Iterable[tuple[TaskClip, np.ndarray]],
    *,
    points: Points | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    distances: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Table:
    """Tasks with what was generated for them, uint8 ``[T, H, W, 3]`` -> the table.

    ``points`` are the :func:`reference_points` of the tasks, made anew when not given. Intervals are bootstrap
    percentiles over clips, within each task: they hold for other clips of the same kind, and several seeds of one
    prompt count as so many clips.
    """
    pairs = list(clips)
    known = reference_points(task for task, _ in pairs) if points is None else points
    return tabulate(measure_clips(pairs, known, progress), resamples=resamples, seed=seed, distances=distances)


def tabulate(
    rows: Sequence[Row],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    distances: Mapping[str, float] | None = None,
) -> Table:
    """The table of measured clips."""
    if not rows:
        raise InputError("there is no clip to evaluate")
    tasks = list(dict.fromkeys(row.task for row in rows))
    rng = np.random.default_rng(seed)
    cells, scores, samples = {}, {}, []
    for task in tasks:
        cells[task], scores[task], spread = _task_table([row for row in rows if row.task == task], resamples, rng)
        samples.append(spread)
    cells[ALL], _, _ = _task_table(rows, resamples, rng)
    known = [(scores[task][0], spread) for task, spread in zip(tasks, samples, strict=True)]
    total = np.mean([spread for _, spread in known], axis=0)
    scores[ALL] = (float(np.mean([score for score, _ in known])), *interval(total))
    return Table(cells, scores, tuple(rows), dict(distances or {}), total)


def _task_table(
    rows: Sequence[Row], resamples: int, rng: np.random.Generator
) -> tuple[dict[str, Cell], tuple[float, float, float], np.ndarray]:
    """Cells, score, and the score of every resample ``[resamples]``."""
    picks = rng.integers(len(rows), size=(resamples, len(rows)))
    cells: dict[str, Cell] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for name, metric in METRICS.items():
        values, ceiling, floor = (_column(rows, name, part) for part in ("values", "ceiling", "floor"))
        if np.isnan(values).all():
            continue
        magnitude = np.abs(values) if metric.better == "zero" else values
        best = np.zeros(len(rows)) if metric.better == "zero" else ceiling
        means, own = _means(values[picks]), _means(magnitude[picks])
        high, low = _means(best[None])[0], _means(floor[None])[0]
        gap = high - low
        clear = abs(gap) > CLEAR * max(abs(high), abs(low)) if np.isfinite(gap) else False
        skill = float(np.clip((_means(magnitude[None])[0] - low) / gap, 0, 1)) if clear else None
        if clear:
            groups.setdefault(metric.group, []).append(np.clip((own - low) / gap, 0, 1))
        cells[name] = Cell(
            float(np.nanmean(values)), *interval(means), int(np.isfinite(values).sum()),
            None if np.isnan(high) else float(high), None if np.isnan(low) else float(low), skill,
        )  # fmt: skip
    score = _score({name: cell.skill for name, cell in cells.items()})
    parts = [_means(np.stack(group, -1)) for group in groups.values()]
    spread = 100 * _means(np.stack(parts, -1)) if parts else np.full(resamples, np.nan)
    return cells, (score, *interval(spread)), spread


def _column(rows: Sequence[Row], name: str, part: str) -> np.ndarray:
    known = (getattr(row, part).get(name) for row in rows)
    return np.array([np.nan if value is None else value for value in known], np.float64)


def _means(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what was measured; nan where nothing was."""
    known = np.isfinite(values)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Percentiles of the resamples in which something was measured."""
    tail = 50 * (1 - LEVEL)
    known = samples[np.isfinite(samples)]
    low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _group_means(skills: Mapping[str, float | None]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for name, skill in skills.items():
        if skill is not None:
            groups.setdefault(METRICS[name].group, []).append(skill)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def _over_tasks(tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each group over the tasks that have it."""
    known = {group: [task[group] for task in tasks if group in task] for group in GROUPS}
    return {group: float(np.mean(values)) for group, values in known.items() if values}


def _score(skills: Mapping[str, float | None]) -> float:
    groups = _group_means(skills)
    return 100 * float(np.mean(list(groups.values()))) if groups else float("nan")


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over the clips that both were measured on, with its interval."""

    mean: float
    low: float
    high: float
    n: int


def paired(first: np.ndarray, second: np.ndarray, resamples: int, rng: np.random.Generator) -> Difference | None:
    """Of ``first - second [n]``, nan where not measured; ``None`` if no pair was."""
    gaps = (first - second)[np.isfinite(first - second)]
    if not len(gaps):
        return None
    means = gaps[rng.integers(len(gaps), size=(resamples, len(gaps)))].mean(1)
    return Difference(float(gaps.mean()), *interval(means), len(gaps))


def compare(a: Table, b: Table, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Difference]:
    """Paired differences by metric, of the magnitudes where 0 is best; ``InputError`` unless the clips are the same."""
    _same_clips(a, b)
    rng = np.random.default_rng(seed)
    out = {}
    for name, metric in METRICS.items():
        first, second = (_column(table.rows, name, "values") for table in (a, b))
        if metric.better == "zero":
            first, second = np.abs(first), np.abs(second)
        found = paired(first, second, resamples, rng)
        if found is not None:
            out[name] = found
    return out


def compare_scores(a: Sequence[Table], b: Sequence[Table], seed: int = 0) -> Difference:
    """Score of a less that of b, run by run (a_k and b_k of one seed); n is the number of runs.

    Every resample draws the same clips for both, and of several runs the same runs: the interval holds for other clips
    of the same kind and, as far as so few tell, for other seeds. ``InputError`` unless the clips are the same.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"scores are compared run by run: got {len(a)} and {len(b)} runs")
    for first, second in zip(a, b, strict=True):
        _same_clips(first, second)
    gaps = [x.scores[ALL][0] - y.scores[ALL][0] for x, y in zip(a, b, strict=True)]
    spread = np.stack([x.spread - y.spread for x, y in zip(a, b, strict=True)])  # [runs, resamples]
    runs, resamples = spread.shape
    picks = np.random.default_rng(seed).integers(runs, size=(runs, resamples))
    return Difference(float(np.mean(gaps)), *interval(np.take_along_axis(spread, picks, 0).mean(0)), runs)


def _same_clips(a: Table, b: Table) -> None:
    if [(row.task, row.prompt) for row in a.rows] != [(row.task, row.prompt) for row in b.rows]:
        raise InputError("the tables are not of the same clips in the same order: their difference means nothing")
