"""What an autoencoder sees of the procedural world: its clips, and all that VACE has encoded beside them.

Sources split into what is kept and what changes, controls, grey where nothing is known, references on white. Batch
``n`` is a function of the settings and of ``n`` alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vdot.conditioning import split_clips
from vdot.data.decoding import Workers
from vdot.data.sprites import TASKS, draw_task
from vdot.data.sprites.sprite import Track
from vdot.data.world import WorldConfig, scene_options
from vdot.errors import ConfigError
from vdot.request import Defaults, Request, prepare
from vdot.video import to_model

FLAT = 0.05  # of the range 2: there is nothing to be seen
STILL_FRAMES = 5  # rendered for a picture, one of which is taken: a whole motion, cheaply


@dataclass
class Stage:
    """A part of an autoencoder's training."""

    steps: int = 0  # the last stage takes what remains
    lengths: list[int] = field(default_factory=lambda: [1, 5, 17])  # frames; in turn, short clips in larger batches
    crop: int = 0  # pixels, width and height, cut out of the frames around a thing; 0: whole frames
    clips: int = 2  # of the longest length in a batch, over all ranks
    pieces: int = 1  # cut out of every clip that is rendered, each at its own time and place


@dataclass(frozen=True)
class Pictures:
    """``pixels [B, 3, T, H, W]`` in [-1, 1]; ``number`` of the batch in the run.

    Drawn in half precision (an error of a sixteenth of a grey level), which is what comes from other processes, and
    float32 from :meth:`to` on.
    """

    pixels: Tensor
    number: int

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> "Pictures":
        return replace(self, pixels=self.pixels.to(device, non_blocking=True).float())


def draw_clip(world: WorldConfig, number: int, frames: int, condition: bool) -> Tensor:
    """Clip ``number`` of the world ``[3, frames, size, size]``: a real one, or something that a task encodes.

    References come as pictures only, as VACE has them. A clip of one grey is all alike, so where a task has nothing
    else it is a plain colour instead.
    """
    return next(_windows(world, number, frames, condition))[0]


