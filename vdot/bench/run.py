"""The command line of ``inference/uvcbench.py``: validate, generate, measure, report, compare."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vdot.bench.manifest import manifest, measurement
from vdot.bench.scoring import Scorer, score_all
from vdot.checkpoints import inspect_checkpoint
from vdot.cli import Parser, Session, check_model_name, check_options, find_checkpoint, open_session, parse
from vdot.config import GenerateConfig
from vdot.entry import enter
from vdot.errors import ConfigError, InputError, OutputError, VdotError, one_line
from vdot.evaluate.cases import SPLITS, Problem, Sample, Split, read_bench, read_settings
from vdot.evaluate.networks import ClipText, DinoIdentity, weight_files
from vdot.evaluate.page import preview, render
from vdot.evaluate.report import ALL
from vdot.evaluate.results import SCORE, Measured, Results, compare, load_results, tabulate
from vdot.evaluate.vbench import check_python, read_vbench, run_vbench
from vdot.jobs import Job, Outcome
from vdot.parallel.launch import Launch, own_device
from vdot.parallel.state import Queue, Ranks
from vdot.record import file_hash, writable
from vdot.runtime import log, pick_device
from vdot.video import probe
from vdot.video.output import atomic_path

HELP = {
    "bench_dir": "the benchmark: a folder with an index (*.jsonl, indices/*.txt) or with assets/examples/<task>/",
    "split": "single (one condition), composite (first frame or reference with a control), or all",
    "limit": "at most so many samples of each task",
    "score_only": "generate nothing: measure the videos <save_dir>/<subtask>/<sample_id>.mp4, whoever made them",
    "skip_bad_rows": "go on without the rows that cannot be used; they are listed all the same",
    "compare": "two results' folders: paired differences with bootstrap intervals, nothing else",
    "vbench_python": "python of an environment that VBench is installed in: its six dimensions are measured by it",
    "vbench_results": "a VBench's *_eval_results.json, or a folder of them, in place of that",
    "clip_model": "folder of a CLIP (transformers' layout): how well frames fit the prompt",
    "dino_model": "folder of a DINO (transformers' layout): how alike frames and references are",
    "report_videos": "samples of each task, worst first, whose videos go into report.html",
}
EXAMPLES = """examples:
  the benchmark of this repository, three samples a task, by the small model
    %(prog)s --bench_dir benchmarks/uvcbench_tiny --limit 3
  the published one, by the published weights, on eight GPUs
    torchrun --nproc_per_node=8 inference/uvcbench.py --split all --bench_dir UVCBench --ckpt_dir models/VDOT \\
        --size 480p --save_dir results/uvcbench/VDOT --vbench_python ~/envs/vbench/bin/python
  two results
    %(prog)s --compare results/uvcbench/VDOT results/uvcbench/VACE

All options of vace_wan_inference.py that are not about one video work as well: --ckpt_dir, --save_dir, --size,
--sample_steps, --offload_model, --ulysses_size, --dry_run, key=value, ... (see its --help)."""
FAILED = "not measured: "
OF_ONE_VIDEO = ("prompt", "src_video", "src_mask", "src_ref_images", "save_file", "jobs")


@dataclass(frozen=True)
class Options:
    """What the benchmark adds to the generator's options."""

    bench_dir: str | None
    split: Split
    limit: int | None
    score_only: bool
    skip_bad_rows: bool
    compare: tuple[str, str] | None
    vbench_python: str | None
    vbench_results: str | None
    clip_model: str | None
    dino_model: str | None
    report_videos: int


