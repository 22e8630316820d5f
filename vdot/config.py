"""Typed configuration: dataclasses hold the defaults, YAML and ``key=value`` only override them."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdot.errors import ConfigError

T = TypeVar("T")


@dataclass
class GenerateConfig:
    """One generation, or a batch of them. ``None`` means: what the checkpoint or the source video says."""

    # what to make
    prompt: str | None = None
    negative_prompt: str | None = None
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: str | None = None  # comma-separated paths
    size: str | None = None  # "480p", "720p" or "W*H"
    frame_num: int | None = None
    frame_mode: str = "spread"  # spread: over the whole clip, as the original; trim: the first frames, one to one
    fps: float | None = None
    keep_source: bool = True  # put the source's own pixels back where the mask keeps
    feather: float = 8.0  # pixels over which generated content fades in, inside the mask
    use_prompt_extend: str = "plain"
    # how to sample
    sample_steps: int | None = None
    sample_shift: float | None = None
    sample_solver: str | None = None
    sample_guide_scale: float | None = None
    context_scale: float = 1.0
    base_seed: int = 2025  # -1 draws one
    # the model and the machine
    ckpt_dir: str | None = None
    model_name: str | None = None
    device: str | None = None
    dtype: str | None = None
    vae_dtype: str | None = None
    attention: str = "sdpa"
    compile: bool = False
    offload_model: str = "false"  # false, true or block
    t5_cpu: bool = False
    t5_fsdp: bool = False
    dit_fsdp: bool = False
    ulysses_size: int = 1
    ring_size: int = 1
    # where it goes
    save_dir: str | None = None
    save_file: str | None = None
    jobs: str | None = None
    dry_run: bool = False


def load_config(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> T:
    """``schema``'s defaults, then the YAML or ``run.json`` at ``path``, then ``key=value``, then ``given`` flags.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, unreadable file.
    """
    config = schema()
    for where, layer in ((str(path), _read(path)), ("key=value", _dotlist(overrides)), ("option", dict(given or {}))):
        config = merge_config(config, layer, where)
    return config


def merge_config(base: T, values: Mapping[str, Any], where: str) -> T:
    """A copy of the dataclass ``base`` with ``values`` laid over it, types checked. ``ConfigError`` says ``where``."""
    _check_keys(type(base), values, where)
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), OmegaConf.create(dict(values)))))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", None))
        wanted = next((str(f.type) for f in fields(base) if f.name == key), "another type")  # type: ignore[arg-type]
        raise ConfigError(f"{where}: {key} is {values.get(key)!r}, which is not of type {wanted}") from error


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if str(path).endswith(".json") else OmegaConf.to_container(OmegaConf.create(text))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except Exception as error:  # YAML and JSON parsers raise a family of their own each
        raise ConfigError(f"the config {path} is not valid YAML or JSON: {str(error).splitlines()[0]}") from error
    if isinstance(values, dict) and "config" in values:  # a run.json repeats its run
        values = values["config"]
    if not isinstance(values, dict):
        raise ConfigError(f"the config {path} must be a table of key: value")
    return {str(k): v for k, v in values.items()}


def _dotlist(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"{item!r} is not key=value")
    container = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    return {str(k): v for k, v in container.items()} if isinstance(container, dict) else {}


def _check_keys(schema: type, values: Mapping[str, Any], where: str) -> None:
    names = [f.name for f in fields(schema)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
