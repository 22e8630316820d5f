"""A run on disk: the video, what the model was given, and a ``run.json`` that repeats it byte for byte."""

import hashlib
import json
import os
import platform
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vdot
from vdot.config import GenerateConfig
from vdot.errors import OutputError
from vdot.pipeline import VideoResult
from vdot.request import reference_list
from vdot.video import write_image, write_video
from vdot.video.output import atomic_path

# Where results go and what a machine adds do not change what is generated.
NOT_SETTINGS = ("save_dir", "save_file", "jobs", "dry_run")
EDGE = 2**20  # bytes hashed at each end of a weight file


def check_writable(folder: Path) -> None:
    """``OutputError`` now rather than after minutes of sampling."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write results to {folder}: {existing} is not a writable folder; give --save_dir")
    probe = existing / f".vdot-{secrets.token_hex(8)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write results to {folder}: {error.strerror}; give --save_dir") from error


def run_folder(config: GenerateConfig, checkpoint: Path) -> Path:
    """``save_dir``, or a new ``results/<model>/<time>/``."""
    if config.save_dir is not None:
        return Path(config.save_dir)
    stem = Path("results") / checkpoint.name / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, n = stem, 1
    while folder.exists():
        n += 1
        folder = stem.with_name(f"{stem.name}_{n}")
    return folder


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
    for key in ("src_video", "src_mask", "src_ref_images"):
        values[key] = [_file_hash(str(path)) for path in reference_list(values[key])]
    values["ckpt_dir"] = checkpoint
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _file_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return f"unreadable {path}"


def write_run(
    result: VideoResult, config: GenerateConfig, folder: Path, checkpoint: dict[str, Any], video: Path | None = None
) -> dict[str, Any]:
    """Write ``out_video.mp4`` (or ``video``), the inputs as the model got them, and last of all ``run.json``."""
    outputs = [video or folder / "out_video.mp4"]
    result.save(outputs[0])
    prepared, count = result.prepared, result.prepared.frame_num
    if prepared.source is not None:
        outputs.append(folder / "src_video.mp4")
        write_video(outputs[-1], prepared.source[:count], result.fps)
    if prepared.condition.mask is not None:
        outputs.append(folder / "src_mask.mp4")
        grey = (prepared.condition.mask[:count].numpy() * 255).round().astype(np.uint8)
        write_video(outputs[-1], np.repeat(grey[..., None], 3, axis=-1), result.fps)
    for i, reference in enumerate(prepared.references):
        outputs.append(folder / f"src_ref_image_{i}.png")
        write_image(outputs[-1], reference)
    record = run_record(result, config, checkpoint, outputs)
    write_json(folder / "run.json", record)
    return record


def run_record(
    result: VideoResult, config: GenerateConfig, checkpoint: dict[str, Any], outputs: list[Path]
) -> dict[str, Any]:
    """What ``run.json`` holds; ``--config run.json`` reads its ``config`` back."""
    values = {k: v for k, v in asdict(config).items() if k not in NOT_SETTINGS}
    schedule = asdict(result.schedule)
    values |= {f"sample_{name}": value for name, value in schedule.items()}
    values["base_seed"] = result.seed
    for key in ("src_video", "src_mask", "src_ref_images"):
        paths = [str(Path(str(path)).absolute()) for path in reference_list(values[key])]
        values[key] = ",".join(paths) or None
    return {
        "config": values,
        "schedule": schedule,
        "plan": list(result.prepared.lines()),
        "notes": list(result.notes),
        "frames": len(result.frames),
        "fps": result.fps,
        "size": f"{result.frames.shape[2]}*{result.frames.shape[1]}",
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        "checkpoint": checkpoint,
        "settings_hash": settings_hash(config, checkpoint["fingerprint"]),
        "outputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs},
        "environment": {
            "vdot": vdot.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
