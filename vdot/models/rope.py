"""Rotary position embedding over (frame, row, column): one pass over the data eagerly, real arithmetic compiled.

A head of width d gives ``d - 4 floor(d/6)`` channels to time and ``2 floor(d/6)`` to each of height and width; on an
axis of width w, adjacent channels (2j, 2j+1) rotate by ``position * 10000^(-2j/w)`` (Su et al. 2021; Wan2.1).
"""

from functools import lru_cache

import torch
from torch import Tensor

Rope = Tensor  # (cos, sin) in the last axis, [1, L, 1, head_dim / 2, 2], float32
THETA = 10000.0


@lru_cache(maxsize=32)
def rope_table(head_dim: int, grid: tuple[int, int, int], device: torch.device | str = "cpu") -> Rope:
    """Angles of every token of a ``(frames, rows, columns)`` grid, computed in float64 and rounded once."""
    spatial = 2 * (head_dim // 6)
    axes = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * spatial, spatial, spatial), strict=True)):
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angle = torch.outer(torch.arange(size, dtype=torch.float64), THETA**-exponent)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        axes.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(axes, dim=-1).reshape(1, -1, 1, head_dim // 2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float().to(device)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate ``x [B, L, N, D]`` by the table; computed and returned in float32."""
    x = x.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # a complex product is a single kernel: seven to ten times faster on a CPU
        return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(rope)).flatten(-2)
    (even, odd), (cos, sin) = x.unbind(-1), rope.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
