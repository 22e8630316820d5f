"""How the processes are laid out: videos x ring x ulysses, and what one of them exchanges with its neighbours.

``rank = (video * ring + r) * ulysses + u``: ranks that share heads are next to each other, so that the all-to-all
stays on the fast links of one machine and the ring, which overlaps with attention, crosses between machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vdot.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Some ranks and one's place among them. Without a process group it is this process alone."""

    size: int = 1
    rank: int = 0
    process_group: Any = field(default=None, repr=False)

    def split(self, total: int) -> list[int]:
        """Near-equal shares of ``total`` things, the larger ones first: 12 heads on 8 ranks are 2 2 2 2 1 1 1 1."""
        return [total // self.size + (i < total % self.size) for i in range(self.size)]

    def span(self, total: int) -> tuple[int, int]:
        """[start, stop) of this rank's share."""
        stops = list(accumulate(self.split(total)))
        return stops[self.rank] - self.split(total)[self.rank], stops[self.rank]

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send flat ``parts[i]`` to rank i and return the flat tensors of ``sizes[i]`` elements that came from it."""
        if self.process_group is None:
            return list(parts)
        sent = [part.numel() for part in parts]
        return list(self.all_to_all(torch.cat(list(parts)), sent, list(sizes)).split(list(sizes)))

    def all_to_all(self, flat: Tensor, sent: list[int], sizes: list[int]) -> Tensor:
        """``flat``, cut into ``sent[i]`` elements for rank i -> flat, ``sizes[i]`` elements from rank i."""
        out = flat.new_empty(sum(sizes))
        dist.all_to_all_single(out, flat, sizes, sent, group=self.process_group)
        return out


@dataclass(frozen=True)
class Mesh:
    """The groups of one process. ``sequence`` is ring x ulysses: the ranks that make one video together."""

    videos: Group = field(default_factory=Group)
    ring: Group = field(default_factory=Group)
    ulysses: Group = field(default_factory=Group)
    sequence: Group = field(default_factory=Group)
    device_mesh: DeviceMesh | None = field(default=None, repr=False)  # of ``sequence``, for FSDP
    host_mesh: DeviceMesh | None = field(default=None, repr=False)  # the same ranks' CPUs

    def describe(self) -> str:
        each = f"ulysses {self.ulysses.size} x ring {self.ring.size}"
        return each if self.videos.size == 1 else f"{self.videos.size} videos at once, each on {each}"


def choose_sizes(
    world: int,
    ulysses: int | None = None,
    ring: int | None = None,
    heads: int = 40,
    per_node: int | None = None,
    many_videos: bool = False,
) -> tuple[int, int]:
    """``(ulysses, ring)`` for ``world`` processes; what is ``None`` is chosen.

    A single video uses every process. With ``many_videos`` a product below ``world`` makes several at once, and with
    nothing given each process makes its own: no sequence parallelism is as efficient as none.

    Raises:
        ConfigError: sizes that do not make up ``world``.
    """
    for name, size in (("ulysses_size", ulysses), ("ring_size", ring)):
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    if ulysses is None and ring is None:
        return (1, 1) if many_videos else _balanced(world, heads, per_node or world)
    if ulysses is None or ring is None:
        given = ulysses or ring or 1
        other = 1 if many_videos else max(1, world // given)
        ulysses, ring = (given, other) if ring is None else (other, given)
    if world % (ulysses * ring) or (ulysses * ring != world and not many_videos):
        if world == 1:
            raise ConfigError(
                f"ulysses_size {ulysses} and ring_size {ring} need several processes: start with "
                f"torchrun --nproc_per_node={ulysses * ring}, or leave both out"
            )
        need = "must divide" if many_videos else "must be"
        raise ConfigError(
            f"ulysses_size {ulysses} x ring_size {ring} = {ulysses * ring} {need} the number of processes, {world}: "
            "leave both out and they are chosen"
        )
    return ulysses, ring


def _balanced(world: int, heads: int, per_node: int) -> tuple[int, int]:
    """Heads of equal number come first, then as much Ulysses as fits into a machine: it moves the fewest bytes."""
    divisors = [u for u in range(1, world + 1) if world % u == 0 and u <= min(heads, per_node)]

    def cost(u: int) -> tuple[float, int]:
        return -(-heads // u) * u / heads, -u

    best = min(divisors, key=cost)
    return best, world // best


def make_mesh(device_type: str, ulysses: int, ring: int) -> Mesh:
    """Groups for an initialised default process group; collective: every process calls it alike."""
    world = dist.get_world_size()
    videos = world // (ulysses * ring)
    fine = init_device_mesh(device_type, (videos, ring, ulysses), mesh_dim_names=("videos", "ring", "ulysses"))
    flat = (videos, ring * ulysses)
    coarse = init_device_mesh(device_type, flat, mesh_dim_names=("videos", "sequence"))
    host = coarse if device_type == "cpu" else init_device_mesh("cpu", flat, mesh_dim_names=("videos", "sequence"))

    def group(mesh: DeviceMesh, name: str) -> Group:
        part = mesh[name]
        alone = part.size() == 1
        return Group(part.size(), part.get_local_rank(), None if alone else part.get_group())

    return Mesh(
        group(coarse, "videos"),
        group(fine, "ring"),
        group(fine, "ulysses"),
        group(coarse, "sequence"),
        coarse["sequence"],
        host["sequence"],
    )