def parse_options(argv: Sequence[str], prog: str) -> tuple[Options, GenerateConfig]:
    """``ConfigError`` for anything not understood, or that only makes sense for one video."""
    parser = Parser(
        prog=prog, description="Generate a benchmark's videos, measure them, report.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    for name, text in HELP.items():
        kinds: dict[str, dict[str, Any]] = {
            "split": {"choices": SPLITS, "default": "all"},
            "limit": {"type": int, "metavar": "N"},
            "report_videos": {"type": int, "default": 8, "metavar": "N"},
            "compare": {"nargs": 2, "metavar": ("A", "B")},
            "score_only": {"action": "store_true"},
            "skip_bad_rows": {"action": "store_true"},
        }
        parser.add_argument(f"--{name}", help=text, **kinds.get(name, {"metavar": "PATH"}))
    known, rest = parser.parse_known_args(list(argv))
    config = parse(rest, prog)
    options = Options(**{**vars(known), "compare": None if known.compare is None else tuple(known.compare)})
    given = next((name for name in OF_ONE_VIDEO if getattr(config, name) is not None), None)
    if given is not None:
        raise ConfigError(f"--{given} is about one video, the benchmark says what to make: leave it out")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {options.limit}")
    if options.compare is None and options.bench_dir is None:
        raise ConfigError("--bench_dir is missing: give the benchmark's folder, for example benchmarks/uvcbench_tiny")
    if options.score_only and config.save_dir is None:
        raise ConfigError("--score_only needs --save_dir, the folder that the videos are in")
    if options.vbench_python and options.vbench_results:
        raise ConfigError("--vbench_python measures, --vbench_results reads what was measured: give one of them")
    return options, config


def main(argv: Sequence[str] | None = None, prog: str = "uvcbench.py") -> int:
    """Exit code: 0 all measured, 1 some samples failed, 2 the request cannot be met, 130 Ctrl-C."""
    return enter(partial(_run, sys.argv[1:] if argv is None else argv, prog))


def _run(argv: Sequence[str], prog: str, ranks: Ranks) -> int:
    with ranks.agree():
        options, config = parse_options(argv, prog)
        if options.compare is not None:
            return _compare(options.compare, config.save_dir) if ranks.rank == 0 else 0
        check_options(config)
        samples, problems = _validated(options)
        config = with_settings(config, options.bench_dir or "")
        path, why = find_checkpoint(config.ckpt_dir)
        _check_tools(options)
        folder = _folder(options, config, path)
        device = own_device(pick_device(config.device), Launch.from_environment())
        if options.score_only and not any((folder / f"{sample.key}.mp4").is_file() for sample in samples):
            raise InputError(f"{folder} holds no video of this benchmark: they are named <subtask>/<sample_id>.mp4")
    outcomes: list[Outcome] = []
    if not options.score_only:
        with ranks.agree():
            log.info("checkpoint %s (%s)", path, why)
            info = inspect_checkpoint(path)
            check_model_name(config.model_name, info)
        session = open_session(config, path, info, ranks, many=True)
        jobs = [job_of(sample, config) for sample in samples]
        if config.dry_run:
            first = {sample.task: job for sample, job in reversed(list(zip(samples, jobs, strict=True)))}
            return session.describe_jobs(list(first.values())) if ranks.rank == 0 else 0
        outcomes = _generate(session, jobs, folder)
    with writable(folder) if ranks.rank == 0 else nullcontext():
        scorer = _scorer(options, folder, device)
        rows = score_all(samples, scorer, ranks)
        if ranks.rank:
            return 0
        rows = [_with_reason(row, outcomes) for row in rows]
        return _report(samples, rows, problems, scorer, options, argv, device.type)


def _folder(options: Options, config: GenerateConfig, checkpoint: Path) -> Path:
    """One that the next run of the same model and split finds again, so that it goes on."""
    split = "" if options.split == "all" else f"-{options.split}"
    return Path(config.save_dir or Path("results") / "uvcbench" / f"{checkpoint.resolve().name}{split}")


# --- before ----------------------------------------------------------------------------------------------------------


def _validated(options: Options) -> tuple[list[Sample], list[Problem]]:
    samples, problems = read_bench(options.bench_dir or "", options.split, options.limit)
    for problem in problems:
        log.error("%s", problem)
    if problems and not (options.skip_bad_rows and samples):
        raise InputError(
            f"{len(problems)} of {len(samples) + len(problems)} rows cannot be used, the first: {problems[0]}; "
            "mend them, or go on without them with --skip_bad_rows"
        )
    tasks = dict.fromkeys(sample.task for sample in samples)
    log.info("%d samples of %d tasks: %s", len(samples), len(tasks), ", ".join(tasks))
    return samples, problems


def with_settings(config: GenerateConfig, bench_dir: str) -> GenerateConfig:
    wanted = read_settings(bench_dir)
    missing = {name: value for name, value in wanted.items() if getattr(config, name) is None}
    if missing:
        log.info("as the benchmark says: %s", ", ".join(f"{name} {value}" for name, value in missing.items()))
    return replace(config, **missing)


def _check_tools(options: Options) -> None:
    """What was asked for by name and is not there ends the run before it begins."""
    for folder in (options.clip_model, options.dino_model):
        if folder is not None:
            weight_files(folder)
    if options.vbench_python is not None:
        check_python(options.vbench_python)
    if options.vbench_results is not None and not Path(options.vbench_results).exists():
        raise InputError(f"--vbench_results {options.vbench_results} does not exist")


def job_of(sample: Sample, config: GenerateConfig) -> Job:
    """A sample as one of :mod:`vdot.jobs`."""
    video, mask, pictures = (",".join(str(path) for path in paths) or None for paths in sample.files.values())
    given = replace(config, prompt=sample.prompt, src_video=video, src_mask=mask, src_ref_images=pictures)
    return Job(sample.key, given)


# --- during ----------------------------------------------------------------------------------------------------------


def _generate(session: Session, jobs: list[Job], folder: Path) -> list[Outcome]:
    """All of them, on the first process; no process goes on before all videos are there."""
    outcomes = session.run_jobs(jobs, folder)
    Queue(session.ranks, 0, "vdot-generated").close()
    if session.ranks.rank == 0:
        counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
        log.info("generated: %s", ", ".join(f"{n} {status}" for status, n in counts.items()))
    session.release()
    return outcomes


def _scorer(options: Options, folder: Path, device: torch.device) -> Scorer:
    clip = None if options.clip_model is None else ClipText(options.clip_model, device)
    dino = None if options.dino_model is None else DinoIdentity(options.dino_model, device)
    return Scorer(folder, measurement(options.clip_model, options.dino_model), clip, dino)


def _with_reason(row: Measured, outcomes: Sequence[Outcome]) -> Measured:
    """Why there is no video, from who should have made it; an older one that is still there must not stand for it."""
    failed = next((o.message for o in outcomes if o.id == row.key and o.status == "failed"), None)
    return row if failed is None else replace(row, values=dict.fromkeys(row.values), message=failed)


# --- after -----------------------------------------------------------------------------------------------------------


def _report(
    samples: list[Sample], rows: list[Measured], problems: list[Problem], scorer: Scorer, options: Options,
    argv: Sequence[str], device: str,
) -> int:  # fmt: skip
    folder = scorer.folder
    there = {s.key: scorer.video(s) for s, row in zip(samples, rows, strict=True) if not row.message}
    hashes = {key: file_hash(path) for key, path in there.items()}
    rows, vbench = _with_vbench(rows, there, hashes, options, folder, device)
    told = {
        "command": list(argv), "split": options.split, "limit": options.limit, "vbench": vbench,
        "bad_rows": [str(problem) for problem in problems],
    }  # fmt: skip
    records = [record for record in map(scorer.record, samples) if record]
    notes = manifest(samples, {s.key: hashes.get(s.key) for s in samples}, records, scorer.how, told)
    results = tabulate(rows, notes)
    results.save(folder)
    with atomic_path(folder / "manifest.json") as temporary:
        Path(temporary).write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "report.html") as temporary:
        page = render(results, _previews(results, samples, scorer, options.report_videos))
        Path(temporary).write_text(page, encoding="utf-8")
    for line in results.markdown().split("\n\n")[0].splitlines():
        log.info("%s", line)
    log.info("%s: scores.json, scores.csv, scores.md, manifest.json, report.html", folder)
    failed = [row for row in rows if row.message]
    score = results.cells[ALL].get(SCORE)
    log.info("score %s, %d of %d samples measured", "not measured" if score is None else f"{score.mean:.2f}",
             len(rows) - len(failed), len(rows))  # fmt: skip
    return 1 if failed or vbench.startswith(FAILED) else 0


