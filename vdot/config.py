"""Typed configuration: dataclasses hold the defaults, YAML and ``key=value`` only override them."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

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
    feather: float = 8.0  # pixels inside the mask over which the seam to the kept part is closed
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
    for where, layer in ((str(path), _read(path)), ("key=value", _pairs(overrides)), ("option", dict(given or {}))):
        config = merge_config(config, layer, where)
    return config


def merge_config(base: T, values: Mapping[str, Any], where: str) -> T:
    """A copy of the dataclass ``base`` with ``values`` laid over it, types checked. ``ConfigError`` says ``where``.

    Text is taken letter by letter: a prompt may hold ``${x}``, ``???`` or ``a: b``, which YAML tools would interpret.
    """
    hints = get_type_hints(type(base))
    names = [f.name for f in fields(base)]  # type: ignore[arg-type]
    changed = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        changed[key] = _convert(value, hints[key], getattr(base, key), f"{where}: {key}")
    return replace(base, **changed)  # type: ignore[type-var]


def _convert(value: Any, wanted: Any, current: Any, where: str) -> Any:
    """``value``, from text, YAML or JSON, as the annotated type ``wanted``; ``current`` is what it replaces."""
    options = [t for t in (get_args(wanted) if get_origin(wanted) in (Union, UnionType) else [wanted])]
    if value is None and NoneType in options:
        return None
    kind = next(t for t in options if t is not NoneType)
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of key: value, got {value!r}")
        return merge_config(current if current is not None else kind(), value, where)  # type: ignore[operator]
    if get_origin(kind) in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        item = get_args(kind)[0]
        return get_origin(kind)(_convert(v, item, None, f"{where}[{i}]") for i, v in enumerate(items))  # type: ignore[misc]
    try:
        return _SCALARS[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where} is {value!r}, which is not {_NAMES[kind]}") from None


def _boolean(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str | int | float):  # a table, a list or null
        raise ValueError
    return str(value)


_SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _boolean, int: _whole, float: _real, str: _text}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _read(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if str(path).lower().endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the config {path} is not valid YAML or JSON: {str(error).splitlines()[0]}") from error
    if values is None:  # nothing but comments: all defaults
        return {}
    if isinstance(values, dict) and "config" in values:  # a run.json repeats its run
        values = values["config"]
    if not isinstance(values, dict):
        raise ConfigError(f"the config {path} must be a table of key: value")
    return {str(k): v for k, v in values.items()}


def _pairs(overrides: Sequence[str]) -> dict[str, Any]:
    """``a.b=c`` -> ``{"a": {"b": "c"}}``; the text after the first ``=`` is the value, ``null`` is none."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item!r} is not key=value; quote a text of several words")
        *outer, last = key.split(".")
        table = values
        for name in outer:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{item!r} contradicts an earlier {name}=...")
        table[last] = None if value == "null" else value
    return values
