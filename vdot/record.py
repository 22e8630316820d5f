"""A run on disk: the video, what the model was given, and a ``run.json`` that repeats it byte for byte."""

import hashlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vdot
from vdot.config import GenerateConfig
from vdot.errors import OutputError
from vdot.pipeline import VideoResult
from vdot.prompts import Extended
from vdot.request import reference_list
from vdot.video import write_image, write_video
from vdot.video.output import atomic_path, missing_folders

# Where results go and what they are made of in memory do not change what is generated.
NOT_RECORDED = (
    *("save_dir", "save_file", "jobs", "dry_run", "ulysses_size", "ring_size"),
    *("prompt_url", "prompt_timeout"),  # the first may hold a secret
)
NOT_SETTINGS = (*NOT_RECORDED, "offload_model", "t5_fsdp", "dit_fsdp", "model_name")
_OUTPUT_NAMES = r"(out_video|src_video|src_mask)\.mp4|src_ref_image_\d+\.png"
EDGE = 2**20  # bytes hashed at each end of a weight file; also what a disk must take before work begins


@contextmanager
def writable(folder: Path, fresh: bool = False) -> Iterator[Path]:
    """Make ``folder`` and try to write into it: ``OutputError`` now rather than after minutes of sampling.

    ``fresh`` takes the first of ``folder``, ``folder_2``, ... that is not there yet, so that runs started together do
    not share one. What was made and is still empty at the end goes again: a failed run leaves no trace.
    """
    made: list[str] = []
    try:
        folder = _make(folder, fresh, made)
        probe = folder / f".vdot-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(bytes(EDGE))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write results to {folder}: {reason}; give another --save_dir", reason) from error
    try:
        yield folder
    finally:
        _remove_empty(made)


def _make(folder: Path, fresh: bool, made: list[str]) -> Path:
    made += missing_folders(str(folder.absolute()))
    if not fresh:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    stem, n = folder, 1
    while True:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            n += 1
            folder = stem.with_name(f"{stem.name}_{n}")
    made[:] = [str(folder.absolute()), *(name for name in made if name != str(stem.absolute()))]
    return folder


def _remove_empty(folders: list[str]) -> None:
    for folder in folders:
        with suppress(OSError, ValueError):
            os.rmdir(folder)


def default_folder(checkpoint: Path) -> Path:
    """``results/<model>/<time>/``"""
    return Path("results") / checkpoint.resolve().name / time.strftime("%Y-%m-%d_%H-%M-%S")


def fingerprint(files: list[Path]) -> str:
    """Identity of a checkpoint from the name, size and both ends of each file: 60 GB need not be read for it."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()[:16]


def settings_hash(config: GenerateConfig, checkpoint: str) -> str:
    """Equal for two runs that must give the same video; input files count by content."""
    values = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS}
    for key, paths in input_files(config).items():
        values[key] = [_file_hash(path) for path in paths]
    values["ckpt_dir"] = checkpoint
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def input_files(config: GenerateConfig) -> dict[str, list[str]]:
    """The media of a run by option."""
    return {
        "src_video": [config.src_video] if config.src_video else [],
        "src_mask": [config.src_mask] if config.src_mask else [],
        "src_ref_images": [str(path) for path in reference_list(config.src_ref_images)],
    }


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(EDGE):
            digest.update(chunk)
    return digest.hexdigest()


def _file_hash(path: str) -> str:
    try:
        return file_hash(Path(path))
    except OSError:
        return f"unreadable {path}"


def check_overwrites(config: GenerateConfig, folder: Path, video: Path) -> None:
    """``OutputError`` when a result would replace one of the files that it is made from."""
    results = {folder / name for name in ("src_video.mp4", "src_mask.mp4")} | {video}
    results |= {folder / f"src_ref_image_{i}.png" for i in range(len(input_files(config)["src_ref_images"]))}
    for path in (path for paths in input_files(config).values() for path in paths):
        if any(os.path.exists(path) and result.exists() and os.path.samefile(path, result) for result in results):
            raise OutputError(f"the results would overwrite the input {path}: give another --save_dir or --save_file")


def write_run(
    result: VideoResult,
    config: GenerateConfig,
    folder: Path,
    checkpoint: dict[str, Any],
    video: Path | None = None,
    resolved: dict[str, Any] | None = None,
    extended: Extended | None = None,
    machine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``out_video.mp4`` (or ``video``), the inputs as the model got them, and ``run.json``: all of them or none.

    ``resolved`` has options that the machine decided, for ``run.json`` to repeat; so is a prompt that was ``extended``;
    ``machine`` is merely told.
    """
    files = _contents(result, video or folder / "out_video.mp4", folder)
    with ExitStack() as stack:
        # Entered first, so renamed last: where there is a record, there is all that it speaks of.
        record_file = Path(stack.enter_context(atomic_path(folder / "run.json")))
        hashes = {}
        for path, write in files.items():
            temporary = Path(stack.enter_context(atomic_path(path)))
            write(temporary)
            hashes[path.name] = file_hash(temporary)
        record = run_record(result, config, checkpoint, hashes, resolved or {}, extended) | {"machine": machine or {}}
        record_file.write_text(_json(record), encoding="utf-8")
        inputs = [Path(name) for names in input_files(config).values() for name in names]
        _remove_earlier(folder, {path.absolute() for path in [*files, *inputs]})
    return record


