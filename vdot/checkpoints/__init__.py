"""Every published layout in, every useful layout out; strict."""

from vdot.checkpoints.inspection import CheckpointInfo, PartInfo, inspect_checkpoint
from vdot.checkpoints.loading import load_dit, load_text_encoder, load_vae
from vdot.checkpoints.saving import save_checkpoint

__all__ = [
    "CheckpointInfo",
    "PartInfo",
    "inspect_checkpoint",
    "load_dit",
    "load_text_encoder",
    "load_vae",
    "save_checkpoint",
]
