"""VaceDiT: the Wan2.1 backbone with the VACE hint branch (Jiang et al. 2025, arXiv 2503.07598)."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from vdot.models.dit import (
    Block,
    EmbeddedText,
    Features,
    Head,
    Linear32,
    PatchEmbedding,
    dtype_of,
    padding_bias,
    sinusoid,
)
from vdot.models.presets import DitConfig
from vdot.models.rope import Rope, rope_table

PADDING_ROWS = 4  # biased rows that stand for all text padding (see padding_bias)
TEXT_BUCKET = 32  # kept text rows are rounded up to this, so that few lengths are ever compiled


class VaceBlock(Block):
    """A backbone block that also emits a hint; the first one merges the condition with the video tokens."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, first: bool) -> None:
        super().__init__(dim, ffn_dim, num_heads, eps)
        if first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)

    def enter(self, c: Tensor, tokens: Tensor) -> Tensor:
        """``[B, L, C]`` condition tokens + video tokens -> what the first branch block works on."""
        return self.before_proj(c.to(self.before_proj.weight.dtype)) + tokens

    def branch(self, c: Tensor, mod: Tensor, rope: Rope, text: EmbeddedText) -> tuple[Tensor, Tensor]:
        """-> the next branch state and the hint, both ``[B, L, C]``."""
        c = super().forward(c, mod, rope, text)
        return c, self.after_proj(c.to(self.after_proj.weight.dtype))

    def forward(  # type: ignore[override]
        self, c: Tensor, mod: Tensor, rope: Rope, text: EmbeddedText, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # All parameters are used inside forward, so that hooks (offloading, FSDP) see one call per block.
        return self.branch(c if tokens is None else self.enter(c, tokens), mod, rope, text)


class Run(nn.Module):
    """Calls a block. Training puts one here that forgets activations and computes them again."""

    def forward(self, block: nn.Module, *args: Any) -> Any:
        return block(*args)


class VaceDiT(nn.Module):
    """Velocity of noisy video latents under a text prompt and a VACE context.

    ``scatter`` and ``gather`` (and each self-attention's ``attend``) are parameterless seams: identities here, replaced
    by ``vdot.parallel`` to split the token axis (dim 1 of what they get) over ranks. ``run`` calls each block.
    """

    # Name fragments of the parameters that stay float32 when the rest is stored in half precision.
    FLOAT32_ISLANDS = ("modulation", "norm", "time_embedding", "time_projection", "head.")

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        dim, args = config.dim, (config.dim, config.ffn_dim, config.num_heads, config.eps)
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleList([Block(*args) for _ in range(config.num_layers)])
        self.head = Head(dim, config.out_dim * math.prod(config.patch_size), config.eps)
        self.vace_patch_embedding = PatchEmbedding(config.vace_in_dim, dim, config.patch_size)
        self.vace_blocks = nn.ModuleList([VaceBlock(*args, first=i == 0) for i in range(len(config.vace_layers))])
        self.scatter, self.gather, self.run = nn.Identity(), nn.Identity(), Run()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialisation for training from nothing: the output and both ends of the hint branch start at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | PatchEmbedding):
                zero = name.endswith(("before_proj", "after_proj", "head.head"))
                nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)

    def embed_text(self, text: Tensor, lengths: Sequence[int] | None = None) -> EmbeddedText:
        """Project ``text [B, L <= text_len, text_dim]``, zero beyond each prompt's length.

        The original attends to all ``text_len`` rows, padding included. With ``lengths`` given, only the real rows and
        a few biased padding rows are kept, which is the same function at a fraction of the work.
        """
        total = self.config.text_len
        if text.shape[1] > total:
            raise ValueError(f"text has {text.shape[1]} rows, this model takes at most {total}")
        bias, keep = None, total
        if lengths is not None:
            keep = min(total, TEXT_BUCKET * math.ceil((max(lengths) + PADDING_ROWS) / TEXT_BUCKET))
            bias = padding_bias(tuple(lengths), keep, total).to(text.device) if keep < total else None
        text = nn.functional.pad(text[:, :keep], (0, 0, 0, max(0, keep - text.shape[1])))
        return EmbeddedText(self.text_embedding(text.to(dtype_of(self.text_embedding))), bias)

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``t [B]`` in [0, 1000] -> ``e [B, C]`` for the head and ``mod [B, 6, C]`` for the blocks, float32."""
        e = self.time_embedding(sinusoid(t, self.config.freq_dim).float())
        return e, self.time_projection(e).unflatten(1, (6, -1))

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        vace_context: Tensor | None = None,
        context_scale: float = 1.0,
        lengths: Sequence[int] | None = None,
        taps: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        vace_context: Tensor | None = None,
        context_scale: float = 1.0,
        lengths: Sequence[int] | None = None,
        *,
        taps: Collection[int],
    ) -> tuple[Tensor, Features]: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        vace_context: Tensor | None = None,
        context_scale: float = 1.0,
        lengths: Sequence[int] | None = None,
        taps: Collection[int] | None = None,
    ) -> Tensor | tuple[Tensor, Features]:
        """Predict the velocity ``noise - x0``.

        Args:
            x: noisy latents ``[B, 16, F, H, W]``, whole patches (the published models': H and W even).
            t: timesteps ``[B]`` in [0, 1000].
            text: prompt embeddings ``[B, L <= text_len, text_dim]``, zero past each prompt.
            vace_context: ``[B or 1, 96, F, H, W]``; ``None`` or ``context_scale=0`` leaves the hint branch out.
            context_scale: weight of the hints.
            lengths: rows of each prompt, if known: padding is then dropped, at the same result (:meth:`embed_text`).
            taps: numbers of blocks whose outputs ``[B, L, C]`` (hint included) are returned too, in block order.

        Returns:
            float32 velocity like ``x``; with ``taps``, the pair (velocity, features).

        Raises:
            ValueError: shapes that do not belong together.
        """
        self._check(x, vace_context)
        grid = self.config.grid(x.shape)
        rope: Rope = self.scatter(rope_table(self.config.head_dim, grid, x.device))
        prompt = self.embed_text(text, lengths)
        e, mod = self.embed_time(t)
        tokens = self.scatter(self.patch_embedding(x)).float()
        hints = self._branch(tokens, vace_context, mod, rope, prompt) if context_scale else None

        tapped: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            hint = next(hints) if hints is not None and i in self.config.vace_layers else None
            tokens = self.run(block, tokens, mod, rope, prompt)
            if hint is not None:
                tokens = torch.add(tokens, hint, alpha=context_scale)
            if taps is not None and i in taps:
                tapped.append(tokens)
        velocity = self._unpatchify(self.gather(self.head(tokens, e)), grid)
        return velocity if taps is None else (velocity, Features(tapped, e))

    def _branch(
        self, tokens: Tensor, context: Tensor | None, mod: Tensor, rope: Rope, text: EmbeddedText
    ) -> Iterator[Tensor] | None:
        """Hints in the order of ``vace_layers``, each computed when asked for: one is alive at a time, not all."""
        if context is None:
            return None
        c = self.scatter(self.vace_patch_embedding(context)).expand_as(tokens)

        def walk(c: Tensor) -> Iterator[Tensor]:
            first: Tensor | None = tokens
            for block in self.vace_blocks:
                c, hint = self.run(block, c, mod, rope, text, first)
                first = None
                yield hint

        return walk(c)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (f, h, w), (a, b, c) = grid, self.config.patch_size
        pattern = "n (f h w) (a b c d) -> n d (f a) (h b) (w c)"
        return rearrange(patches, pattern, f=f, h=h, w=w, a=a, b=b, c=c)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.in_dim:
            raise ValueError(f"latents must be [B, {self.config.in_dim}, F, H, W], got {tuple(x.shape)}")
        if context is not None and context.shape[1:] != (self.config.vace_in_dim, *x.shape[2:]):
            want = (self.config.vace_in_dim, *x.shape[2:])
            raise ValueError(f"vace_context must be [B, {', '.join(map(str, want))}], got {tuple(context.shape)}")
