"""What an autoencoder sees of the procedural world: its clips, and all that VACE has encoded beside them.

Sources split into what is kept and what changes, controls, grey where nothing is known, references on white. Batch
``n`` is a function of the settings and of ``n`` alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vdot.conditioning import split_clips
from vdot.data.sprites import TASKS, draw_task
from vdot.data.world import WorldConfig
from vdot.request import Defaults, Request, prepare
from vdot.video import to_model

FLAT = 0.05  # of the range 2: there is nothing to be seen
STILL_FRAMES = 5  # rendered for a picture, one of which is taken: a whole motion, cheaply


@dataclass(frozen=True)
class Pictures:
    """``pixels [B, 3, T, H, W]`` in [-1, 1], float32; ``number`` of the batch in the run."""

    pixels: Tensor
    number: int

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> "Pictures":
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))


def draw_clip(world: WorldConfig, number: int, frames: int, condition: bool) -> Tensor:
    """Clip ``number`` of the world ``[3, frames, size, size]``: a real one, or something that a task encodes.

    References come as pictures only, as VACE has them. A clip of one grey is all alike, so where a task has nothing
    else it is a plain colour instead.
    """
    rng = np.random.default_rng((world.seed, number, world.split == "test", 2))
    names = world.tasks or TASKS
    rendered = world.frames if frames > 1 else STILL_FRAMES
    size = {"frames": rendered, "width": world.size, "height": world.size}
    task = draw_task(world.seed + number, names[int(rng.integers(len(names)))], split=world.split, **size)  # type: ignore[arg-type]
    if condition:
        parts, _ = split_clips(prepare(Request(**task.request()), Defaults()).condition)
    else:
        parts = [to_model(task.video)]
    windows = [_window(part, frames, rng) for part in parts if part.shape[1] >= frames]
    seen = [window for window in windows if window.amax() - window.amin() > FLAT]
    if seen:
        return seen[int(rng.integers(len(seen)))]
    return torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1, 1))).float().expand(3, frames, world.size, world.size)


def _window(clip: Tensor, frames: int, rng: np.random.Generator) -> Tensor:
    start = int(rng.integers(clip.shape[1] - frames + 1))
    return clip[:, start : start + frames]


class PictureFeeder:
    """Iterator of one rank's part of each batch, drawn ahead in threads.

    Batches take the lengths of ``lengths`` in turn, and as many clips as make up ``batch_size`` of the longest; of
    these the share ``conditions`` is not real clips.
    """

    def __init__(
        self, world: WorldConfig, lengths: Sequence[int], conditions: float, batch_size: int, rank: int, ranks: int
    ) -> None:
        """``batch_size`` over all ranks; a multiple of ``ranks``."""
        self.world, self.lengths, self.conditions = world, tuple(lengths), conditions
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks

    @contextmanager
    def batches(self, start: int, workers: int, prefetch: int) -> Iterator[Iterator[Pictures]]:
        """From batch ``start`` on, without end."""
        with ThreadPoolExecutor(max(1, workers), "vdot-pictures") as pool:
            try:
                yield self._ahead(pool, start, prefetch)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(self, pool: ThreadPoolExecutor, start: int, prefetch: int) -> Iterator[Pictures]:
        ahead: deque[Future[Pictures]] = deque()
        number = start
        while True:
            while len(ahead) <= prefetch:
                ahead.append(pool.submit(self.draw, number))
                number += 1
            yield ahead.popleft().result()

    def draw(self, number: int) -> Pictures:
        """This rank's part of batch ``number``."""
        longest, frames = max(self.lengths), self.lengths[number % len(self.lengths)]
        count = max(1, self.batch_size // self.ranks * longest // frames)
        first = number * self.batch_size * longest + self.rank * count
        # Spread evenly over the clips of the run, whatever a batch has room for.
        share = [int((n + 1) * self.conditions) > int(n * self.conditions) for n in range(first, first + count)]
        clips = [draw_clip(self.world, first + i, frames, share[i]) for i in range(count)]
        return Pictures(torch.stack(clips), number)
