"""Captions of the procedural world with what they say, as classes: the lesson of a small text encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vdot.data.sprites import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, caption, draw_scene
from vdot.data.sprites.scene import (
    ALL_MOTIONS,
    BACKDROP_COLOURS,
    MAX_THINGS,
    PATTERN_COLOURS,
    PATTERNS,
    SIZE_NAMES,
    STEPS,
    TURNS,
    Split,
)

ABSENT = -1  # the class of an attribute of a thing that is not there; ignored by losses and scores

SCENE_CLASSES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "first": ("", *BACKDROP_COLOURS),
    "second": ("", *BACKDROP_COLOURS),
    "camera": ("", *STEPS),
    "count": tuple(str(n + 1) for n in range(MAX_THINGS)),
}
THING_CLASSES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "worn": ("", *PATTERN_COLOURS),
    "size": SIZE_NAMES,
    "motion": ALL_MOTIONS,
    "direction": ("", *STEPS, *TURNS),
}
# Every attribute by name, of the scene and of the first, second and third thing that a caption mentions.
CLASSES: dict[str, tuple[str, ...]] = SCENE_CLASSES | {
    f"{name}_{i}": classes for i in range(MAX_THINGS) for name, classes in THING_CLASSES.items()
}


def attributes(scene: Scene) -> list[int]:
    """The class of every attribute in the order of :data:`CLASSES`."""
    background = scene.background
    said: dict[str, str] = {
        "background": background.kind,
        "first": background.first,
        "second": background.second,
        "camera": scene.camera,
        "count": str(len(scene.things)),
    }
    for i, thing in enumerate(scene.things):
        said |= {f"{name}_{i}": value for name, value in _of_thing(thing).items()}
    return [classes.index(said[name]) if name in said else ABSENT for name, classes in CLASSES.items()]


def _of_thing(thing: Thing) -> dict[str, str]:
    return {
        "shape": thing.shape,
        "colour": thing.colour,
        "pattern": thing.pattern,
        "worn": thing.second,
        "size": thing.size,
        "motion": thing.motion.kind,
        "direction": thing.motion.direction,
    }


@dataclass(frozen=True)
class Captions:
    """``B`` captions and ``classes [B, len(CLASSES)]``, int64."""

    texts: tuple[str, ...]
    classes: Tensor
    number: int  # of the batch in the run

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device) -> "Captions":
        return replace(self, classes=self.classes.to(device, non_blocking=True))


def draw_captions(seeds: Sequence[int], split: Split, number: int = 0) -> Captions:
    """One caption of the scene of each seed, in a phrasing drawn by the seed as well."""
    scenes = [draw_scene(seed, split) for seed in seeds]
    texts = [caption(scene, np.random.default_rng((seed, 3))) for seed, scene in zip(seeds, scenes, strict=True)]
    return Captions(tuple(texts), torch.tensor([attributes(scene) for scene in scenes]), number)


@contextmanager
def caption_batches(
    seed: int, split: Split, batch_size: int, start: int, rank: int, ranks: int
) -> Iterator[Iterator[Captions]]:
    """This rank's part of batch ``start`` and those after it, without end; no scene comes twice."""
    share = batch_size // ranks

    def batches() -> Iterator[Captions]:
        number = start
        while True:
            first = seed + number * batch_size + rank * share
            yield draw_captions(range(first, first + share), split, number)
            number += 1

    yield batches()
