"""Real or made: one logit per video from a critic's inner features (VDOT, arXiv 2512.06802, adversarial branch).

At three depths a learned register token attends to all video tokens; what the three have seen, and the time embedding,
decide. Attribute names equal those of the release's training checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdot.models.dit import CrossAttention, EmbeddedText, LayerNorm, RMSNorm

TIME_SCALE = 10.0  # of the time embedding beside the features


class Projection(nn.Module):
    """Norm, two linear layers with GELU between, norm."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, in_dim),
            nn.GELU(),
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class RegisterTokens(nn.Module):
    """One query per tap, ``[taps, D]``, RMS-normed."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(count, dim) / dim**0.5)
        self.rms_norm = RMSNorm(dim, 1e-6)

    def forward(self) -> Tensor:
        return self.rms_norm(self.register_tokens)


class TapHead(nn.Module):
    """``token [B, 1, D]`` looks at ``features [B, L, C]`` and reports ``[B, 1, C]``."""

    def __init__(self, dim: int, inner: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj1 = Projection(dim, inner)
        self.cross_attn = CrossAttention(inner, num_heads, 1e-6)
        self.norm = LayerNorm(inner, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(inner, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, inner))
        self.proj2 = Projection(inner, dim)

    def forward(self, token: Tensor, features: Tensor) -> Tensor:
        token = token + self.cross_attn(token, EmbeddedText(self.proj1(features), None))
        return self.proj2(token + self.ffn(self.norm(token)))


class Discriminator(nn.Module):
    """Logit ``[B]`` of a video being real, from features of ``VaceDiT(..., taps=...)``. Runs in float32.

    Args:
        dim: width of the features.
        inner: width of the register tokens and of the attention.
        time: whether the time embedding is judged along with the features.
    """

    def __init__(
        self, dim: int, *, taps: int = 3, inner: int = 512, num_heads: int = 8, ffn_dim: int = 13824, time: bool = True
    ) -> None:
        super().__init__()
        self.time = time
        width = dim * (taps + time)
        self._register_tokens = RegisterTokens(taps, inner)
        self._gan_ca_blocks = nn.ModuleList([TapHead(dim, inner, num_heads, ffn_dim) for _ in range(taps)])
        self._cls_pred_branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, tokens: Sequence[Tensor], time: Tensor) -> Tensor:
        """``tokens``: one ``[B, L, C]`` per tap, all of a video's own tokens and no padding; ``time [B, C]``."""
        registers = self._register_tokens()
        seen = [
            head(registers[i].expand(len(x), 1, -1), x.float())[:, 0]
            for i, (head, x) in enumerate(zip(self._gan_ca_blocks, tokens, strict=True))
        ]
        if self.time:
            seen.append(TIME_SCALE * time.float())
        return self._cls_pred_branch(torch.cat(seen, dim=-1))[:, 0]
