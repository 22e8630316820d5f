"""The command line of ``inference/vace_preprocess.py``: raw material to an input, and with a prompt on to the video."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from vdot.annotate.material import SIDECAR, Annotated
from vdot.annotate.reading import Read, read_material
from vdot.annotate.tasks import TASKS, annotate, check_material, resolve
from vdot.cli import GROUPS, Form, check_options, make, parse
from vdot.config import GenerateConfig
from vdot.entry import enter
from vdot.errors import ConfigError, InputError, VdotError, one_line
from vdot.jobs import PER_ROW, Job, Outcome, look_at_jobs, read_jobs, summary
from vdot.parallel.state import Ranks
from vdot.record import file_hash, writable
from vdot.request import reference_list
from vdot.runtime import log
from vdot.video.output import atomic_path, remove_leftovers


@dataclass
class PrepareConfig(GenerateConfig):
    """How an input is prepared; the rest is for the video that a prompt makes of it."""

    task: str | None = None
    video: str | None = None  # comma-separated paths
    image: str | None = None  # comma-separated paths
    mask: str | None = None
    bbox: str | None = None  # "l,t,r,b l,t,r,b"
    label: str | None = None
    caption: str | None = None
    mode: str | None = None
    direction: str | None = None
    expand_ratio: float | None = None
    expand_num: int | None = None
    maskaug_mode: str | None = None
    maskaug_ratio: float | None = None
    control: str | None = None
    backend: str = "auto"
    pre_save_dir: str | None = None
    save_fps: float | None = None


OWN = tuple(f.name for f in fields(PrepareConfig) if f.name not in {g.name for g in fields(GenerateConfig)})
MADE_HERE = ("src_video", "src_mask", "src_ref_images")
FILES = ("video", "image", "mask")
NOT_OPTIONS = ("pre_save_dir", "task", "backend")
OWN_PER_ROW = tuple(name for name in OWN if name != "pre_save_dir")
OPTIONS: dict[str, str] = {
    "task": "what is to be prepared: " + ", ".join(TASKS),
    "video": "the clip; two of them, a.mp4,b.mp4, for clipref's firstlastclip",
    "image": "the picture, or several: a.png,b.png",
    "mask": "picture or video, white on the thing: in the clip, or in the picture where there is no clip",
    "bbox": 'boxes in pixels: "left,top,right,bottom", several with spaces between',
    "label": "the thing in a word or two, for --mode label",
    "caption": "the thing in a sentence, for --mode caption",
    "mode": "which ends (firstframe, lastclip, ...), which region (salient, mask, bbox, salientmasktrack, "
    "salientbboxtrack, masktrack, bboxtrack, label, caption), for the clip and for the references with a comma "
    "(masktrack,salient), or which parts of a pose (body,face,hands)",
    "direction": "where the picture grows: any of left,right,up,down (default: all)",
    "expand_ratio": "by how much of its width or height on each of these sides (default: 0.3)",
    "expand_num": "how many frames are to be generated (default: as many as make 81, or the clip's own)",
    "maskaug_mode": "shape of the mask: original, hull or bbox, or these with _expand",
    "maskaug_ratio": "by how much of its size an expanded one is larger (default: 0.3)",
    "control": "what the source shows of the movement: a control's name, for tasks that take one; none for grey",
    "backend": "who does the work: auto, or names with commas, each with a folder or Hub id if you like: dis,sam2:DIR",
    "pre_save_dir": "folder of the prepared input (default: results/annotate/<time>_<task>)",
    "save_fps": "frame rate it is written at (default: the clip's)",
}
EXAMPLES = """examples:
  edges of a clip as a control
    %(prog)s --task scribble --video clip.mp4
  the thing in a box made anew wherever it goes, prepared and generated
    %(prog)s --task inpainting --mode bboxtrack --video clip.mp4 --bbox 120,80,300,420 \\
        --maskaug_mode bbox_expand --maskaug_ratio 0.2 --prompt "a golden statue of a cat"
  a wider picture
    %(prog)s --task outpainting --video clip.mp4 --direction left,right --expand_ratio 0.25
  a picture as the first of 81 frames
    %(prog)s --task frameref --mode firstframe --image start.png
  a person from a picture in place of the one in a clip
    %(prog)s --task character_replacement --video clip.mp4 --mask person.png --image hero.png --prompt "..."

