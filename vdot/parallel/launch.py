"""From torchrun's environment to :class:`~vdot.parallel.state.Ranks`, and a clean end for all of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vdot.errors import ConfigError
from vdot.parallel.mesh import Mesh, make_mesh
from vdot.parallel.state import GENERATION, Board, Ranks, Watchdog

# The watchdog finds lost ranks within seconds; this bounds what it cannot see, ranks that wait for each other.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process; alone, a world of one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [os.environ.get(key, "") for key in keys]
        if not all(value.isdecimal() for value in values[:2]):
            if values[1] not in ("", "1"):
                raise ConfigError(f"WORLD_SIZE is {values[1]} but RANK is not set: start with torchrun, or unset both")
            return cls()
        rank, world = int(values[0]), int(values[1])
        return cls(rank, world, int(values[2] or 0), int(values[3] or world))


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """The accelerator of this process. ``ConfigError`` when there are more processes than GPUs."""
    if launch.world == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"several processes need CUDA devices or the CPU, not {device.type}: start without torchrun")
    count = torch.cuda.device_count()
    if launch.local_world > count:
        raise ConfigError(
            f"{launch.local_world} processes on a machine with {count} GPU(s): use --nproc_per_node={count}"
        )
    return torch.device("cuda", launch.local_rank)


@contextmanager
def connected() -> Iterator[Ranks]:
    """The processes that torchrun started, able to agree on errors; alone, nothing is connected.

    Leave the block normally only if this rank did well; otherwise call :func:`vdot.parallel.state.end_together`.
    """
    launch = Launch.from_environment()
    if launch.world == 1:
        yield Ranks()
        return
    gpu = torch.cuda.is_available() and launch.local_world <= torch.cuda.device_count()
    if gpu:
        torch.cuda.set_device(launch.local_rank)
    again: dict[str, Any] = {}
    if GENERATION in os.environ:  # torch's own keys in the launcher's store are taken by an earlier group
        again = {"store": Board("torch").store, "rank": launch.rank, "world_size": launch.world}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT, **again)
    watchdog = Watchdog(launch.rank, launch.world)
    watchdog.start()
    everyone = dist.new_group(backend="gloo", timeout=TIMEOUT)
    yield Ranks(Mesh(), launch.rank, launch.world, everyone, watchdog)
    watchdog.finish()
    dist.destroy_process_group()


def arrange(ranks: Ranks, device: torch.device, ulysses: int, ring: int) -> None:
    """Lay the connected processes out as videos x ring x ulysses. All call alike."""
    if ranks.world > 1:
        ranks.mesh = make_mesh(device.type, ulysses, ring)
        ranks.control = control_group(ranks.mesh)


def control_group(mesh: Mesh) -> Any:
    """A gloo group of this process's sequence group; collective over all processes. None for a rank by itself."""
    size, mine = mesh.sequence.size, None
    if size == 1:
        return None
    for first in range(0, dist.get_world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members, backend="gloo", timeout=TIMEOUT)
        if dist.get_rank() in members:
            mine = group
    return mine
