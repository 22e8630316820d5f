"""What a benchmark asks for: its samples, read and checked row by row, and one of them as pixels to measure against.

Two layouts are known. UVCBench: JSON lines in ``*.jsonl``, or in ``indices/*.txt`` as published, one row a sample with
``subtask, sample_id, en_prompt, src_video, src_mask, src_ref_images`` and paths from the benchmark's folder. And
VACE-Benchmark: ``assets/examples/<task>/`` with ``src_video.mp4, src_mask.mp4, src_ref_image_*.png, prompt.txt``, or
folders of those below.

A row may add ``world``: ``{"task": ..., "seed": ..., "view": ...}`` names the clip of the procedural world that is
the truth.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vdot.data.sprites.scene import VIEWS, Scene
from vdot.data.sprites.tasks import TASKS, TaskClip, draw_task
from vdot.errors import InputError, VdotError, one_line
from vdot.request import MODES
from vdot.video import plan_frames, probe, read_frames, read_image, read_mask
from vdot.video.output import bad_name

Split = Literal["single", "composite", "all"]
SPLITS: tuple[Split, ...] = ("single", "composite", "all")
CONTROLS = ("depth", "pose", "flow", "scribble", "gray")
SINGLE = (*CONTROLS, "outpainting", "extension", "r2v")
COMPOSITE = tuple(f"{given}+{control}" for given in ("firstframe", "reference") for control in CONTROLS)
UVC = (*SINGLE, *COMPOSITE)  # the 18 tasks
ROW = ("subtask", "sample_id", "en_prompt", "src_video", "src_mask", "src_ref_images")
SETTINGS = "bench.json"  # of a benchmark's folder: {"size": ..., "frame_num": ...} that its runs start from
_SPELLINGS = {"grey": "gray", "first_frame": "firstframe", "first frame": "firstframe", "first-frame": "firstframe"}


@dataclass(frozen=True)
class Sample:
    """One thing to generate. ``subtask`` as the benchmark writes it, ``task`` as :func:`canonical` does."""

    subtask: str
    sample_id: str
    prompt: str
    src_video: Path | None = None
    src_mask: Path | None = None
    references: tuple[Path, ...] = ()
    world: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Its place among the results: ``<save_dir>/<key>.mp4``."""
        return f"{self.subtask}/{self.sample_id}"

    @property
    def task(self) -> str:
        return canonical(self.subtask)

    @property
    def control(self) -> str:
        """What its source shows where it may change, "" for nothing known."""
        last = re.split(r"[+_]", self.task)[-1]
        return last if last in (*CONTROLS, "layout") else ""

    @property
    def files(self) -> dict[str, list[Path]]:
        video = [] if self.src_video is None else [self.src_video]
        mask = [] if self.src_mask is None else [self.src_mask]
        return {"src_video": video, "src_mask": mask, "src_ref_images": list(self.references)}


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: where it is and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def canonical(subtask: str) -> str:
    """``Reference+Grey``, ``first_frame_depth``, ``R2V`` -> ``reference+gray``, ``firstframe+depth``, ``r2v``."""
    name = subtask.strip().lower()
    for written, meant in _SPELLINGS.items():
        name = name.replace(written, meant)
    parts = [part for part in re.split(r"[^a-z0-9]+", name) if part]
    if "+".join(parts) in UVC:
        return "+".join(parts)
    if any(part.startswith("r2v") for part in parts):
        return "r2v"
    return "_".join(parts)


def is_composite(task: str) -> bool:
    return re.match(r"(firstframe|reference)[+_]", task) is not None


# --- reading ---------------------------------------------------------------------------------------------------------


