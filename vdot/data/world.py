"""The procedural world as training data: rendered and encoded when first asked for, then kept in memory."""

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from vdot.conditioning import encode_context
from vdot.data.batch import Example, Shape
from vdot.data.encoding import Encoder
from vdot.data.sprites import TASKS, TaskClip, draw_task
from vdot.errors import ConfigError
from vdot.request import Defaults, Request, prepare
from vdot.video import to_model


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


class WorldSource:
    """Clip ``i`` shows scene ``seed + i`` as one of the tasks, in turn."""

    def __init__(self, config: WorldConfig, encoder: Encoder, negative_prompt: str) -> None:
        self.config, self.encoder = config, encoder
        names = config.tasks or list(TASKS)
        self.tasks = [names[i % len(names)] for i in range(config.clips)]
        grid = ((config.frames - 1) // 4 + 1, config.size // 8, config.size // 8)
        self.shapes = [Shape(len(self.clip(i).references), *grid) for i in range(config.clips)]
        self.paired = [True] * config.clips
        self.identity = repr(asdict(config))
        self._negative = negative_prompt
        self._kept: OrderedDict[int, Example] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.config.clips

    def clip(self, index: int) -> TaskClip:
        c = self.config
        size = {"frames": c.frames, "width": c.size, "height": c.size}
        return draw_task(c.seed + index, self.tasks[index], split=c.split, **size)  # type: ignore[arg-type]

    def load(self, index: int) -> Example:
        with self._lock:
            if index in self._kept:
                return self._kept[index]
        example = encode_clip(self.clip(index), self.encoder, index)
        with self._lock:
            self._kept[index] = example
            while len(self._kept) > self.config.keep:
                self._kept.popitem(last=False)
        return example

    def negative(self) -> Tensor:
        return self.encoder.embed(self._negative)

    def close(self) -> None:
        """Nothing is open."""


@torch.no_grad()
def encode_clip(clip: TaskClip, encoder: Encoder, row: int) -> Example:
    """As inference encodes the same request; on the CPU."""
    condition = prepare(Request(**clip.request()), Defaults()).condition
    context = encode_context(encoder.vae, condition, encoder.device)[0].cpu()
    real = encoder.vae.encode(to_model(clip.video)[None].to(encoder.device))[0].float().cpu()
    references = len(clip.references)
    real = torch.cat([context[:16, :references], real], dim=1)
    return Example(encoder.embed(clip.prompt), context, real, references, clip.task, clip.prompt, row)
