"""Activations forgotten in the forward pass and computed again in the backward pass (Chen et al. 2016, 1604.06174)."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vdot.models.vace import Run, VaceDiT

# What "selective" keeps: attention costs most to compute again, and its result is one tensor of the stream's width.
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
KEPT = {getattr(torch.ops.aten, name).default for name in _ATTENTION if hasattr(torch.ops.aten, name)}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Recompute(Run):
    """Runs a block so that its backward pass starts from its inputs (``selective``: and from attention's results)."""

    def __init__(self, selective: bool) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
        if selective:
            self.options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forward(self, block: nn.Module, *args: Any) -> Any:
        return checkpoint(block, *args, **self.options) if torch.is_grad_enabled() else block(*args)


def recompute(dit: VaceDiT, mode: str) -> None:
    """``mode``: none, selective or full."""
    if mode != "none":
        dit.run = Recompute(mode == "selective")
