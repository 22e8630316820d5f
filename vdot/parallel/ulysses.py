"""Sequence parallelism from outside: tokens over ranks, heads inside attention (Jacobs et al. 2023, 2309.14509).

Each rank holds a contiguous share of the tokens. Around self-attention an all-to-all turns "my tokens, all heads" into
"all tokens, my heads" and back; shares may differ by one token and one head, so nothing is padded and no padding is
attended to. A second axis, the ring, leaves the tokens split inside attention (:mod:`vdot.parallel.ring`).

Gradients. Every exchange is differentiated as the linear map that it is. If all ranks compute the same loss from the
gathered output, the **average** over ranks of a parameter's or an input's gradient is the one-process gradient: what
DDP and FSDP do by default, and :func:`average_gradients` where neither is used.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vdot.models.attention import Attend
from vdot.models.dit import SelfAttention
from vdot.models.vace import VaceDiT
from vdot.parallel.mesh import Group, Mesh
from vdot.parallel.ring import ring_attention

BUCKET = 2**24  # elements of one all-reduce of gradients


@dataclass
class TokenSplit:
    """Which tokens are whose: rank ``r * ulysses + u`` of the sequence group has the share of that number.

    ``length`` is set by ``scatter`` on each forward of the network. Gradient checkpointing that spans forwards of
    different lengths is the one use that this does not serve.
    """

    mesh: Mesh
    length: int = 0

    def shares(self) -> list[int]:
        return self.mesh.sequence.split(self.length)

    def ring_shares(self) -> list[list[int]]:
        """Token counts of the ulysses ranks in each ring block."""
        shares, n = self.shares(), self.mesh.ulysses.size
        return [shares[i : i + n] for i in range(0, len(shares), n)]


class _AllToAll(torch.autograd.Function):
    """Flat tensor cut into ``sent`` pieces, one per rank -> pieces of ``sizes``; backward sends them home."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], sizes: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.sizes, ctx.group = sent, sizes, group
        return group.all_to_all(flat.contiguous(), sent, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grads[0], ctx.sizes, ctx.sent, ctx.group), None, None, None


def _all_to_all(parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], group: Group) -> list[Tensor]:
    """Differentiable: ``parts[i]`` to rank i, tensors of ``shapes[i]`` from it."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.cat([part.reshape(-1) for part in parts])
    out = _AllToAll.apply(flat, [part.numel() for part in parts], sizes, group)
    return [piece.view(shape) for piece, shape in zip(out.split(sizes), shapes, strict=True)]


def tokens_to_heads(qkv: Tensor, tokens: list[int], group: Group) -> Tensor:
    """``[3, B, my tokens, N, D] -> [3, B, all tokens, my heads, D]``; ``tokens``: how many each rank has."""
    heads = group.split(qkv.shape[3])
    three, batch, _, _, width = qkv.shape
    shapes = [(three, batch, count, heads[group.rank], width) for count in tokens]
    return torch.cat(_all_to_all(list(qkv.split(heads, dim=3)), shapes, group), dim=2)


def heads_to_tokens(x: Tensor, tokens: list[int], num_heads: int, group: Group) -> Tensor:
    """``[B, all tokens, my heads, D] -> [B, my tokens, N, D]``."""
    batch, _, _, width = x.shape
    shapes = [(batch, tokens[group.rank], count, width) for count in group.split(num_heads)]
    return torch.cat(_all_to_all(list(x.split(tokens, dim=1)), shapes, group), dim=2)


class SequenceAttend(nn.Module):
    """Stands for one self-attention's ``Attend``: heads over the ulysses group, tokens around the ring."""

    def __init__(self, inner: Attend, split: TokenSplit) -> None:
        super().__init__()
        self.inner = inner
        self.split = split

    @torch.compiler.disable
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q, k, v ``[B, my tokens, N, D]`` -> ``[B, my tokens, N, D]``, attending to all tokens of all ranks."""
        if bias is not None:
            raise ValueError("self-attention over several ranks takes no bias")
        mesh, blocks = self.split.mesh, self.split.ring_shares()
        tokens, num_heads = blocks[mesh.ring.rank], q.shape[2]
        if mesh.ulysses.size > 1:
            q, k, v = tokens_to_heads(torch.stack((q, k, v)), tokens, mesh.ulysses).unbind(0)
        if mesh.ring.size > 1:
            out = ring_attention(q, k, v, [sum(block) for block in blocks], mesh.ring)
        else:
            out = self.inner(q, k, v) if q.shape[2] else q  # more ranks than heads: nothing to do here
        return heads_to_tokens(out, tokens, num_heads, mesh.ulysses) if mesh.ulysses.size > 1 else out


class Scatter(nn.Module):
    """``[B, L, ...]``, equal on all ranks -> this rank's tokens (or rows of the rotary table)."""

    def __init__(self, split: TokenSplit) -> None:
        super().__init__()
        self.split = split

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        self.split.length = x.shape[1]
        start, stop = self.split.mesh.sequence.span(x.shape[1])
        return x[:, start:stop]


class _AllGather(torch.autograd.Function):
    """``[B, my tokens, C] -> [B, L, C]`` on every rank; backward sums what the ranks ask of each share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: list[int], group: Group) -> Tensor:
        ctx.shares, ctx.group = shares, group
        batch, _, width = x.shape
        sizes = [batch * count * width for count in shares]
        pieces = group.exchange([x.reshape(-1)] * group.size, sizes)
        return torch.cat([p.view(batch, -1, width) for p in pieces], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad, mine = grads[0], ctx.shares[ctx.group.rank]
        parts = [part.reshape(-1) for part in grad.split(ctx.shares, dim=1)]
        wanted = ctx.group.exchange(parts, [grad.shape[0] * mine * grad.shape[2]] * ctx.group.size)
        return torch.stack(wanted).sum(0).view(grad.shape[0], mine, grad.shape[2]), None, None


class Gather(nn.Module):
    """This rank's ``[B, tokens, C]`` -> all ``[B, L, C]``, on every rank."""

    def __init__(self, split: TokenSplit) -> None:
        super().__init__()
        self.split = split

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return _AllGather.apply(x, self.split.shares(), self.split.mesh.sequence)


def parallelize(dit: VaceDiT, mesh: Mesh) -> Callable[[], None]:
    """Split ``dit``'s tokens over ``mesh.sequence``; returns the function that undoes it. One rank: nothing happens.

    Afterwards every rank calls ``dit`` with the same inputs and gets the whole velocity; features (``taps``) are its
    own tokens, for ``dit.gather`` to put together. Cross-attention stays local.
    """
    if mesh.sequence.size == 1:
        return lambda: None
    split = TokenSplit(mesh)
    seams = [m for m in dit.modules() if isinstance(m, SelfAttention)]
    before = dit.scatter, dit.gather, [seam.attend for seam in seams]
    dit.scatter, dit.gather = Scatter(split), Gather(split)  # type: ignore[assignment]
    for seam in seams:
        seam.attend = SequenceAttend(seam.attend, split)  # type: ignore[assignment]

    def undo() -> None:
        dit.scatter, dit.gather = before[0], before[1]
        for seam, attend in zip(seams, before[2], strict=True):
            seam.attend = attend

    return undo


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replace each gradient by its mean over ``group``, for parameters that neither DDP nor FSDP looks after.

    A parameter without a gradient has none on any rank. Small ones travel together.
    """
    if group.process_group is None:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group.process_group)
        flat /= group.size
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type, about BUCKET elements together."""
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + grad.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
