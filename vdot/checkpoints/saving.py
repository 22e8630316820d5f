"""Networks -> a checkpoint folder in any layout, complete or not there at all.

Everything is written to a hidden folder beside the target and renamed at the end, so a full disk, an error or Ctrl-C
never leaves a half-written checkpoint under its final name.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from vdot.checkpoints import keymaps
from vdot.checkpoints.layouts import NOTES
from vdot.checkpoints.loading import dtype_of
from vdot.errors import OutputError
from vdot.models.presets import PRESETS, DitConfig
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE

LAYOUTS = ("native", "diffusers", "vdot")
SHARD_BYTES = 5_000_000_000
STEM = "diffusion_pytorch_model"
PUBLISHED_SHIFT = 16.0

Notes = Any  # a mapping or a dataclass instance


def save_checkpoint(
    folder: str | Path,
    dit: VaceDiT,
    text_encoder: UMT5TextEncoder | None = None,
    vae: WanVAE | None = None,
    *,
    layout: str = "native",
    schedule: Notes | None = None,
    defaults: Notes | None = None,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that ``load_*`` (and, for "diffusers", that library) reads back; returns the folder.

    Args:
        folder: must not exist, or be empty, unless ``overwrite``.
        dit, text_encoder, vae: what to save; the last two are optional.
        layout: "native", "diffusers" or "vdot" (see :mod:`vdot.checkpoints.layouts`).
        schedule, defaults: mapping or dataclass, written as ``schedule.json`` and ``defaults.json`` in every layout.
        dtype: of the transformer's weights in the file; by default each tensor keeps its own.
        shard_bytes: largest transformer file in the safetensors layouts.

    Raises:
        OutputError: the folder exists, or cannot be written; nothing is left behind.
    """
    if layout not in LAYOUTS:
        raise OutputError(f"Unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    kind = None if dtype is None else dtype_of(dtype)
    target = Path(folder).expanduser().absolute()
    with _atomic_folder(target, overwrite) as work:
        if layout == "vdot":
            _save_vdot(work, dit, kind, text_encoder, vae)
        else:
            native = layout == "native"
            _save_dit(work if native else work / "transformer", dit, native, kind, shard_bytes)
            _save_libraries(work, text_encoder, vae)
        for name, note in zip(NOTES, (schedule, defaults), strict=True):
            if note is not None:
                _write_json(work / f"{name}.json", _plain(note))
        if layout == "diffusers":
            _save_diffusers_index(work, text_encoder, vae, _plain(schedule or {}))
    return target


def save_encoders(
    folder: str | Path,
    text_encoder: UMT5TextEncoder | None = None,
    vae: WanVAE | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the networks around a transformer alone, as ``text_encoder/``, ``tokenizer/`` and ``vae/``; the folder.

    ``load_text_encoder`` and ``load_vae`` read it, and a transformer can be added. Errors as :func:`save_checkpoint`.
    """
    target = Path(folder).expanduser().absolute()
    with _atomic_folder(target, overwrite) as work:
        _save_libraries(work, text_encoder, vae)
    return target


@contextmanager
def _atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of ``target`` when the block ends well, and disappears when it does not."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists already: give another folder, or ask to overwrite it.")
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        work.chmod(0o777 & ~_umask())  # mkdtemp's private mode is not meant to last
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                share(path)
        _replace(work, target)
        work = None
    except OSError as error:
        raise OutputError(f"{target} could not be written: {error.strerror or error}.") from error
    except RuntimeError as error:  # what torch.save and safetensors raise on a full disk
        raise OutputError(f"{target} could not be written: {str(error).splitlines()[0][:200]}.") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        work.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def share(path: Path) -> None:
    """Readable for whoever the umask lets: safetensors' own files are for their owner alone."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- the transformer ------------------------------------------------------------------------------------------------


def _ready(tensor: Tensor, key: str, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, packed, and in the type of the file; the float32 islands are kept, they are small."""
    island = any(fragment in key for fragment in VaceDiT.FLOAT32_ISLANDS)
    return tensor.detach().to("cpu", tensor.dtype if dtype is None or island else dtype).contiguous()


def _save_dit(folder: Path, dit: VaceDiT, native: bool, dtype: torch.dtype | None, limit: int) -> None:
    folder.mkdir(exist_ok=True)
    _write_json(folder / "config.json", native_config(dit.config) if native else diffusers_config(dit.config))
    state = dit.state_dict()
    shards = list(_split(state, dtype, limit))
    weight_map = {}
    for i, keys in enumerate(shards, start=1):
        file = f"{STEM}.safetensors" if len(shards) == 1 else f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key if native else _library(key): _ready(state[key], key, dtype) for key in keys}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(_size(tensor, dtype) for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{STEM}.safetensors.index.json", index)


def _split(state: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> Iterator[list[str]]:
    keys: list[str] = []
    total = 0
    for key, tensor in state.items():
        if keys and total + _size(tensor, dtype) > limit:
            yield keys
            keys, total = [], 0
        keys.append(key)
        total += _size(tensor, dtype)
    yield keys


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _library(key: str) -> str:
    name = keymaps.DIT.to_library(key)
    assert name is not None, key  # every parameter of VaceDiT has a rule: a test compares with the key tables
    return name


def native_config(config: DitConfig) -> dict[str, Any]:
    """``config.json`` as Wan2.1-VACE publishes it."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {"_class_name": "VaceWanModel", "model_type": "vace"} | sizes


def diffusers_config(config: DitConfig) -> dict[str, Any]:
    """``transformer/config.json`` of diffusers' WanVACETransformer3DModel (which has no place for ``text_len``)."""
    return {
        "_class_name": "WanVACETransformer3DModel",
        "_diffusers_version": version("diffusers"),
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "text_dim": config.text_dim,
        "vace_layers": list(config.vace_layers),
        "vace_in_channels": config.vace_in_dim,
    }


# -- the layouts ----------------------------------------------------------------------------------------------------


def _save_libraries(folder: Path, text_encoder: UMT5TextEncoder | None, vae: WanVAE | None) -> None:
    if text_encoder is not None:
        text_encoder.model.save_pretrained(folder / "text_encoder")
        _save_tokenizer(folder / "tokenizer", text_encoder)
    if vae is not None:
        vae.model.save_config(folder / "vae")  # its save_pretrained refuses weights that are laid out channels last
        state = {key: _ready(tensor, "", None) for key, tensor in vae.model.state_dict().items()}
        save_file(state, folder / "vae" / f"{STEM}.safetensors", metadata={"format": "pt"})


def _save_tokenizer(folder: Path, text_encoder: UMT5TextEncoder) -> None:
    """With ``text_len`` as its maximum length, the one place where every layout can keep it."""
    text_encoder.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    _write_json(path, json.loads(path.read_text()) | {"model_max_length": text_encoder.text_len})


def _save_diffusers_index(
    folder: Path, text_encoder: UMT5TextEncoder | None, vae: WanVAE | None, schedule: Mapping[str, Any]
) -> None:
    """``model_index.json`` and a scheduler, so that diffusers' WanVACEPipeline opens the folder."""
    kind = "UniPCMultistepScheduler"
    scheduler = {
        "_class_name": kind,
        "_diffusers_version": version("diffusers"),
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": schedule.get("shift", PUBLISHED_SHIFT),
    }
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": "WanVACEPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", kind],
        "transformer": ["diffusers", "WanVACETransformer3DModel"],
    }
    if text_encoder is not None:
        index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
        index["tokenizer"] = ["transformers", type(text_encoder.tokenizer).__name__]
    if vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKLWan"]
    _write_json(folder / "model_index.json", index)


def _save_vdot(
    folder: Path,
    dit: VaceDiT,
    dtype: torch.dtype | None,
    text_encoder: UMT5TextEncoder | None,
    vae: WanVAE | None,
) -> None:
    """The release's files and names; ``config.json`` is extra, and needed for any size but 14B."""
    weights = folder / "vdot-weights"
    weights.mkdir()
    name = "vdot_14b.pt" if dit.config == PRESETS["14B"].dit else "vdot.pt"
    state = {f"model.{key}": _ready(tensor, key, dtype) for key, tensor in dit.state_dict().items()}
    torch.save({"generator": state}, weights / name)
    _write_json(folder / "config.json", native_config(dit.config))
    if text_encoder is not None:
        text = dict(text_encoder.model.state_dict())
        text.pop("encoder.embed_tokens.weight", None)
        torch.save(_native(text, keymaps.T5), folder / "models_t5_umt5-xxl-enc-bf16.pth")
        _save_tokenizer(folder / "google" / "umt5-xxl", text_encoder)
    if vae is not None:
        torch.save(_native(vae.model.state_dict(), keymaps.VAE), folder / "Wan2.1_VAE.pth")


def _native(state: Mapping[str, Tensor], keymap: keymaps.KeyMap) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for key, t in state.items() if (name := keymap.to_native(key))}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(note: Notes) -> dict[str, Any]:
    if dataclasses.is_dataclass(note) and not isinstance(note, type):
        return dataclasses.asdict(note)
    return dict(cast(Mapping[str, Any], note))
