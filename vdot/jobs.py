"""Many generations with one loaded model: isolated from each other, resumable, summed up in a table."""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdot.config import GenerateConfig, merge_config
from vdot.errors import ConfigError, InputError, VdotError
from vdot.runtime import log

PATHS = ("src_video", "src_mask", "src_ref_images")
# One model is loaded for all rows, so what belongs to the model cannot differ between them.
PER_ROW = (
    *PATHS,
    "prompt",
    "negative_prompt",
    "size",
    "frame_num",
    "frame_mode",
    "fps",
    "keep_source",
    "feather",
    "sample_steps",
    "sample_shift",
    "sample_solver",
    "sample_guide_scale",
    "context_scale",
    "base_seed",
)


@dataclass(frozen=True)
class Job:
    """A row of the table: ``config`` is the command line's with the row's values, or ``error`` says why it is bad."""

    id: str
    config: GenerateConfig | None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    id: str
    status: str  # done, skipped or failed
    seconds: float
    message: str


def read_jobs(path: str | Path, base: GenerateConfig) -> list[Job]:
    """Rows of a ``.jsonl`` or ``.csv`` file, one job each; bad rows become jobs with an error.

    A row gives ``id`` (its file name; default its number) and any of the per-video options of the command line.
    Media paths are looked up beside the table first, then from the current folder.

    Raises:
        InputError: the file cannot be read, has no rows, or two rows share an id.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise InputError(f"{path} holds no jobs: write one JSON object a line, or a CSV with a header")
    jobs = [_job(row, number, path.parent, base) for number, row in enumerate(rows, start=1)]
    ids = [job.id for job in jobs]
    double = sorted({i for i in ids if ids.count(i) > 1})
    if double:
        raise InputError(f"{path}: the id {double[0]!r} is used more than once; ids name the output files")
    return jobs


def _read_rows(path: Path) -> list[dict[str, Any] | str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the jobs file {path}: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix.lower() == ".csv":
        table = csv.DictReader(text.splitlines())
        return [{k: v for k, v in row.items() if k and v not in ("", None)} for row in table]
    rows: list[dict[str, Any] | str] = []
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
            rows.append(row if isinstance(row, dict) else "the line is not a JSON object")
        except json.JSONDecodeError as error:
            rows.append(f"the line is not JSON: {error.msg} at column {error.colno}")
    return rows


def _job(row: dict[str, Any] | str, number: int, folder: Path, base: GenerateConfig) -> Job:
    name = f"{number:04d}"
    if isinstance(row, str):
        return Job(name, None, row)
    values = dict(row)
    name = str(values.pop("id", name))
    if not name or name.startswith(".") or any(c in name for c in '/\\:\0*?"<>|'):
        return Job(f"{number:04d}", None, f"the id {name!r} cannot be a file name")
    wrong = sorted(set(values) - set(PER_ROW))
    if wrong:
        return Job(name, None, f"unknown or not per-video option {wrong[0]!r}; a row may give: {', '.join(PER_ROW)}")
    for key in PATHS:
        if key in values:
            listed = values[key] if isinstance(values[key], list) else str(values[key]).split(",")
            values[key] = ",".join(_resolve(str(item).strip(), folder) for item in listed)
    try:
        return Job(name, merge_config(base, values, f"job {name}"))
    except ConfigError as error:
        return Job(name, None, str(error))


def _resolve(path: str, folder: Path) -> str:
    beside = folder / path
    return str(beside) if beside.exists() else path


def run_jobs(
    jobs: list[Job],
    folder: Path,
    generate: Callable[[GenerateConfig, Path], None],
    fingerprint: Callable[[GenerateConfig], str],
) -> list[Outcome]:
    """Run each job through ``generate(config, video_path)``, which writes ``<id>.mp4`` and then ``<id>/run.json``.

    A job whose video and record are there with the same settings is skipped; anything else is made anew. An error
    ends its own job only; Ctrl-C ends the batch.
    """
    outcomes = []
    for number, job in enumerate(jobs, start=1):
        log.info("job %d of %d: %s", number, len(jobs), job.id)
        start = time.perf_counter()
        status, message = _run_one(job, folder, generate, fingerprint)
        if status == "failed":
            log.error("  failed: %s", message)
        outcomes.append(Outcome(job.id, status, time.perf_counter() - start, message))
    return outcomes


def _run_one(
    job: Job,
    folder: Path,
    generate: Callable[[GenerateConfig, Path], None],
    fingerprint: Callable[[GenerateConfig], str],
) -> tuple[str, str]:
    if job.config is None:
        return "failed", job.error or "bad row"
    video = folder / f"{job.id}.mp4"
    if is_finished(video, folder / job.id / "run.json", fingerprint(job.config)):
        return "skipped", "already done with these settings"
    try:
        generate(replace(job.config, save_dir=str(folder / job.id)), video)
    except VdotError as error:
        return "failed", str(error)
    return "done", str(video)


def is_finished(video: Path, record: Path, settings: str) -> bool:
    """The record is written last, so a video with a fitting record is whole."""
    try:
        return video.is_file() and json.loads(record.read_text(encoding="utf-8")).get("settings_hash") == settings
    except (OSError, ValueError):
        return False


def summary(outcomes: list[Outcome]) -> list[str]:
    """The closing table and one line of totals."""
    width = max(len("id"), *(len(o.id) for o in outcomes))
    lines = [f"{'id':<{width}}  {'status':<8} {'seconds':>8}  message"]
    lines += [f"{o.id:<{width}}  {o.status:<8} {o.seconds:>8.1f}  {o.message}" for o in outcomes]
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    return [*lines, ", ".join(f"{n} {status}" for status, n in counts.items())]
