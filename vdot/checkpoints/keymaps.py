"""Names of the same tensor in the published layouts, as small rule tables that read in both directions.

A rule is a pair of name templates; ``{i}`` stands for any block number and must appear on both sides. A key is
translated by the first rule whose template is a whole-name prefix of it, and what follows (``.weight``) is kept.
Both tables are one-to-one, so translating forth and back is the identity.
"""

import re
from collections.abc import Iterable, Sequence

Rule = tuple[str, str]

_DIT_BLOCK: tuple[Rule, ...] = (
    ("modulation", "scale_shift_table"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)
_VACE_BLOCK: tuple[Rule, ...] = (*_DIT_BLOCK, ("before_proj", "proj_in"), ("after_proj", "proj_out"))

_RESNET: tuple[Rule, ...] = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
_RESAMPLE: tuple[Rule, ...] = (("resample", "resample"), ("time_conv", "time_conv"))


def _inside(native: str, library: str, rules: Iterable[Rule]) -> list[Rule]:
    return [(f"{native}.{a}", f"{library}.{b}") for a, b in rules]


def _vae_rules() -> list[Rule]:
    rules = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        rules += [(f"{side}.conv1", f"{side}.conv_in")]
        rules += [(f"{side}.head.0", f"{side}.norm_out"), (f"{side}.head.2", f"{side}.conv_out")]
        rules += _inside(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESNET)
        rules += [(f"{side}.middle.1", f"{side}.mid_block.attentions.0")]
        rules += _inside(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESNET)
    rules += _inside("encoder.downsamples.{i}", "encoder.down_blocks.{i}", (*_RESNET, *_RESAMPLE))
    for level in range(4):  # natively a flat list: three residual blocks and, but for the last level, one resampler
        for j in range(3):
            library = f"decoder.up_blocks.{level}.resnets.{j}"
            rules += _inside(f"decoder.upsamples.{4 * level + j}", library, _RESNET)
        library = f"decoder.up_blocks.{level}.upsamplers.0"
        rules += _inside(f"decoder.upsamples.{4 * level + 3}", library, _RESAMPLE)
    return rules


DIT_RULES: tuple[Rule, ...] = (
    ("patch_embedding", "patch_embedding"),
    ("vace_patch_embedding", "vace_patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    *_inside("blocks.{i}", "blocks.{i}", _DIT_BLOCK),
    *_inside("vace_blocks.{i}", "vace_blocks.{i}", _VACE_BLOCK),
)

T5_RULES: tuple[Rule, ...] = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{i}.norm1", "encoder.block.{i}.layer.0.layer_norm"),
    ("blocks.{i}.norm2", "encoder.block.{i}.layer.1.layer_norm"),
    ("blocks.{i}.attn", "encoder.block.{i}.layer.0.SelfAttention"),
    ("blocks.{i}.pos_embedding.embedding", "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{i}.ffn.gate.0", "encoder.block.{i}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{i}.ffn.fc1", "encoder.block.{i}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{i}.ffn.fc2", "encoder.block.{i}.layer.1.DenseReluDense.wo"),
)

VAE_RULES: tuple[Rule, ...] = tuple(_vae_rules())


class KeyMap:
    """Translates keys between the native and a library's naming. ``None`` where no rule applies."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._to_library = [_compile(native, library) for native, library in rules]
        self._to_native = sorted(
            (_compile(library, native) for native, library in rules),
            key=lambda rule: -len(rule[0].pattern),  # the longest template is the most specific one
        )

    def to_library(self, key: str) -> str | None:
        return _translate(key, self._to_library)

    def to_native(self, key: str) -> str | None:
        return _translate(key, self._to_native)


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(rf"{pattern}(?P<rest>\..*)?"), target.replace("{i}", r"\g<i>") + r"\g<rest>"


def _translate(key: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        match = pattern.fullmatch(key)
        if match:
            return match.expand(target)
    return None


DIT = KeyMap(DIT_RULES)
T5 = KeyMap(T5_RULES)
VAE = KeyMap(VAE_RULES)

# What trainers and compilers leave in a name: whole components, wherever they stand. No network here uses them.
WRAPPERS = frozenset(
    {"model", "module", "diffusion_model", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
)


def clean_key(key: str) -> str:
    """Remove every wrapper component: ``model.blocks.0._fsdp_wrapped_module.ffn.0.bias`` -> ``blocks.0.ffn.0.bias``."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def clean_keys(keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Clean name -> name in the file, and the clean names that two names in the file share."""
    names: dict[str, str] = {}
    clashes: list[str] = []
    for key in keys:
        clean = clean_key(key)
        if clean in names:
            clashes.append(clean)
        names[clean] = key
    return names, clashes
