"""The procedural world as training data: rendered and encoded when first asked for, then kept in memory."""

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vdot.data.batch import Example, Shape
from vdot.data.decoding import Pixels, pixels_of
from vdot.data.manifest import Entry, Row
from vdot.data.sprites import TASKS, TaskClip, count_references, draw_task
from vdot.data.sprites.scene import VIEWS
from vdot.errors import ConfigError
from vdot.request import Defaults, Request, prepare

if TYPE_CHECKING:
    from vdot.data.encoding import Encoder


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
    view: str = "far"  # far | near: how large things appear

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ConfigError(f"the world has no task {unknown[0]!r}: its tasks are {', '.join(TASKS)}")
        if self.size % 16 or self.frames % 4 != 1 or self.split not in ("train", "test"):
            raise ConfigError("world: size must be a multiple of 16, frames 4k + 1, split train or test")
        if self.view not in VIEWS:
            raise ConfigError(f"world: no view {self.view!r}: use one of {', '.join(VIEWS)}")


def world_rows(config: WorldConfig) -> tuple[list[str], list[Shape]]:
    """Task and shape of every clip; nothing is rendered."""
    names = config.tasks or list(TASKS)
    tasks = [names[i % len(names)] for i in range(config.clips)]
    grid = ((config.frames - 1) // 4 + 1, config.size // 8, config.size // 8)
    options = scene_options(config)
    references = [count_references(config.seed + i, task, **options) for i, task in enumerate(tasks)]
    return tasks, [Shape(count, *grid) for count in references]


def scene_options(config: WorldConfig) -> dict[str, Any]:
    """As ``draw_task`` takes them."""
    size = {"frames": config.frames, "width": config.size, "height": config.size}
    return {"split": config.split, "view": config.view, **size}


def draw_clip(config: WorldConfig, index: int, task: str) -> TaskClip:
    """Clip ``index``: scene ``seed + index`` as ``task``."""
    return draw_task(config.seed + index, task, **scene_options(config))


def draw_pixels(config: WorldConfig, index: int, task: str) -> Pixels:
    """What is encoded of a clip, and its words."""
    clip = draw_clip(config, index, task)
    return replace(pixels_of(prepare(Request(**clip.request()), Defaults()), clip.video), prompt=clip.prompt)


class WorldSource:
    """Clip ``i`` shows scene ``seed + i`` as one of the tasks, in turn."""

    def __init__(self, config: WorldConfig, encoder: "Encoder", negative_prompt: str) -> None:
        self.config, self.encoder = config, encoder
        self.tasks, self.shapes = world_rows(config)
        self.paired = [True] * config.clips
        self.identity = repr(asdict(config))
        self._negative = negative_prompt
        self._kept: OrderedDict[int, Example] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.config.clips

    def load(self, index: int) -> Example:
        with self._lock:
            if index in self._kept:
                return self._kept[index]
        pixels = draw_pixels(self.config, index, self.tasks[index])
        entry = Entry(Row(index, self.tasks[index], pixels.prompt or ""), self.shapes[index])
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
