"""The procedural world as training data: rendered and encoded when first asked for, then kept in memory."""

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field

from torch import Tensor

from vdot.data.batch import Example, Shape
from vdot.data.decoding import pixels_of
from vdot.data.encoding import Encoder
from vdot.data.manifest import Entry, Row
from vdot.data.sprites import TASKS, TaskClip, count_references, draw_task
from vdot.data.sprites.scene import Split
from vdot.errors import ConfigError
from vdot.request import Defaults, Request, prepare


@dataclass
class WorldConfig:
    """Which clips of the world. They are a function of these values and nothing else."""

    clips: int = 0  # 0: the world is not used
    size: int = 64  # pixels, width and height, a multiple of 16
    frames: int = 17  # 4k + 1
    tasks: list[str] = field(default_factory=list)  # none named: all
    seed: int = 0
    split: str = "train"  # train | test: no scene of one is in the other
    keep: int = 4096  # encoded examples that stay in memory

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ConfigError(f"the world has no task {unknown[0]!r}: its tasks are {', '.join(TASKS)}")
        if self.size % 16 or self.frames % 4 != 1 or self.split not in ("train", "test"):
            raise ConfigError("world: size must be a multiple of 16, frames 4k + 1, split train or test")


def world_rows(config: WorldConfig) -> tuple[list[str], list[Shape]]:
    """Task and shape of every clip; nothing is rendered."""
    names = config.tasks or list(TASKS)
    tasks = [names[i % len(names)] for i in range(config.clips)]
    grid = ((config.frames - 1) // 4 + 1, config.size // 8, config.size // 8)
    split, size = _split(config.split), _size(config)
    references = [count_references(config.seed + i, task, split, **size) for i, task in enumerate(tasks)]
    return tasks, [Shape(count, *grid) for count in references]


def _size(config: WorldConfig) -> dict[str, int]:
    return {"frames": config.frames, "width": config.size, "height": config.size}


class WorldSource:
    """Clip ``i`` shows scene ``seed + i`` as one of the tasks, in turn."""

    def __init__(self, config: WorldConfig, encoder: Encoder, negative_prompt: str) -> None:
        self.config, self.encoder = config, encoder
        self.tasks, self.shapes = world_rows(config)
        self.paired = [True] * config.clips
        self.identity = repr(asdict(config))
        self._negative = negative_prompt
        self._kept: OrderedDict[int, Example] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.config.clips

    def clip(self, index: int) -> TaskClip:
        c = self.config
        return draw_task(c.seed + index, self.tasks[index], _split(c.split), **_size(c))

    def load(self, index: int) -> Example:
        with self._lock:
            if index in self._kept:
                return self._kept[index]
        clip = self.clip(index)
        pixels = pixels_of(prepare(Request(**clip.request()), Defaults()), clip.video)
        entry = Entry(Row(index, clip.task, clip.prompt), self.shapes[index])
        example = self.encoder.encode(entry, pixels, index)
        with self._lock:
            self._kept[index] = example
            while len(self._kept) > self.config.keep:
                self._kept.popitem(last=False)
        return example

    def negative(self) -> Tensor:
        return self.encoder.embed(self._negative)

    def close(self) -> None:
        """Nothing is open."""


def _split(name: str) -> Split:
    return "test" if name == "test" else "train"