def _with_vbench(
    rows: list[Measured], videos: dict[str, Path], hashes: dict[str, str], options: Options, folder: Path, device: str
) -> tuple[list[Measured], str]:
    """Its values laid over the rows; what went wrong with it costs its numbers alone."""
    if not videos or (options.vbench_python is None and options.vbench_results is None):
        return rows, "not measured"
    try:
        if options.vbench_results is not None:
            values, by = read_vbench(options.vbench_results, list(videos)), f"read from {options.vbench_results}"
        else:
            python = str(options.vbench_python)
            values, by = run_vbench(python, videos, folder / "vbench", device, hashes), f"by {python}"
    except (InputError, OutputError) as error:
        log.error("VBench: %s", one_line(error))
        return rows, f"{FAILED}{one_line(error)}"
    return [replace(row, values=row.values | values.get(row.key, {})) for row in rows], by


def _previews(results: Results, samples: list[Sample], scorer: Scorer, count: int) -> dict[str, tuple[str, bytes]]:
    """Condition and result side by side, of the worst of each task."""
    by_key = {sample.key: sample for sample in samples}
    made = {}
    for task in results.tasks:
        for row in [row for row in results.worst_first(task) if not row.message][:count]:
            try:
                sample = by_key[row.key]
                made[row.key] = preview(*scorer.load(sample), fps=probe(scorer.video(sample)).fps)
            except VdotError as error:
                log.warning("%s is not shown in the report: %s", row.key, one_line(error))
    return made


def _compare(folders: tuple[str, str], save_dir: str | None) -> int:
    a, b = (load_results(folder) for folder in folders)
    found = compare(a, b, folders)
    log.info("%s", found.markdown(whole=False).rstrip())
    if save_dir is None:
        log.info("every metric of every task: with --save_dir FOLDER, which gets comparison.md and comparison.json")
        return 0
    with writable(Path(save_dir)) as folder:
        found.save(folder)
    log.info("%s: comparison.md, comparison.json", folder)
    return 0
