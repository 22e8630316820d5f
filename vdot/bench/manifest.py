"""What a run consisted of, hashed: two people see at a glance whether they measured the same thing."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vdot
from vdot.annotate.backends import BACKENDS, local_model
from vdot.evaluate.cases import Sample
from vdot.record import NOT_SETTINGS, file_hash, fingerprint

ROOMS = ("evaluate", "annotate", "data/sprites")  # whose code decides what is measured
ANNOTATED = ("depth", "pose", "flow", "scribble")
LIBRARIES = ("opencv-python-headless", "numpy", "torch", "transformers", "av")
OF_A_SAMPLE = ("prompt", "src_video", "src_mask", "src_ref_images", "ckpt_dir")


def digest(value: Any) -> str:
    """16 hexadecimal digits of anything JSON-able."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def sample_hash(sample: Sample) -> str:
    """Of what is asked: files count by content, wherever they lie."""
    files = {name: [file_hash(path) for path in paths] for name, paths in sample.files.items()}
    return digest([sample.key, sample.task, sample.prompt, files, sample.world])


def measurement(clip_model: str | None, dino_model: str | None) -> dict[str, Any]:
    """What decides the numbers: our code, the annotators that are there, the networks given, the libraries."""
    root = Path(vdot.__file__).parent
    code = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).glob("*.py")):
        code.update(path.read_bytes())
    there = {kind: next((b.name for b in BACKENDS if b.kind == kind and b.there()), None) for kind in ANNOTATED}
    return {
        "code": code.hexdigest()[:16],
        "annotators": {kind: _named(name) for kind, name in there.items()},
        "clip_model": _model(clip_model),
        "dino_model": _model(dino_model),
        "opencv": _version("opencv-python-headless"),
        "numpy": _version("numpy"),
    }


def _named(backend: str | None) -> str | None:
    place = None if backend is None else local_model(backend)
    return backend if place is None else f"{backend} {_model(place)}"


def _model(folder: str | None) -> str | None:
    """Its weights' fingerprint."""
    if folder is None:
        return None
    return fingerprint([path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".bin", ".json")])


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def model_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Checkpoint and settings that all videos share; ``None`` when some have no record, or they differ."""
    made = []
    for record in records:
        config = {k: v for k, v in record.get("config", {}).items() if k not in (*OF_A_SAMPLE, *NOT_SETTINGS)}
        checkpoint = {k: v for k, v in record.get("checkpoint", {}).items() if k != "path"}
        made.append({"checkpoint": checkpoint, "schedule": record.get("schedule"), "config": config})
    return made[0] if made and all(one == made[0] for one in made) else None


def manifest(
    samples: Sequence[Sample],
    videos: Mapping[str, str | None],
    records: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """``videos``: SHA-256 by key, ``records``: the run.json of each, ``told``: what is merely worth knowing."""
    asked = {sample.key: sample_hash(sample) for sample in samples}
    model = model_of(records) if len(records) == len(samples) else None
    return {
        "hashes": {
            "benchmark": digest(asked), "model": "unknown" if model is None else digest(model),
            "measurement": digest(dict(measured)), "videos": digest(dict(videos)),
        },
        **told,
        "model": model,
        "measurement": dict(measured),
        "samples": asked,
        "videos": dict(videos),
        "environment": {
            "vdot": vdot.__version__, "python": platform.python_version(), "machine": platform.machine(),
            **{name: _version(name) for name in LIBRARIES},
        },
    }  # fmt: skip
