"""What objectives with one small network have in common: it is whole on every rank, and ranks share the batch."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vdot.errors import ConfigError
from vdot.parallel.mesh import Group
from vdot.parallel.state import Ranks
from vdot.runtime import DTYPES
from vdot.training.config import TrainConfig
from vdot.training.networks import Trained
from vdot.training.objectives import State, Updater
from vdot.training.optim import Ema, Guard


class WholeNetwork:
    """Optimizer, average, guard and state of one network."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.guard = Guard(config.max_bad_steps)
        self.everyone = Group(ranks.world, ranks.rank, dist.group.WORLD if ranks.world > 1 else None)
        if config.batch_size % ranks.world:
            raise ConfigError(f"batch_size {config.batch_size} must be a multiple of the {ranks.world} processes")

    def optimize(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """These, by name, under the optimizer ``config.generator``."""
        config = self.config
        trained = Trained(dict(parameters), [], list(parameters.values()), self.everyone)
        self.updater = Updater("generator", trained, config.generator, config, self.guard)
        self.ema = Ema(parameters, config.ema_decay, config.ema_start) if config.ema_decay else None

    def averaged(self, module: nn.Module) -> AbstractContextManager:
        """``module`` with the moving averages as its weights, where there are any."""
        return self.ema.swapped(module) if self.ema is not None else nullcontext()

    def autocast(self) -> AbstractContextManager:
        """Matrix products in ``parallel.compute``."""
        kind = DTYPES[self.config.parallel.compute]
        return nullcontext() if kind == torch.float32 else torch.autocast(self.device.type, kind)

    def due(self, every: int, step: int) -> bool:
        """Whether something that is done every ``every`` steps (0: never) follows step ``step``, the first being 0."""
        return bool(every) and (step + 1) % every == 0

    def state(self) -> State:
        return self.updater.state() | ({"ema": self.ema.state()} if self.ema is not None else {})

    def notes(self) -> dict[str, Any]:
        return {}
