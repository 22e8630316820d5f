"""The three networks of a checkpoint as configurations, from headers alone."""

from pathlib import Path
from typing import Any

from vdot.checkpoints.layouts import find_layout, location
from vdot.checkpoints.loading import read_headers
from vdot.checkpoints.shapes import dit_config, umt5_config, vae_config
from vdot.models.presets import DitConfig


def network_configs(path: str | Path) -> tuple[DitConfig, Any, dict[str, Any]]:
    """-> our ``DitConfig``, transformers' ``UMT5Config``, and the arguments of diffusers' ``AutoencoderKLWan``.

    Raises:
        CheckpointError: a network is missing, unreadable or of another model.
    """
    layout = find_layout(path)
    dit, text, vae = (read_headers(part, location(layout, part)) for part in ("dit", "text_encoder", "vae"))
    return (
        dit_config(dit.shapes, dit.config, dit.where, layout.text_len),
        umt5_config(text.shapes, text.config, text.where),
        vae_config(vae.shapes, vae.config, vae.where),
    )
