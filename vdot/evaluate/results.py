"""Measured samples -> means with intervals, scores by task, and what they are written as: JSON, CSV, Markdown.

Also the paired difference of two such results. Intervals are 95% bootstrap percentiles over the samples of a task; the
whole is the mean over tasks.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vdot.errors import InputError
from vdot.evaluate.cases import SINGLE, UVC
from vdot.evaluate.measure import Values
from vdot.evaluate.report import ALL, RESAMPLES, Difference, interval, paired
from vdot.evaluate.uvcbench import PAPER, SCALES, SCORED, group_skills, score_of, vbench_average
from vdot.video.output import atomic_path

NOT_MEASURED = "not measured"
FORMULA = (
    "score of a sample = 100 x mean over groups of mean over metrics of clip((v - worst) / (best - worst), 0, 1); "
    "of a task: mean over its samples; of all: mean over tasks. v is a magnitude where 0 is best. Only metrics with "
    "anchors worst and best count; what was not measured counts nowhere. VBench average = 100 x mean of its six "
    "dimensions. How the paper normalised its own average could not be established."
)
SCORE, VBENCH_AVERAGE = "score", "vbench_average"


@dataclass(frozen=True)
class Measured:
    """One sample. ``message`` says why there is no video or no measurement; ``notes`` who made controls again."""

    key: str
    subtask: str
    sample_id: str
    task: str
    prompt: str
    values: Values
    message: str = ""
    notes: Mapping[str, str] | None = None

    @property
    def score(self) -> float | None:
        return score_of(self.values)


@dataclass(frozen=True)
class Mean:
    """Of ``n`` samples, with its interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Results:
    """Means by task (and :data:`ALL`) and metric, also of the score and VBench's average; absent is not measured."""

    cells: dict[str, dict[str, Mean]]
    samples: tuple[Measured, ...]
    manifest: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        return [task for task in self.cells if task != ALL]

    def worst_first(self, task: str) -> list[Measured]:
        """A task's samples, those without a score first."""
        rows = [sample for sample in self.samples if sample.task == task]
        return sorted(rows, key=lambda row: (row.score is not None, row.score or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what was not measured is null."""
        cells = {
            task: {name: asdict(row[name]) if name in row else None for name in (SCORE, VBENCH_AVERAGE, *SCALES)}
            for task, row in self.cells.items()
        }
        samples = [{**asdict(sample), "score": sample.score} for sample in self.samples]
        metrics = {name: asdict(scale) for name, scale in SCALES.items()}
        return {
            "manifest": self.manifest, "formula": FORMULA, "tasks": cells, "samples": samples, "metrics": metrics,
            "paper": PAPER,
        }  # fmt: skip

    def csv(self) -> str:
        """A line for each sample; an empty cell is not measured."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["subtask", "sample_id", "task", "message", SCORE, *SCALES])
        for sample in self.samples:
            numbers = [sample.score, *(sample.values.get(name) for name in SCALES)]
            cells = ["" if value is None else f"{value:.6g}" for value in numbers]
            writer.writerow([sample.subtask, sample.sample_id, sample.task, sample.message, *cells])
        return text.getvalue()

    def markdown(self) -> str:
        """Scores by task, every metric, and the paper's numbers."""
        lines = _score_table(self)
        lines += ["", *_metric_table(self), "", f"_{FORMULA}_", "", *paper_table(self.cells)]
        hashes = self.manifest.get("hashes", {})
        lines += ["", "same benchmark, model and measurement: " + ", ".join(f"{k} `{v}`" for k, v in hashes.items())]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """``scores.json``, ``scores.csv``, ``scores.md``: each whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, content in (("scores.json", text), ("scores.csv", self.csv()), ("scores.md", self.markdown())):
            with atomic_path(folder / name) as temporary:
                Path(temporary).write_text(content, encoding="utf-8")


def tabulate(samples: Sequence[Measured], manifest: dict[str, Any], resamples: int = RESAMPLES) -> Results:
    """``InputError`` without samples. A function of the samples alone, whoever measured them."""
    if not samples:
        raise InputError("there is no sample to tabulate")
    tasks = list(dict.fromkeys(sample.task for sample in samples))
    rng = np.random.default_rng(0)
    cells: dict[str, dict[str, Mean]] = {}
    spreads: dict[str, list[np.ndarray]] = {}
    for task in tasks:
        cells[task] = {}
        rows = [sample for sample in samples if sample.task == task]
        for name, values in _columns(rows).items():
            known = values[np.isfinite(values)]
            picks = rng.integers(max(len(known), 1), size=(resamples, max(len(known), 1)))
            if len(known):
                means = known[picks].mean(1)
                cells[task][name] = Mean(float(known.mean()), *interval(means), len(known))
                spreads.setdefault(name, []).append(means)
    cells[ALL] = {name: _over_tasks(name, cells, found) for name, found in spreads.items()}
    return Results(cells, tuple(samples), manifest)


def _columns(rows: Sequence[Measured]) -> dict[str, np.ndarray]:
    """By metric ``[n]``, nan where not measured; magnitudes where 0 is best."""
    found: dict[str, list[float | None]] = {
        SCORE: [row.score for row in rows],
        VBENCH_AVERAGE: [vbench_average(row.values) for row in rows],
        **{name: [_read(name, row.values.get(name)) for row in rows] for name in SCALES},
    }
    return {name: np.array([np.nan if v is None else v for v in values], np.float64) for name, values in found.items()}


def _read(name: str, value: float | None) -> float | None:
    return abs(value) if value is not None and SCALES[name].better == "zero" else value


def _over_tasks(name: str, cells: Mapping[str, Mapping[str, Mean]], spreads: Sequence[np.ndarray]) -> Mean:
    known = [row[name] for row in cells.values() if name in row]
    low, high = interval(np.mean(spreads, axis=0))
    return Mean(float(np.mean([cell.mean for cell in known])), low, high, sum(cell.n for cell in known))


def task_groups(results: Results, task: str) -> dict[str, float]:
    """Mean skill of each group over a task's samples (over tasks for :data:`ALL`), in percent."""
    if task == ALL:
        parts = [task_groups(results, each) for each in results.tasks]
    else:
        parts = [
            {group: 100 * skill for group, skill in group_skills(sample.values).items()}
            for sample in results.samples
            if sample.task == task
        ]
    known = {group: [part[group] for part in parts if group in part] for group in SCORED}
    return {group: float(np.mean(values)) for group, values in known.items() if values}


# --- in words --------------------------------------------------------------------------------------------------------


def _score_table(results: Results) -> list[str]:
    lines = [
        "| task | score | 95% | " + " | ".join(SCORED) + " | VBench average | samples |",
        "|---|--:|---|" + "--:|" * len(SCORED) + "--:|--:|",
    ]
    for task in [*results.tasks, ALL]:
        row, groups = results.cells[task], task_groups(results, task)
        score = row.get(SCORE)
        shown = f"{NOT_MEASURED} | " if score is None else f"{score.mean:.1f} | {score.low:.1f} to {score.high:.1f}"
        parts = " | ".join(f"{groups[g]:.0f}" if g in groups else "" for g in SCORED)
        vbench = f"{row[VBENCH_AVERAGE].mean:.2f}" if VBENCH_AVERAGE in row else NOT_MEASURED
        asked = sum(sample.task == task or task == ALL for sample in results.samples)
        lines.append(f"| {task} | {shown} | {parts} | {vbench} | {score.n if score else 0} of {asked} |")
    return lines


def _metric_table(results: Results) -> list[str]:
    lines = ["| metric | group | unit | better | mean | 95% | samples |", "|---|---|---|---|--:|---|--:|"]
    for name, scale in SCALES.items():
        cell = results.cells[ALL].get(name)
        shown = f"{NOT_MEASURED} | | 0" if cell is None else f"{cell.mean:.4g} | {_span(cell)} | {cell.n}"
        lines.append(f"| {name} | {scale.group} | {scale.unit} | {scale.better} | {shown} |")
    return lines


def _span(cell: Mean | Difference) -> str:
    return f"{cell.low:.4g} to {cell.high:.4g}"


def paper_table(cells: Mapping[str, Mapping[str, Mean]]) -> list[str]:
    """The paper's numbers: what a holder of the published weights, the published videos and VBench should find."""
    lines = [
        "The paper's normalised averages of VBench on the published UVCBench, and VBench's average here:",
        "",
        "| task | " + " | ".join(PAPER) + " | here |",
        "|---|" + "--:|" * (len(PAPER) + 1),
    ]
    for task in SINGLE:
        mine = cells.get(task, {}).get(VBENCH_AVERAGE)
        told = " | ".join(f"{numbers[task]:.2f}" for numbers in PAPER.values())
        lines.append(f"| {task} | {told} | {NOT_MEASURED if mine is None else f'{mine.mean:.2f}'} |")
    return lines


# --- two results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Mean of a - b by task and metric over the samples that both were measured on."""

    names: tuple[str, str]
    differences: dict[str, dict[str, Difference]]

    def save(self, folder: Path) -> None:
        """``comparison.md`` and ``comparison.json``."""
        gaps = {task: {name: asdict(gap) for name, gap in row.items()} for task, row in self.differences.items()}
        text = json.dumps({"a": self.names[0], "b": self.names[1], "differences": gaps}, indent=1) + "\n"
        for name, content in (("comparison.md", self.markdown()), ("comparison.json", text)):
            with atomic_path(folder / name) as temporary:
                Path(temporary).write_text(content, encoding="utf-8")

    def markdown(self, whole: bool = True) -> str:
        """Every metric of every task; not ``whole``: of all samples, and the score of every task."""
        a, b = self.names
        lines = [
            f"{a} less {b}, over the same samples. An interval without 0: other samples of the kind would "
            "show the difference as well.",
            "",
            "| task | metric | better | difference | 95% | clear | samples |",
            "|---|---|---|--:|---|---|--:|",
        ]
        for task, row in self.differences.items():
            for name, gap in row.items():
                if not whole and task != ALL and name not in (SCORE, VBENCH_AVERAGE):
                    continue
                better = SCALES[name].better if name in SCALES else "higher"
                shown = f"{gap.mean:+.4g} | {_span(gap)} | {_verdict(gap, better)} | {gap.n}"
                lines.append(f"| {task} | {name} | {better} | {shown} |")
        return "\n".join(lines) + "\n"


def _verdict(gap: Difference, better: str) -> str:
    if gap.low <= 0 <= gap.high:
        return ""
    return "better" if (gap.mean > 0) == (better == "higher") else "worse"


def load_results(folder: Path | str) -> Results:
    """Of a folder that :meth:`Results.save` wrote. ``InputError`` if it holds none."""
    path = Path(folder) / "scores.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        samples = [Measured(**{k: v for k, v in row.items() if k != "score"}) for row in values["samples"]]
        return tabulate(samples, values["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results: make them with inference/uvcbench.py ({error})") from error


def compare(a: Results, b: Results, names: tuple[str, str], resamples: int = RESAMPLES) -> Comparison:
    """Paired by sample, by task and over all samples.

    Raises:
        InputError: the two were not measured on the same benchmark in the same way.
    """
    for part in ("benchmark", "measurement"):
        first, second = (results.manifest.get("hashes", {}).get(part) for results in (a, b))
        if first != second:
            raise InputError(
                f"{names[0]} and {names[1]} differ in {part} ({first} and {second}): their difference means nothing; "
                "score both with this version and the same options (--score_only)"
            )
    others = {sample.key: sample for sample in b.samples}
    pairs = [(sample, others[sample.key]) for sample in a.samples if sample.key in others]
    rng = np.random.default_rng(0)
    differences: dict[str, dict[str, Difference]] = {}
    order = [task for task in (*UVC, *a.tasks) if task in a.tasks]
    for task in [ALL, *dict.fromkeys(order)]:
        rows = [pair for pair in pairs if task in (ALL, pair[0].task)]
        first, second = (_columns([pair[side] for pair in rows]) for side in (0, 1))
        found = {name: paired(first[name], second[name], resamples, rng) for name in first}
        differences[task] = {name: gap for name, gap in found.items() if gap is not None}
    return Comparison(names, differences)
