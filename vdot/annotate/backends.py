"""Who does the work: for each kind of it several backends, chosen by name or the best that is there.

A backend is there when its package can be imported and, if it needs a model from the Hub, when that lies in
``models/annotators/<name>`` (or ``$VDOT_ANNOTATORS/<name>``). A backend that is asked for by name may also be given
a folder or a Hub id, ``sam2:/data/sam2.1-hiera-small``, and without either fetches its usual model from the Hub. On its
own accord nothing is downloaded.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vdot.errors import InputError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]
MEDIAPIPE = 'pip install -e ".[annotate]" && pip install --no-deps mediapipe==0.10.21'


@dataclass(frozen=True)
class Backend:
    """``module:function`` is imported on first use and called with the model's place (``None`` without a model)."""

    kind: str
    name: str
    target: str
    package: str = ""  # that must be importable
    install: str = ""  # the command that makes it so
    model: str = ""  # Hub id of the usual model

    def there(self) -> bool:
        """Whether it can work now, without a download."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return False
        return not self.model or local_model(self.name) is not None

    def load(self, place: str | None) -> Any:
        """The function that does the work. ``MissingDependencyError`` names command and model."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise MissingDependencyError(
                f"{self.kind} by {self.name} needs the package {self.package}: run `{self.install}`"
            )
        module, _, function = self.target.partition(":")
        factory = getattr(importlib.import_module(f"vdot.annotate.{module}"), function)
        if not self.model:
            return factory()
        return factory(place or local_model(self.name) or self.model)


SAM2, SAM3 = "facebook/sam2.1-hiera-small", "facebook/sam3"
# Of each kind the best first: "auto" takes the first that is there.
BACKENDS: tuple[Backend, ...] = (
    Backend("gray", "builtin", "lines:gray"),
    Backend("scribble", "builtin", "lines:scribble"),
    Backend("flow", "raft", "raft:flow", "torchvision", "pip install torchvision", "torchvision"),
    Backend("flow", "dis", "flow:dis"),
    Backend("depth", "depth_anything", "depth:network", model="depth-anything/Depth-Anything-V2-Small-hf"),
    Backend("depth", "midas", "depth:network", model="Intel/dpt-hybrid-midas"),
    Backend("pose", "mediapipe", "with_mediapipe:pose", "mediapipe", MEDIAPIPE),
    Backend("pose", "vitpose", "vitpose:pose", model="usyd-community/vitpose-base-simple"),
    Backend("salient", "mediapipe", "with_mediapipe:salient", "mediapipe", MEDIAPIPE),
    Backend("salient", "grabcut", "salient:salient"),
    Backend("segment", "sam3", "sam:sam3_segment", model=SAM3),
    Backend("segment", "sam2", "sam:sam2_segment", model=SAM2),
    Backend("segment", "grabcut", "salient:segment"),
    Backend("track", "sam3", "sam:sam3_track", model=SAM3),
    Backend("track", "sam2", "sam:sam2_track", model=SAM2),
    Backend("track", "template", "tracking:by_template"),
    Backend("find", "grounding_dino", "words:grounding_dino", model="IDEA-Research/grounding-dino-tiny"),
    Backend("find", "clipseg", "words:clipseg", model="CIDAS/clipseg-rd64-refined"),
    Backend("find", "mediapipe", "with_mediapipe:people", "mediapipe", MEDIAPIPE),
    Backend("find", "opencv", "with_opencv:find"),
    Backend("face", "mediapipe", "with_mediapipe:faces", "mediapipe", MEDIAPIPE),
    Backend("face", "opencv", "with_opencv:faces"),
)
KINDS = tuple(dict.fromkeys(backend.kind for backend in BACKENDS))


def local_model(name: str) -> str | None:
    """The folder of a backend's model, if it is on this machine."""
    for base in (os.environ.get("VDOT_ANNOTATORS"), Path("models/annotators"), ROOT / "models" / "annotators"):
        if base and (Path(base) / name).is_dir():
            return str(Path(base) / name)
    return None


def parse_backends(spec: str) -> dict[str, str | None]:
    """ "auto", or "name", "name:place" and several of them with commas -> place by name."""
    named: dict[str, str | None] = {}
    for part in spec.split(","):
        name, _, place = part.strip().partition(":")
        if name in ("", "auto"):
            continue
        if name not in {backend.name for backend in BACKENDS}:
            known = ", ".join(dict.fromkeys(backend.name for backend in BACKENDS))
            raise InputError(f"unknown backend {name!r}: use auto or any of {known}")
        named[name] = place or None
    return named


@lru_cache(maxsize=16)
def _loaded(backend: Backend, place: str | None) -> Any:
    return backend.load(place)


class Tools:
    """Backends of one call: each kind of work is done by the named one that can do it, else by the best there is."""

    def __init__(self, spec: str = "auto") -> None:
        self._named = parse_backends(spec)
        self.used: dict[str, str] = {}

    def check(self, kinds: tuple[str, ...], what: str) -> None:
        """``InputError`` for a named backend that does none of these kinds of work."""
        for name in self._named:
            if not any(backend.name == name and backend.kind in kinds for backend in BACKENDS):
                fitting = ", ".join(dict.fromkeys(b.name for b in BACKENDS if b.kind in kinds)) or "none"
                raise InputError(f"{what} has no use for the backend {name}: it can use {fitting}")

    def __call__(self, kind: str) -> Callable[..., Any]:
        """The function for a kind of work. ``MissingDependencyError`` when nothing can do it."""
        able = [backend for backend in BACKENDS if backend.kind == kind]
        chosen = next((b for b in able if b.name in self._named), None) or next((b for b in able if b.there()), None)
        if chosen is None:
            raise MissingDependencyError(_nothing_there(kind, able))
        place = self._named.get(chosen.name)
        where = place or (local_model(chosen.name) or chosen.model if chosen.model else "")
        self.used[kind] = f"{chosen.name} ({where})" if where else chosen.name
        return _loaded(chosen, place)


def _nothing_there(kind: str, able: list[Backend]) -> str:
    ways = []
    for backend in able:
        if backend.model:
            ways.append(
                f"put {backend.model} into models/annotators/{backend.name}, "
                f"or let --backend {backend.name} fetch it from the Hub"
            )
        else:
            ways.append(f"`{backend.install}` and --backend {backend.name}")
    return f"{kind} cannot be had without a trained model, and none is there: " + "; or ".join(ways)
