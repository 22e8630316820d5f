"""The Wan2.1 diffusion transformer: embeddings, block and head (Wan Team 2025, arXiv 2503.20314).

Attribute names equal the published checkpoint keys. Precision follows the original: the residual stream, norms,
rotation, modulation, time embedding and output head are float32; projections, attention and feed-forward run in the
dtype of their weights.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vdot.models.attention import Attend
from vdot.models.rope import Rope, apply_rope


class EmbeddedText(NamedTuple):
    """Projected prompt: ``tokens [B, S, C]`` and the ``bias [B, 1, 1, S]`` that gives padding its true weight."""

    tokens: Tensor
    bias: Tensor | None


class Features(NamedTuple):
    """What a critic sees: the output of each tapped block, ``tokens [B, L, C]``, and the time embedding ``[B, C]``."""

    tokens: list[Tensor]
    time: Tensor


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the full width, all heads together; float32 out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes and returns float32 whatever the dtype of its input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Linear32(nn.Linear):
    """A linear layer that computes in float32 even when its weights are stored in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype that a layer computes in: that of its first parameter."""
    return next(module.parameters()).dtype


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` with ``x [B, L, C]`` and ``shift, scale [B, 1, C]``."""
    return torch.addcmul(shift, x, 1 + scale)


class PatchEmbedding(nn.Conv3d):
    """Convolution with kernel = stride, as one matrix product: ``[B, c, F, H, W] -> [B, L, C]`` in (f, h, w) order."""

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.kernel_size
        x = rearrange(x, "n d (f a) (h b) (w c) -> n (f h w) (d a b c)", a=a, b=b, c=c)
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """Projections and norms of both kinds of attention."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attend = Attend()


class SelfAttention(Attention):
    """Attention among video tokens, q and k RMS-normed over the full width, then rotated."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:  # x [B, L, C]
        x = x.to(self.q.weight.dtype)
        q = apply_rope(self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1)), rope).to(x.dtype)
        k = apply_rope(self.norm_k(self.k(x)).unflatten(-1, (self.num_heads, -1)), rope).to(x.dtype)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return self.o(self.attend(q, k, v).flatten(-2))


class CrossAttention(Attention):
    """Video tokens attend to the prompt; no rotation. Its ``attend`` is local on every rank: text is never split."""

    def forward(self, x: Tensor, text: EmbeddedText) -> Tensor:  # x [B, L, C], text.tokens [B, S, C]
        dtype = self.q.weight.dtype
        x, tokens = x.to(dtype), text.tokens.to(dtype)
        q = self.norm_q(self.q(x)).to(dtype).unflatten(-1, (self.num_heads, -1))
        k = self.norm_k(self.k(tokens)).to(dtype).unflatten(-1, (self.num_heads, -1))
        v = self.v(tokens).unflatten(-1, (self.num_heads, -1))
        bias = None if text.bias is None else text.bias.to(dtype)
        return self.o(self.attend(q, k, v, bias).flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.norm2 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, mod: Tensor, rope: Rope, text: EmbeddedText) -> Tensor:
        """``x [B, L, C]`` float32, ``mod [B, 6, C]`` float32 -> ``[B, L, C]`` float32."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + mod).chunk(6, dim=1)
        x = torch.addcmul(x, self.self_attn(modulate(self.norm1(x), shift1, scale1), rope), gate1)
        x = x + self.cross_attn(self.norm3(x), text)
        y = modulate(self.norm2(x), shift2, scale2).to(dtype_of(self.ffn))
        return torch.addcmul(x, self.ffn(y), gate2)


class Head(nn.Module):
    """Final modulation and projection to patches, ``[B, L, C] -> [B, L, prod(patch) * out_dim]``."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head = Linear32(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / math.sqrt(dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # x [B, L, C], e [B, C] float32
        shift, scale = (self.modulation.float() + e.unsqueeze(1)).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """``[cos(t w_j), sin(t w_j)]``, ``w_j = 10000^(-j / (dim/2))``: ``[B] -> [B, dim]``, float64 where it exists."""
    dtype = torch.float32 if t.device.type == "mps" else torch.float64
    half = dim // 2
    w = torch.pow(10000, -torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = torch.outer(t.to(dtype), w)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@lru_cache(maxsize=64)
def padding_bias(lengths: tuple[int, ...], kept: int, total: int) -> Tensor:
    """Bias ``[B, 1, 1, kept]`` that makes the first ``kept`` of ``total`` text rows act like all of them.

    Every padded row holds the same key and value, so n of them contribute ``n e^s v`` to the softmax sums: a few rows
    with biases ``b_j`` do the same if ``sum_j e^(b_j) = n``. The b_j are peeled off greedily as bfloat16 numbers, so
    the sum is right to 1e-6 of n even when attention runs in bfloat16, where log(n) itself would be off by a percent.
    """
    return torch.stack([_padding_row(length, kept, total) for length in lengths])[:, None, None]


@lru_cache(maxsize=1024)
def _padding_row(length: int, kept: int, total: int) -> Tensor:
    bias, remainder = torch.zeros(kept), float(total - length)
    for column in range(length, kept):
        if remainder <= 1e-6 * (total - length):
            bias[column] = -torch.inf
            continue
        b = _bfloat16_below(math.log(remainder))
        bias[column] = b
        remainder -= math.exp(b)
    return bias


def _bfloat16_below(value: float) -> float:
    b = torch.tensor(value, dtype=torch.bfloat16)
    return b.item() if b.item() <= value else torch.nextafter(b, torch.tensor(-torch.inf, dtype=torch.bfloat16)).item()
