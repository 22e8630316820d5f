"""What a checkpoint is, from headers alone: for plans, memory estimates and messages before anything is loaded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdot.checkpoints.layouts import Layout, find_layout
from vdot.checkpoints.loading import Weights, read_headers
from vdot.checkpoints.shapes import dit_config
from vdot.errors import CheckpointError
from vdot.models.presets import DitConfig


@dataclass(frozen=True)
class PartInfo:
    """One network of a checkpoint."""

    files: tuple[Path, ...]
    naming: str  # "native" or "library" names in the files
    tensors: int
    parameters: int
    nbytes: int  # of the tensors as stored
    dtypes: dict[str, int]  # torch dtype name -> parameters stored in it
    config: dict[str, Any] | None  # the JSON beside it

    @property
    def stored_dtype(self) -> str:
        """The type that most of it is stored in, if it can be loaded as that, else float32."""
        most = max(self.dtypes, key=lambda name: self.dtypes[name])
        return most if most in ("float32", "bfloat16", "float16") else "float32"


@dataclass(frozen=True)
class CheckpointInfo:
    """``parts`` has those of "dit", "text_encoder" and "vae" that are there."""

    path: Path
    layout: str  # "vdot", "wan", "diffusers", "native" or "part"
    dit: DitConfig | None
    parts: dict[str, PartInfo]
    tokenizer: Path | None
    schedule: dict[str, Any] | None  # schedule.json as it is
    defaults: dict[str, Any] | None  # defaults.json as it is
    text_len: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """Recognise a folder or file and describe its parts; reads headers only. CheckpointError as ``load_dit``."""
    layout = find_layout(path)
    weights = _headers(layout)
    dit = None
    if "dit" in weights:
        w = weights["dit"]
        dit = dit_config(w.shapes, w.config, w.where, layout.text_len)
    text_len = layout.text_len or (dit.text_len if dit else 512)
    parts = {part: _part(w) for part, w in weights.items()}
    schedule, defaults = layout.notes.get("schedule"), layout.notes.get("defaults")
    return CheckpointInfo(layout.path, layout.name, dit, parts, layout.tokenizer, schedule, defaults, text_len)


def _headers(layout: Layout) -> dict[str, Weights]:
    single = layout.path.is_file()  # may be any of the three: the first that fits is it
    weights: dict[str, Weights] = {}
    errors: list[CheckpointError] = []
    for part, place in layout.parts.items():
        try:
            weights[part] = read_headers(part, place)
        except CheckpointError as error:
            errors.append(error)
            if not single:
                raise
        if single and weights:
            return weights
    if errors:
        raise errors[0]
    return weights


def _part(weights: Weights) -> PartInfo:
    headers = [source.header for source in weights.tensors.values()]
    dtypes: Counter[str] = Counter()
    parameters = 0
    for header in headers:
        size = header.nbytes // header.dtype.itemsize
        dtypes[str(header.dtype).removeprefix("torch.")] += size
        parameters += size
    nbytes = sum(header.nbytes for header in headers)
    return PartInfo(weights.files, weights.naming, len(headers), parameters, nbytes, dict(dtypes), weights.config)