def read_bench(
    folder: Path | str, split: Split = "all", limit: int | None = None
) -> tuple[list[Sample], list[Problem]]:
    """The samples of a benchmark's folder, at most ``limit`` of each task, and the rows that cannot be used.

    Raises:
        InputError: there is no benchmark in the folder, or nothing of this split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no benchmark folder {folder}: give --bench_dir")
    examples = folder / "assets" / "examples"
    indices = sorted([*folder.glob("*.jsonl"), *folder.glob("indices/*.txt"), *folder.glob("indices/*.jsonl")])
    if not indices and not examples.is_dir():
        raise InputError(
            f"{folder} holds no benchmark: neither an index (*.jsonl or indices/*.txt) nor assets/examples/<task>/"
        )
    found = [made for index in indices for made in _read_index(index, folder)]
    found = found or list(_read_examples(examples))
    samples: dict[str, Sample] = {}
    problems: list[Problem] = []
    counts: dict[str, int] = {}
    for where, made in found:
        if not isinstance(made, Problem) and not _wanted(made, split):
            continue
        if isinstance(made, Sample):
            known = samples.get(made.key)
            if known == made:  # several indices may list one sample
                continue
            counts[made.task] = counts.get(made.task, 0) + 1
            if limit is not None and counts[made.task] > limit:
                continue
            made = _twice(where, made, samples) or _checked(where, made)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            samples[made.key] = made
    if not samples and not problems:
        raise InputError(f"{folder} holds no sample of the split {split}: use --split {' or '.join(SPLITS)}")
    order = {task: number for number, task in enumerate(UVC)}  # others follow, as they come
    return sorted(samples.values(), key=lambda sample: order.get(sample.task, len(order))), problems


def _wanted(sample: Sample, split: Split) -> bool:
    return split == "all" or is_composite(sample.task) == (split == "composite")


def _twice(where: str, sample: Sample, known: dict[str, Sample]) -> Problem | None:
    same = next((key for key in known if key.casefold() == sample.key.casefold()), None)
    return None if same is None else Problem(where, f"{sample.key} is there already; subtask and sample_id name a file")


def _read_index(index: Path, folder: Path) -> Iterator[tuple[str, Sample | Problem]]:
    try:
        lines = index.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the index {index}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{index.name} line {number}"
            yield where, _row(where, line, folder)


def _row(where: str, line: str, folder: Path) -> Sample | Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(where, f"it is not JSON: {error}")
    if not isinstance(row, dict):
        return Problem(where, "it is not a JSON object")
    missing = [name for name in ROW[:3] if not row.get(name) and row.get(name) != 0]
    if missing:
        return Problem(where, f"{missing[0]} is missing; a row has {', '.join(ROW)}")
    for name, added in (("subtask", ""), ("sample_id", ".mp4")):
        why = bad_name(row[name], added)
        if why:
            return Problem(where, f"the {name} {row[name]!r} cannot name a file: {why}")
    given = row.get("src_ref_images") or []
    references = given.split(",") if isinstance(given, str) else given
    media = [row.get("src_video"), row.get("src_mask"), *(references if isinstance(references, list) else [None, 0])]
    if not all(isinstance(name, str | None) for name in media) or not isinstance(row["en_prompt"], str):
        return Problem(where, "en_prompt, src_video and src_mask are text, src_ref_images is a list of text")
    video, mask, *pictures = [folder / name.strip() if name else None for name in media]
    sample = Sample(
        str(row["subtask"]), str(row["sample_id"]), row["en_prompt"], video, mask,
        tuple(path for path in pictures if path is not None), row.get("world"),
    )  # fmt: skip
    return _as_its_task_takes_it(sample)


def _as_its_task_takes_it(sample: Sample) -> Sample:
    """Published rows may name more files than their task is about: what the task is not about is left out."""
    task = sample.task
    if task == "r2v":
        return replace(sample, src_video=None, src_mask=None)
    if task in CONTROLS:
        return replace(sample, src_mask=None, references=())
    if task in COMPOSITE:
        first = task.startswith("firstframe")
        return replace(sample, references=()) if first else replace(sample, src_mask=None)
    return replace(sample, references=()) if task in SINGLE else sample


def _read_examples(folder: Path) -> Iterator[tuple[str, Sample | Problem]]:
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        inner = sorted(path for path in task.iterdir() if path.is_dir())
        for example in inner or [task]:
            words = example / "prompt.txt"
            where = str(example.relative_to(folder))
            if not words.is_file():
                yield where, Problem(where, "prompt.txt is missing: write what the video shows")
                continue
            video, mask = (example / f"{name}.mp4" for name in ("src_video", "src_mask"))
            pictures = sorted(
                p for p in example.glob("src_ref_image_*") if p.suffix.lower() in (".png", ".jpg", ".jpeg")
            )
            yield where, Sample(
                task.name, example.name, words.read_text(encoding="utf-8").strip(),
                video if video.is_file() else None, mask if mask.is_file() else None, tuple(pictures),
            )  # fmt: skip


def _checked(where: str, sample: Sample) -> Sample | Problem:
    """The sample, if all it needs is there and can be read."""
    needs_source = sample.task in UVC and sample.task != "r2v"
    needs_mask = sample.task in ("outpainting", "extension") or sample.task.startswith("firstframe+")
    needs_picture = sample.task == "r2v" or sample.task.startswith("reference+")
    for needed, there, name in (
        (needs_source, sample.src_video, "src_video"),
        (needs_mask or None, sample.src_mask, "src_mask"),
        (needs_picture, sample.references, "src_ref_images"),
    ):
        if needed and not there:
            return Problem(where, f"{name} is missing, which {sample.subtask} is about")
    if sample.src_mask is not None and sample.src_video is None:
        return Problem(where, "src_mask needs the src_video it belongs to")
    if not sample.prompt.strip():
        return Problem(where, "en_prompt is empty")
    world = sample.world
    if world is not None and not (
        isinstance(world, dict)
        and world.get("task") in TASKS
        and isinstance(world.get("seed"), int)
        and world.get("view", "far") in VIEWS
    ):
        words = '"task": one of the procedural world\'s, "seed": a whole number, and maybe "view": far or near'
        return Problem(where, f"world must be {{{words}}}")
    try:
        if sample.src_video is not None:
            probe(sample.src_video)
        if sample.src_mask is not None:
            probe(sample.src_mask, allow_image=True)
        for path in sample.references:
            read_image(path)
    except VdotError as error:
        return Problem(where, one_line(error))
    return sample


def read_settings(folder: Path | str) -> dict[str, Any]:
    """Size and length that a benchmark wants, if it says so. ``InputError`` for a file that does not say that."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict) or set(values) - {"size", "frame_num"}:
        raise InputError(f"{path} must be a JSON object of size and frame_num")
    return values