With --prompt the video follows at once, and every option of vace_wan_inference.py may be given; they are listed after
the preparation's own. --jobs takes a table of all of these."""
FORM = Form(
    PrepareConfig,
    {"what to prepare": OPTIONS, **{name: dict(group) for name, group in GROUPS.items()}},
    "Prepare source video, mask and references of any VACE task from raw clips, pictures and words.",
    EXAMPLES,
)


def main(argv: Sequence[str] | None = None, prog: str = "vace_preprocess.py") -> int:
    """Exit code: 0 done, 1 some jobs failed, 2 it cannot be done (one sentence on stderr), 130 Ctrl-C."""
    return enter(partial(_run, sys.argv[1:] if argv is None else argv, prog))


def _run(argv: Sequence[str], prog: str, ranks: Ranks) -> int:
    with ranks.agree():
        config = cast(PrepareConfig, parse(argv, prog, FORM))
        for name in MADE_HERE:
            if getattr(config, name):
                raise ConfigError(f"--{name} is what is made here: for a ready input use vace_wan_inference.py")
        check_options(config)
    if config.jobs is not None:
        return _table(config, config.jobs, ranks)
    with ranks.agree():
        read = _read(config) if ranks.rank == 0 else None
    if config.dry_run:
        return 0
    folder = Path(config.pre_save_dir or f"results/annotate/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.task}")
    with ExitStack() as stack, ranks.agree():
        if read is not None:  # one process prepares
            folder = stack.enter_context(writable(folder, fresh=config.pre_save_dir is None))
            _prepare(config, read, folder)
    folder = ranks.share(folder)
    if not config.prompt:
        log.info("next  %s", generator_command(folder))
        return 0
    return make(GenerateConfig(**_generation(config, folder)), ranks)


def _read(config: PrepareConfig) -> Read:
    """Files as arrays, and a look at whether the task can use them; says what goes in."""
    if config.task is None:
        raise ConfigError(f"name the task: --task, one of {', '.join(TASKS)}")
    resolve(config.task, config.mode)
    options = {name: getattr(config, name) for name in OWN if name not in NOT_OPTIONS}
    read = read_material(**options)
    name, task, mode = resolve(config.task, config.mode)
    check_material(name, task, replace(read.material, mode=mode))
    log.info("task  %s%s: %s", name, f" ({mode})" if mode else "", task.about)
    if read.video is not None:
        info = read.video
        log.info("in    %d frames, %.4g fps, %dx%d", info.frames, info.fps, info.width, info.height)
    for note in read.notes:
        log.info("note  %s", note)
    return read


def _prepare(config: PrepareConfig, read: Read, folder: Path) -> Annotated:
    """Make and save one input."""
    start = time.perf_counter()
    made = annotate(config.task or "", read.material, config.backend)
    made = replace(made, notes=(*read.notes, *made.notes))
    made.save(folder, {"settings": settings(config), **_record(config, folder)}, sound_of(read, made))
    clip = made.src_video
    if clip is not None:
        log.info("out   %d frames, %.4g fps, %dx%d", len(clip), made.fps, clip.shape[2], clip.shape[1])
    if made.references:
        log.info("refs  %d picture(s)", len(made.references))
    for kind, who in made.backends.items():
        log.info("by    %s: %s", kind, who)
    for note in made.notes[len(read.notes) :]:
        log.info("note  %s", note)
    log.info("%s: prepared in %.1f s; look at preview.png", folder, time.perf_counter() - start)
    return made


def sound_of(read: Read, made: Annotated) -> str | None:
    """The file whose sound fits the prepared clip: it has the same frames at the same rate."""
    info, clip = read.video, made.src_video
    if info is None or clip is None or not info.has_audio or len(clip) != info.frames:
        return None
    return info.path if abs(made.fps - info.fps) <= 0.002 * info.fps else None


def _record(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """What was asked for, for the sidecar, and the command that makes a video of it."""
    asked = {
        name: getattr(config, name) for name in OWN if getattr(config, name) is not None and name != "pre_save_dir"
    }
    for name in FILES:
        if name in asked:
            asked[name] = ",".join(str(Path(path).absolute()) for path in _paths(config, name))
    if config.prompt:
        asked["prompt"] = config.prompt
    return {"asked": asked}


def _paths(config: PrepareConfig, name: str) -> list[str]:
    value = getattr(config, name)
    return [str(path) for path in reference_list(value)] if value else []


def settings(config: PrepareConfig) -> str:
    """Equal for two calls that must prepare the same input; files count by content."""
    values: dict[str, Any] = {name: getattr(config, name) for name in OWN if name != "pre_save_dir"}
    for name in FILES:
        values[name] = [file_hash(Path(path)) if Path(path).is_file() else path for path in _paths(config, name)]
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def prepared(folder: Path) -> dict[str, str]:
    """The generator's options for what lies in ``folder``."""
    names = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))["files"]
    references = [str(folder / name) for name in names if name.startswith("src_ref_image_")]
    given = {key: str(folder / f"{key}.mp4") for key in ("src_video", "src_mask") if f"{key}.mp4" in names}
    return given | ({"src_ref_images": ",".join(references)} if references else {})


