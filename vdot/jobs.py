"""Many generations with one loaded model: isolated from each other, resumable, summed up in a table."""

import csv
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vdot.config import GenerateConfig, merge_config
from vdot.errors import ConfigError, InputError, VdotError, one_line
from vdot.parallel.state import Queue, Ranks
from vdot.record import file_hash
from vdot.request import reference_list
from vdot.runtime import clock, log
from vdot.video.output import bad_name, remove_leftovers

PATHS = ("src_video", "src_mask", "src_ref_images")
LISTS = ("src_ref_images", "image", "video")  # options that may name several files
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
    "chunk_frames",
    "chunk_overlap",
    "chunk_anchor",
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


def read_jobs(
    path: str | Path, base: GenerateConfig, per_row: Sequence[str] = PER_ROW, paths: Sequence[str] = PATHS
) -> list[Job]:
    """Rows of a ``.jsonl`` or ``.csv`` file, one job each; bad rows become jobs with an error.

    A row gives ``id`` (its file name; default its number) and any of the options ``per_row``; files (``paths``)
    are looked up beside the table first, then from the current folder.

    Raises:
        InputError: the file cannot be read, has no rows, or two rows share an id.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise InputError(f"{path} holds no jobs: write one JSON object a line, or a CSV with a header")
    jobs = [_job(row, number, path.parent, base, per_row, paths) for number, row in enumerate(rows, start=1)]
    seen = Counter(job.id.casefold() for job in jobs)  # some file systems do not tell A.mp4 from a.mp4
    double = next((job.id for job in jobs if seen[job.id.casefold()] > 1), None)
    if double is not None:
        raise InputError(f"{path}: the id {double!r} is used more than once; ids name the output files")
    return jobs


def _read_rows(path: Path) -> list[dict[str, Any] | str]:
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise InputError(f"the jobs file {path} must be a .jsonl (one JSON object a line) or a .csv with a header")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return (
            _csv_rows(text) if path.suffix.lower() == ".csv" else [_json_row(x) for x in text.split("\n") if x.strip()]
        )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the jobs file {path}: {getattr(error, 'strerror', None) or error}") from error


def _csv_rows(text: str) -> list[dict[str, Any] | str]:
    """Empty cells say nothing; ``StringIO`` keeps the line breaks inside quoted cells."""
    rows: list[dict[str, Any] | str] = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if None in row:
            rows.append("the row has more cells than the header: quote a cell that holds a comma")
        else:
            rows.append({key.strip(): value for key, value in row.items() if value not in ("", None)})
    return rows


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"the line is not JSON: {getattr(error, 'msg', error)}{where}"
    return row if isinstance(row, dict) else "the line is not a JSON object"


def _job(
    row: dict[str, Any] | str,
    number: int,
    folder: Path,
    base: GenerateConfig,
    per_row: Sequence[str],
    paths: Sequence[str],
) -> Job:
    name = f"{number:04d}"
    if isinstance(row, str):
        return Job(name, None, row)
    values = dict(row)
    given = values.pop("id", None)
    if given is not None:
        problem = bad_name(given, ".mp4")
        if problem:
            return Job(name, None, f"the id {given!r} cannot be a file name: {problem}")
        name = str(given)
    wrong = sorted(set(values) - set(per_row))
    if wrong:
        return Job(name, None, f"unknown or not per-video option {wrong[0]!r}; a row may give: {', '.join(per_row)}")
    for key in paths:
        if values.get(key):
            values[key] = _beside(values[key], key, folder)
    try:
        return Job(name, merge_config(base, values, f"job {name}"))
    except ConfigError as error:
        return Job(name, None, str(error))


def _beside(value: Any, key: str, folder: Path) -> Any:
    """Media paths of a row, those that lie beside the table from there."""
    if isinstance(value, list):
        listed = [str(item) for item in value]
    else:
        listed = [str(p) for p in reference_list(str(value), folder)] if key in LISTS else [str(value)]
    return ",".join(str(folder / path) if os.path.exists(folder / path) else path for path in listed)


def look_at_jobs(jobs: Sequence[Job], look: Callable[[Any], object]) -> int:
    """Say of each job what it would make (``look`` does) or why it would fail; 1 if any would."""
    failed = 0
    for job in jobs:
        log.info("%s", job.id)
        try:
            if job.config is None:
                raise InputError(job.error or "bad row")
            look(job.config)
        except VdotError as error:
            failed += 1
            log.info("  would fail: %s", one_line(error))
    log.info("%d of %d would fail", failed, len(jobs))
    return 1 if failed else 0


def run_jobs(
    jobs: list[Job],
    folder: Path,
    generate: Callable[[GenerateConfig, Path], None],
    fingerprint: Callable[[GenerateConfig], str],
    ranks: Ranks | None = None,
) -> list[Outcome]:
    """Run each job through ``generate(config, video_path)``, which writes ``<id>.mp4`` and then ``<id>/run.json``.

    A job whose video and record are there with the same settings is skipped; anything else is made anew. An error
    ends its own job only; Ctrl-C ends the batch. An id made by a program may be a path below ``folder``. Each group of
    ``ranks`` takes the next job when it is free; the first rank gets all outcomes, in the order of the table, the
    others an empty list.
    """
    ranks = ranks or Ranks()
    if ranks.rank == 0:
        for holder in sorted({(folder / job.id).parent for job in jobs}):
            if holder.is_dir():
                remove_leftovers(holder)
    queue, worked = Queue(ranks, len(jobs)), [0.0]  # seconds of the videos that this group made
    for index in queue:
        job, start = jobs[index], time.perf_counter()
        log.info("job %d of %d: %s%s", index + 1, len(jobs), job.id, _time_left(worked, len(jobs) - index, ranks))
        status, message = _run_one(job, folder, generate, fingerprint, ranks)
        if status == "failed":
            log.error("  failed: %s", message)
        seconds = time.perf_counter() - start
        worked += [seconds] if status == "done" else []
        queue.report(index, asdict(Outcome(job.id, status, seconds, message)))
    return [Outcome(**outcome) for outcome in queue.collect()]


def _time_left(worked: list[float], jobs: int, ranks: Ranks) -> str:
    """What the videos made so far say of those to come, as a remark; the first one loads the model and says little."""
    known = worked[2:] or worked[1:]
    if not known:
        return ""
    groups = max(1, ranks.world // ranks.mesh.sequence.size)
    return f" (about {clock(sum(known) / len(known) * -(-jobs // groups))} to go)"


def _run_one(
    job: Job,
    folder: Path,
    generate: Callable[[GenerateConfig, Path], None],
    fingerprint: Callable[[GenerateConfig], str],
    ranks: Ranks,
) -> tuple[str, str]:
    if job.config is None:
        return "failed", job.error or "bad row"
    video, own = folder / f"{job.id}.mp4", folder / job.id
    # One rank looks at the disk for its group.
    if ranks.share(ranks.leads and is_finished(video, own / "run.json", fingerprint(job.config))):
        return "skipped", "already done with these settings"
    try:
        if ranks.leads and own.is_dir():
            remove_leftovers(own)
        generate(replace(job.config, save_dir=str(own)), video)
    except VdotError as error:
        return "failed", one_line(error)
    except Exception as error:  # a bug of ours: it is shown in full, and the other videos are made all the same
        log.error("  unexpected error", exc_info=True)
        return "failed", f"unexpected {type(error).__name__}: {one_line(error)}"
    return "done", str(video)


def is_finished(video: Path, record: Path, settings: str) -> bool:
    """Whether the record fits the settings and the video is the very one that it speaks of."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return values["settings_hash"] == settings and values["outputs"][video.name] == file_hash(video)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def summary(outcomes: list[Outcome]) -> list[str]:
    """The closing table and one line of totals."""
    width = max(len("id"), *(len(o.id) for o in outcomes))
    lines = [f"{'id':<{width}}  {'status':<8} {'seconds':>8}  message"]
    lines += [f"{o.id:<{width}}  {o.status:<8} {o.seconds:>8.1f}  {o.message}" for o in outcomes]
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    return [*lines, ", ".join(f"{n} {status}" for status, n in counts.items())]