def _contents(result: VideoResult, video: Path, folder: Path) -> dict[Path, Callable[[Path], None]]:
    """What goes where, as functions that write it."""
    prepared, count = result.prepared, result.prepared.frame_num
    files: dict[Path, Callable[[Path], None]] = {video: result.save}
    if prepared.source is not None:
        files[folder / "src_video.mp4"] = partial(write_video, frames=prepared.source[:count], fps=result.fps)
    if prepared.mask is not None:
        shown = np.repeat(prepared.mask[:count, ..., None], 3, axis=-1)
        files[folder / "src_mask.mp4"] = partial(write_video, frames=shown, fps=result.fps)
    for i, reference in enumerate(prepared.references):
        files[folder / f"src_ref_image_{i}.png"] = partial(write_image, array=reference)
    return files


def _remove_earlier(folder: Path, keep: set[Path]) -> None:
    """The record of an earlier run in ``folder``, and those of its files that this run does not replace."""
    try:
        earlier = json.loads((folder / "run.json").read_text(encoding="utf-8"))["outputs"]
        (folder / "run.json").unlink()
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in (folder / name for name in earlier if re.fullmatch(_OUTPUT_NAMES, name)):
        if path.absolute() not in keep:
            path.unlink(missing_ok=True)


def run_record(
    result: VideoResult,
    config: GenerateConfig,
    checkpoint: dict[str, Any],
    outputs: dict[str, str],
    resolved: dict[str, Any],
    extended: Extended | None = None,
) -> dict[str, Any]:
    """What ``run.json`` holds; ``--config run.json`` reads its ``config`` back. ``outputs``: SHA-256 by file name."""
    values = {k: v for k, v in asdict(config).items() if k not in NOT_RECORDED}
    schedule = result.schedule.to_dict()
    values |= {f"sample_{name}": schedule[name] for name in ("steps", "shift", "solver", "guide_scale")}
    values |= {"base_seed": result.seed, "ckpt_dir": str(Path(checkpoint["path"]).absolute()), **resolved}
    for key, paths in input_files(config).items():
        values[key] = ",".join(os.path.abspath(path) for path in paths) or None
    if extended is not None:  # repeated as it is, without asking again
        values |= {"prompt": extended.prompt, "use_prompt_extend": "plain", "prompt_model": None}
    return {
        "config": values,
        **({} if extended is None else {"prompt_extension": asdict(extended)}),
        "schedule": schedule,
        "plan": list(result.prepared.lines()),
        "notes": list(result.notes),
        "frames": len(result.frames),
        "fps": result.fps,
        "size": f"{result.frames.shape[2]}*{result.frames.shape[1]}",
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        "checkpoint": checkpoint,
        "settings_hash": settings_hash(config, checkpoint["fingerprint"]),
        "outputs": outputs,
        "environment": {
            "vdot": vdot.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _json(values: dict[str, Any]) -> str:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        text = json.dumps(values, indent=2) + "\n"
    return text
