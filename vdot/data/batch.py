"""What one training step reads: encoded examples of one shape, stacked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Grid of an example's latents. ``frames`` leaves the references out; all examples of a batch share one shape."""

    references: int
    frames: int
    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """``[16, R + F, H, W]``: what the networks see, reference frames in front."""
        return (16, self.references + self.frames, self.height, self.width)


@dataclass(frozen=True)
class Example:
    """One row of the table as the networks see it; references are leading latent frames of everything."""

    text: Tensor  # [L, text_dim], the prompt's own rows, no padding
    context: Tensor  # [96, R + F, H, W]
    real: Tensor | None  # [16, R + F, H, W]: reference latents, then the real clip's; None: the row has no clip
    references: int
    task: str
    prompt: str
    row: int  # its place in the source

    @property
    def shape(self) -> Shape:
        _, frames, height, width = self.context.shape
        return Shape(self.references, frames - self.references, height, width)


@dataclass(frozen=True)
class Batch:
    """Examples of one shape. ``numbers`` count samples over the whole run: random draws are keyed by them."""

    text: Tensor  # [B, longest prompt, text_dim], zero past each prompt
    lengths: tuple[int, ...]  # rows of each prompt
    context: Tensor  # [B, 96, R + F, H, W]
    real: Tensor | None  # [B, 16, R + F, H, W]
    references: int
    tasks: tuple[str, ...]
    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> Shape:
        _, _, frames, height, width = self.context.shape
        return Shape(self.references, frames - self.references, height, width)

    def to(self, device: torch.device) -> "Batch":
        real = None if self.real is None else self.real.to(device, non_blocking=True)
        return replace(
            self,
            text=self.text.to(device, non_blocking=True),
            context=self.context.to(device, non_blocking=True),
            real=real,
        )


def collate(examples: Sequence[Example], numbers: Sequence[int]) -> Batch:
    """Stack examples of one shape. ``real`` is there only if every example has one.

    Raises:
        ValueError: shapes differ.
    """
    shapes = {example.shape for example in examples}
    if len(shapes) != 1:
        raise ValueError(f"a batch takes examples of one shape, got {sorted(map(str, shapes))}")
    text = torch.nn.utils.rnn.pad_sequence([example.text for example in examples], batch_first=True)
    real = [example.real for example in examples if example.real is not None]
    return Batch(
        text=text,
        lengths=tuple(len(example.text) for example in examples),
        context=torch.stack([example.context for example in examples]),
        real=torch.stack(real) if len(real) == len(examples) else None,
        references=examples[0].references,
        tasks=tuple(example.task for example in examples),
        prompts=tuple(example.prompt for example in examples),
        rows=tuple(example.row for example in examples),
        numbers=tuple(numbers),
    )
