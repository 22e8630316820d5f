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
from vdot.parallel.mesh import Mesh, choose_sizes, make_mesh
from vdot.parallel.state import Ranks, Watchdog

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
def start_ranks(
    device: torch.device,
    ulysses: int | None = None,
    ring: int | None = None,
    heads: int = 40,
    many_videos: bool = False,
) -> Iterator[Ranks]:
    """Connect the processes that torchrun started; ``device`` is this one's own. Alone: nothing is connected.

    Raises:
        ConfigError: sizes that do not make up the number of processes; on all of them alike.
    """
    launch = Launch.from_environment()
    sizes = choose_sizes(launch.world, ulysses, ring, heads, launch.local_world, many_videos)
    if launch.world == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    watchdog = Watchdog(launch.rank, launch.world)
    watchdog.start()
    mesh = make_mesh(device.type, *sizes)
    ranks = Ranks(mesh, launch.rank, launch.world, control_group(mesh), watchdog)
    yield ranks
    # Only a rank that did well gets here; one that failed has reported, and ends without waiting for anyone.
    watchdog.finish()
    dist.destroy_process_group()


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