def _generation(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in fields(GenerateConfig)}
    return {**values, **prepared(folder)}


def generator_command(folder: Path) -> str:
    words = [word for key, value in prepared(folder).items() for word in (f"--{key}", value)]
    return shlex.join(["python", "inference/vace_wan_inference.py", *words, "--prompt", "..."])


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(config: PrepareConfig, table: str, ranks: Ranks) -> int:
    """Prepare every row, shared by the processes, then generate those that have a prompt with one loaded model."""
    with ranks.agree():
        base = replace(config, jobs=None)
        jobs = read_jobs(table, base, (*OWN_PER_ROW, *(n for n in PER_ROW if n not in MADE_HERE)), FILES)
        folder = Path(config.pre_save_dir or f"results/annotate/{Path(table).stem}")
    if config.dry_run:
        return look_at_jobs(jobs, _read) if ranks.rank == 0 else 0
    with ExitStack() as stack:
        with ranks.agree():
            stack.enter_context(writable(folder))
            if ranks.rank == 0:
                remove_leftovers(folder)
        mine = {i: _one_row(job, folder, i, len(jobs)) for i, job in enumerate(jobs) if i % ranks.world == ranks.rank}
        outcomes = dict(sorted(pair for part in ranks.gather(mine) for pair in part.items()))
    if ranks.rank == 0:
        for line in summary(list(outcomes.values())):
            log.info("%s", line)
    failed = ranks.rank == 0 and any(outcome.status == "failed" for outcome in outcomes.values())  # said once
    ready = [job for i, job in enumerate(jobs) if outcomes[i].status != "failed" and job.config and job.config.prompt]
    if not ready:
        return int(failed)
    with ranks.agree():
        rows = folder / "generate.jsonl"
        if ranks.rank == 0:
            _write_rows(rows, ready, base, folder)
    values = {f.name: getattr(base, f.name) for f in fields(GenerateConfig)}
    values |= {"jobs": str(rows), "save_dir": config.save_dir or str(folder / "videos"), "prompt": None}
    return max(int(failed), make(GenerateConfig(**values), ranks))


def _one_row(job: Job, folder: Path, index: int, count: int) -> Outcome:
    start, own = time.perf_counter(), folder / job.id
    log.info("job %d of %d: %s", index + 1, count, job.id)
    try:
        if job.config is None:
            raise InputError(job.error or "bad row")
        config = cast(PrepareConfig, job.config)
        status, message = "skipped", "already prepared with these settings"
        if not _is_prepared(own, settings(config)):
            with writable(own):
                remove_leftovers(own)
                _prepare(config, _read(config), own)
            status, message = "done", str(own)
    except VdotError as error:
        status, message = "failed", one_line(error)
    except Exception as error:  # a bug of ours: it is shown in full, and the other rows are prepared all the same
        log.error("  unexpected error", exc_info=True)
        status, message = "failed", f"unexpected {type(error).__name__}: {one_line(error)}"
    if status == "failed":
        log.error("  failed: %s", message)
    return Outcome(job.id, status, time.perf_counter() - start, message)


def _is_prepared(folder: Path, wanted: str) -> bool:
    try:
        values = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        return values["settings"] == wanted and all((folder / name).is_file() for name in values["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_rows(path: Path, jobs: Sequence[Job], base: PrepareConfig, folder: Path) -> None:
    """The table for the generator: prepared files, prompt, and what a row says otherwise than the command line."""
    lines = []
    for job in jobs:
        values = asdict(cast(PrepareConfig, job.config))
        own = {n: values[n] for n in PER_ROW if n not in MADE_HERE and values[n] != getattr(base, n)}
        files = {key: value for key, value in prepared((folder / job.id).absolute()).items()}
        lines.append(json.dumps({"id": job.id, "prompt": values["prompt"], **own, **files}))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