# --- as pixels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a video is measured against where no world knows the truth; the fields are :class:`TaskClip`'s.

    ``src_video`` uint8 and ``src_mask`` uint8 (0 and 255 and between) have the video's own frames and size.
    """

    task: str
    prompt: str
    src_video: np.ndarray | None
    src_mask: np.ndarray | None
    references: tuple[np.ndarray, ...]
    control: str = ""
    video: np.ndarray | None = None
    scene: Scene | None = None
    things: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loader:
    """A sample's files on the grid of a video made from them."""

    sample: Sample
    frame_mode: str = "spread"
    fps: float | None = None

    @cached_property
    def world(self) -> TaskClip | None:
        """The exact truth, if the sample has one."""
        known = self.sample.world
        if known is None:
            return None
        return draw_task(known["seed"], known["task"], split="test", view=known.get("view", "far"))

    def __call__(self, shape: Sequence[int]) -> TaskClip | Case:
        """For a video ``[T, H, W, 3]``. The world's own clip where it is of that shape, else what the files hold.

        Raises:
            InputError: a file cannot be read, or the video has another number of frames than its source allows.
        """
        frames, height, width = shape[:3]
        if self.world is not None and self.world.video.shape == tuple(shape):
            return self.world
        sample, source, mask = self.sample, None, None
        if sample.src_video is not None:
            still = None if sample.src_mask is None else probe(sample.src_mask, allow_image=True)
            mode = self.frame_mode if self.frame_mode in MODES else "spread"
            plan = plan_frames(
                probe(sample.src_video),
                max_area=height * width,
                frame_num=None if mode == "all" else frames,
                mode=mode,  # type: ignore[arg-type]
                mask=still,
                budget_frames=frames,
                fps=self.fps,
            )
            ids = plan.frame_ids
            if len(ids) != frames:
                raise InputError(f"the video has {frames} frames, its source gives {len(ids)}")
            source = read_frames(sample.src_video, ids, (height, width))
            if sample.src_mask is not None:
                values = read_mask(sample.src_mask, ids, height, width)
                mask = (values * 255).round().byte().numpy()
        pictures = tuple(read_image(path) for path in sample.references)
        return Case(sample.task, sample.prompt, source, mask, pictures, sample.control)
