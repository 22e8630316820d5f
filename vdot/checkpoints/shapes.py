"""Sizes of a network, from its ``config.json`` where there is one and from its tensors' shapes for the rest."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vdot.errors import CheckpointError
from vdot.models.presets import DitConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128  # of every published Wan model: num_heads = dim / 128 where no config says otherwise

# diffusers' names of the DiT's sizes, where they differ from Wan's
DIFFUSERS_FIELDS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "vace_in_channels": "vace_in_dim",
}


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered blocks ``prefix.0``, ``prefix.1``, ... there are."""
    found = {int(m[1]) for key in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
    return max(found, default=-1) + 1


def dit_config(shapes: Shapes, config: Mapping[str, Any] | None, where: str, text_len: int | None) -> DitConfig:
    """``shapes`` by native names. A config in Wan's or in diffusers' names wins; its contradictions show up later."""
    if not any(key.startswith("vace_") for key in shapes):
        raise CheckpointError(f"{where} is a Wan2.1 transformer without the VACE branch, which cannot be used.")
    values = {name: value for name, value in _dit_sizes(shapes).items() if value is not None}
    if text_len:
        values["text_len"] = text_len
    names = {field.name for field in fields(DitConfig)}
    for key, value in (config or {}).items():
        name = DIFFUSERS_FIELDS.get(key, key)
        if name in names and value is not None:
            values[name] = value
    unknown = [name for name in ("dim", "ffn_dim", "num_layers", "vace_layers") if not values.get(name)]
    if unknown:
        raise CheckpointError(f"{where} lacks the tensors that tell its {', '.join(unknown)}, and has no config.json.")
    if "num_heads" not in values:
        if values["dim"] % HEAD_DIM:
            raise CheckpointError(
                f"{where} has width {values['dim']}, from which the number of heads does not follow: put a "
                "config.json with num_heads beside it."
            )
        values["num_heads"] = values["dim"] // HEAD_DIM
    try:
        return DitConfig(**values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"The config of {where} is not one of a VACE transformer: {error}.") from error


def _dit_sizes(shapes: Shapes) -> dict[str, Any]:
    """Every size that the tensors tell; ``None`` where the tensor is missing (the comparison will say so)."""

    def size(key: str, axis: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[axis] if axis < len(shape) else None

    patch = shapes.get("patch_embedding.weight", ())[2:] or (1, 2, 2)
    blocks, hints = count(shapes, "blocks"), count(shapes, "vace_blocks")
    head = size("head.head.weight", 0)
    return {
        "dim": size("patch_embedding.weight", 0),
        "in_dim": size("patch_embedding.weight", 1),
        "patch_size": patch,
        "ffn_dim": size("blocks.0.ffn.0.weight", 0),
        "num_layers": blocks,
        "text_dim": size("text_embedding.0.weight", 1),
        "freq_dim": size("time_embedding.0.weight", 1),
        "out_dim": head // math.prod(patch) if head else None,
        "vace_in_dim": size("vace_patch_embedding.weight", 1),
        "vace_layers": tuple(range(0, blocks, max(1, blocks // hints)))[:hints] if hints else None,
    }


def umt5_config(shapes: Shapes, config: Mapping[str, Any] | None, where: str) -> Any:
    """A transformers ``UMT5Config`` from tensors in transformers' names."""
    from transformers import UMT5Config

    block = "encoder.block.0.layer.0.SelfAttention"
    try:
        vocab_size, d_model = shapes["shared.weight"]
        buckets, heads = shapes[f"{block}.relative_attention_bias.weight"]
        inner = shapes[f"{block}.q.weight"][0]
        d_ff = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} lacks the tensors that tell the text encoder's sizes ({error}).") from error
    config = config or {}
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=inner // heads,
        d_ff=d_ff,
        num_layers=count(shapes, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=config.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        feed_forward_proj="gated-gelu",
        pad_token_id=config.get("pad_token_id", 0),
        eos_token_id=config.get("eos_token_id", 1),
        architectures=["UMT5EncoderModel"],
    )


def vae_config(shapes: Shapes, config: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKLWan`` from tensors in diffusers' names."""
    if config is not None:
        return dict(config)
    try:
        base_dim = shapes["encoder.conv_in.weight"][0]
        decoder_dim = shapes["decoder.conv_out.weight"][1]
        z_dim = shapes["post_quant_conv.weight"][0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{where} lacks the tensors that tell the autoencoder's sizes ({error}).") from error
    if z_dim != 16:
        raise CheckpointError(f"{where} has {z_dim} latent channels, not the 16 of the Wan2.1 autoencoder.")
    return {"base_dim": base_dim, "z_dim": z_dim} | (
        {"decoder_base_dim": decoder_dim} if decoder_dim != base_dim else {}
    )
