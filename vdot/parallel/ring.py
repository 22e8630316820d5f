"""Ring attention: queries stay, keys and values go round (Liu et al. 2023, 2310.01889), with exact gradients.

Each block's softmax is combined with the next by its log-sum-exp. The block kernels are PyTorch's own fused ones that
return it (flash attention, on CUDA and on the CPU), else a plain formulation. PyTorch's and diffusers' ring attention
build on the same kernels but demand equal blocks; ours may differ by a token.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vdot.parallel.mesh import Group

# (out [B, N, Lq, D], log-sum-exp [B, N, Lq] float32) of q against one block of keys and values, all [B, N, L, D]
Block = tuple[Tensor, Tensor]
aten = torch.ops.aten


def plain_block(q: Tensor, k: Tensor, v: Tensor) -> Block:
    """Materialises the scores; for devices and widths without a fused kernel, and as the reference in tests."""
    scores = (q.float() @ k.float().mT) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v.float(), lse


def plain_block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    """Gradients of q, k, v for one block, given the **whole** ring's output and log-sum-exp."""
    q32, k32, v32, grad = (x.float() for x in (q, k, v, grad))
    scale = 1 / math.sqrt(q.shape[-1])
    p = ((q32 @ k32.mT) * scale - lse[..., None]).exp()
    ds = p * (grad @ v32.mT - (grad * out.float()).sum(-1, keepdim=True)) * scale
    return [ds @ k32, ds.mT @ q32, p.mT @ grad]


def _cpu_block(q: Tensor, k: Tensor, v: Tensor) -> Block:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _cpu_block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return list(kernel(grad, q, k, v, out.to(q.dtype), lse, 0.0, False))


def _cuda_block(q: Tensor, k: Tensor, v: Tensor) -> Block:
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _cuda_block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the random state of a dropout of 0
    lengths = (None, None, q.shape[2], k.shape[2])
    kernel = aten._scaled_dot_product_flash_attention_backward
    return list(kernel(grad, q, k, v, out.to(q.dtype), lse, *lengths, 0.0, False, unused, unused[:0]))


def block_kernels(q: Tensor) -> tuple[Callable[..., Block], Callable[..., list[Tensor]]]:
    """Forward and backward of one block, for tensors like ``q``."""
    if q.device.type == "cpu":
        return _cpu_block, _cpu_block_backward
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        return _cuda_block, _cuda_block_backward
    return plain_block, plain_block_backward


def _merge(out: Tensor, lse: Tensor, block: Block) -> Block:
    """Softmax over the union of two sets of keys, from the softmax over each; float32."""
    both = torch.logaddexp(lse, block[1])
    kept, added = (lse - both).exp()[..., None], (block[1] - both).exp()[..., None]
    return torch.addcmul(kept * out, block[0].float(), added), both


class _Turn:
    """A tensor on its way to the next rank of the ring while another comes in from the one before."""

    def __init__(self, x: Tensor, length: int, group: Group) -> None:
        self.incoming = x.new_empty(*x.shape[:-2], length, x.shape[-1])
        after, before = (dist.get_global_rank(group.process_group, (group.rank + i) % group.size) for i in (1, -1))
        ops = []
        if x.numel():
            ops.append(dist.P2POp(dist.isend, x.contiguous(), after, group.process_group))
        if self.incoming.numel():
            ops.append(dist.P2POp(dist.irecv, self.incoming, before, group.process_group))
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.incoming


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Group) -> Tensor:
        block, _ = block_kernels(q)
        out, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
        kv = torch.stack((k, v))
        for step in range(group.size):
            last = step == group.size - 1
            # The next block travels while this one is attended to.
            turn = None if last else _Turn(kv, lengths[(group.rank - step - 1) % group.size], group)
            if kv.numel() and q.numel():
                out, lse = _merge(out, lse, block(q, kv[0], kv[1]))
            kv = kv if turn is None else turn.wait()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.group = lengths, group
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, group = ctx.lengths, ctx.group
        _, block_backward = block_kernels(q)
        grad = grads[0].contiguous()
        dq, kv = torch.zeros_like(q, dtype=torch.float32), torch.stack((k, v))
        dkv = torch.zeros_like(kv, dtype=torch.float32)  # travels with its block and is home after a full round
        for step in range(group.size):
            length = lengths[(group.rank - step - 1) % group.size]
            turn = _Turn(kv, length, group)
            if kv.numel() and q.numel():
                parts = block_backward(grad, q, kv[0], kv[1], out, lse)
                dq += parts[0].float()
                dkv += torch.stack(parts[1:]).float()
            dkv = _Turn(dkv, length, group).wait()
            kv = turn.wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Group) -> Tensor:
    """q, k, v ``[B, my tokens, N, D]`` -> attention over the tokens of all ranks; ``lengths``: how many each has."""
    # The kernels' log-sum-exp is per [B, N, L]; contiguous blocks can be sent as they are.
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return _Ring.apply(q, k, v, lengths, group).transpose(1, 2)