def _windows(world: WorldConfig, number: int, frames: int, condition: bool) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Pieces of a clip without end, and where its things are halfway through each: x and y in pixels ``[n, 2]``, none
    in a reference."""
    rng = np.random.default_rng((world.seed, number, world.split == "test", 2))
    names = world.tasks or TASKS
    rendered = world.frames if frames > 1 else STILL_FRAMES
    options = scene_options(replace(world, frames=rendered))
    task = draw_task(world.seed + number, names[int(rng.integers(len(names)))], **options)
    if condition:
        parts, _ = split_clips(prepare(Request(**task.request()), Defaults()).condition)
    else:
        parts = [to_model(task.video)]
    while True:
        windows: list[tuple[Tensor, np.ndarray]] = []
        for part in parts:
            if part.shape[1] < frames:
                continue
            start = int(rng.integers(part.shape[1] - frames + 1))
            things = task.scene.things if part.shape[1] == rendered else ()  # what else there is are references
            middle = [Track.of(thing, task.scene).centre[start + frames // 2] for thing in things]
            windows.append((part[:, start : start + frames], np.array(middle).reshape(-1, 2)))
        seen = [window for window in windows if window[0].amax() - window[0].amin() > FLAT]
        if seen:
            yield seen[int(rng.integers(len(seen)))]
        else:
            colour = torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1, 1))).float()
            yield colour.expand(3, frames, world.size, world.size), np.empty((0, 2))


def _corner(things: np.ndarray, size: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """Of a crop (x, y) that has one of ``things [n, 2]`` well inside; anywhere where there is none."""
    if not len(things):
        x, y = rng.integers(size - crop + 1, size=2)
        return int(x), int(y)
    middle = things[int(rng.integers(len(things)))] + rng.uniform(-crop / 4, crop / 4, 2)
    x, y = np.clip(np.rint(middle - crop / 2), 0, size - crop)
    return int(x), int(y)


class PictureFeeder:
    """Iterator of one rank's part of each batch, drawn ahead.

    Batches take the lengths of their stage in turn, and as many clips as make up ``clips`` of the longest; of these the
    share ``conditions`` is not real clips.
    """

    def __init__(
        self, world: WorldConfig, stages: Sequence[Stage], conditions: float, rank: int = 0, ranks: int = 1
    ) -> None:
        """ConfigError when a stage does not fit the world, or its clips the ranks."""
        check_stages(stages, world, ranks)
        self.world, self.stages, self.conditions = world, tuple(stages), conditions
        self.rank, self.ranks = rank, ranks
        self.most = max(stage.clips * max(stage.lengths) for stage in stages)

    @contextmanager
    def batches(self, start: int, workers: int, prefetch: int) -> Iterator[Iterator[Pictures]]:
        """From batch ``start`` on, without end, drawn in ``workers`` processes; with none, in a thread of this one."""
        processes = Workers(self.draw, workers)
        with ThreadPoolExecutor(max(1, workers), "vdot-pictures") as pool:
            try:
                yield self._ahead(partial(pool.submit, processes.call), start, max(prefetch, workers))
            finally:
                processes.close()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(self, submit: Callable[[int], Future[Pictures]], start: int, prefetch: int) -> Iterator[Pictures]:
        ahead: deque[Future[Pictures]] = deque()
        number = start
        while True:
            while len(ahead) <= prefetch:
                ahead.append(submit(number))
                number += 1
            yield ahead.popleft().result()

    def stage(self, number: int) -> Stage:
        """Of batch ``number``."""
        for stage in self.stages[:-1]:
            if number < stage.steps:
                return stage
            number -= stage.steps
        return self.stages[-1]

    def draw(self, number: int) -> Pictures:
        """This rank's part of batch ``number``."""
        stage = self.stage(number)
        frames = stage.lengths[number % len(stage.lengths)]
        count = max(1, stage.clips // self.ranks * max(stage.lengths) // frames)
        rendered = math.ceil(count / stage.pieces)
        first = number * self.most + self.rank * rendered
        pieces = [piece for i in range(rendered) for piece in self._pieces(first + i, frames, stage)]
        return Pictures(torch.stack(pieces[:count]).half(), number)

    def _pieces(self, number: int, frames: int, stage: Stage) -> Iterator[Tensor]:
        # Spread evenly over the clips of the run, whatever a batch has room for.
        condition = int((number + 1) * self.conditions) > int(number * self.conditions)
        rng = np.random.default_rng((self.world.seed, number, 4))
        for clip, things in islice(_windows(self.world, number, frames, condition), stage.pieces):
            if not stage.crop:
                yield clip
                continue
            left, top = _corner(things, self.world.size, stage.crop, rng)
            yield clip[..., top : top + stage.crop, left : left + stage.crop]


def check_stages(stages: Sequence[Stage], world: WorldConfig, ranks: int) -> None:
    """``ConfigError`` names the first thing that does not fit."""
    if not stages or any(stage.steps < 1 for stage in stages[:-1]):
        raise ConfigError("vae.stages must be at least one, and all but the last must have their number of steps")
    for stage in stages:
        wrong = [frames for frames in stage.lengths if frames < 1 or frames % 4 != 1 or frames > world.frames]
        if wrong or not stage.lengths:
            raise ConfigError(
                f"a stage's lengths must be frame counts 4k + 1 of at most world.frames = {world.frames}, "
                f"got {stage.lengths}"
            )
        if stage.crop % 8 or not 0 <= stage.crop <= world.size:
            raise ConfigError(f"a stage's crop must be a multiple of 8 of at most {world.size}, got {stage.crop}")
        if stage.pieces < 1:
            raise ConfigError(f"a stage's pieces must be at least 1, got {stage.pieces}")
        if stage.clips < 1 or stage.clips % ranks:
            raise ConfigError(f"a stage's clips must be a multiple of the {ranks} processes, got {stage.clips}")
