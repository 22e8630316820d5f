"""Typed configuration: dataclasses hold the defaults, YAML and ``key=value`` only override them."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's own dependency, whose errors it lets through

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
    frame_mode: str = "spread"  # spread: over the whole clip, as the original; trim: the first frames; all: every one
    fps: float | None = None
    keep_source: bool = True  # put the source's own pixels back where the mask keeps
    feather: float = 8.0  # pixels inside the mask over which the seam to the kept part is closed
    chunk_frames: int | None = None  # frames of one pass of a long clip, 4n + 1
    chunk_overlap: int | None = None  # frames that a pass shares with the one before, 4n + 1
    chunk_anchor: bool = True  # hold later passes to the first one's colours
    use_prompt_extend: str = "plain"
    prompt_model: str | None = None  # folder of a language model, or its name at prompt_url
    prompt_url: str | None = None
    prompt_timeout: float = 60.0  # seconds for one of three attempts
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
    ulysses_size: int | None = None  # ranks that share the heads; None: chosen
    ring_size: int | None = None
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
    """A copy of the dataclass ``base`` with ``values`` laid over it, types checked. ``ConfigError`` says ``where``."""
    _check_keys(type(base), values, where)
    # What goes around OmegaConf: texts that it would interpret, and tables, which may hold some.
    around: dict[str, Any] = {k: v for k, v in vars(base).items() if _goes_around(v)}
    through: dict[str, Any] = {}
    for key, value in values.items():
        kinds, current = _kinds(type(base), key), getattr(base, key)
        if is_dataclass(current) and not isinstance(current, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} must be a table of key: value, got {value!r}")
            around[key] = merge_config(current, value, f"{where}: {key}")
        elif str in kinds and _interpreted(value):
            around[key] = value
        else:
            around.pop(key, None)
            through[key] = _parts(value, kinds) if isinstance(value, str) else value
    held: list[tuple[str, Any]] = [(k, v) for k, v in vars(base).items() if _goes_around(v)]
    plain = replace(cast(Any, base), **{k: "" if isinstance(v, str) else type(v)() for k, v in held})
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(plain), OmegaConf.create(through)))
    except (OmegaConfBaseException, OverflowError) as error:
        key = re.split(r"[.\[]", str(getattr(error, "full_key", None) or next(iter(through))))[0]
        raise ConfigError(f"{where}: {key} is {values.get(key)!r}, which is not {_wanted(type(base), key)}") from error
    return replace(cast(Any, merged), **around)


def _goes_around(value: Any) -> bool:
    return _interpreted(value) or is_dataclass(value)


def _interpreted(value: Any) -> bool:
    """Whether OmegaConf would take a text, a prompt with ``${x}`` or ``???``, for more than text."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _kinds(schema: type, key: str) -> tuple[Any, ...]:
    """Types that a field takes, None left out."""
    hint = get_type_hints(schema)[key]
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(kind for kind in options if kind is not NoneType)


def _split(text: str) -> list[str]:
    """``[a, b]`` or ``a,b`` -> its parts; ``[]`` has none."""
    return [part.strip() for part in text.strip().strip("[]").split(",") if part.strip()]


def _table(text: str) -> dict[str, str] | str:
    """``{a: 1, b: 2}`` -> its entries, as texts; anything else stays what it is."""
    pairs = [part.partition(":") for part in _split(text.strip().strip("{}"))]
    if not text.strip().startswith("{") or not all(colon for _, colon, _ in pairs):
        return text
    return {key.strip(): value.strip() for key, _, value in pairs}


def _parts(text: str, kinds: tuple[Any, ...]) -> Any:
    """A text of ``key=value`` as the list or table that a field of these types wants."""
    origins = {get_origin(kind) for kind in kinds}
    if origins & {list, tuple}:
        return _split(text)
    return _table(text) if dict in origins else text


def _wanted(schema: type, key: str) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "{key: value, ...}"}
    kinds = [get_origin(kind) or kind for kind in _kinds(schema, key)]
    return next((names[kind] for kind in kinds if kind in names), "a list of the right kind")


def _check_keys(schema: type, values: Mapping[str, Any], where: str) -> None:
    names = [f.name for f in fields(schema)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _read(path: str | Path | None) -> dict[str, Any]:
    """A table from YAML, where OmegaConf's ``${...}`` works, or from JSON, whose text is taken as it is."""
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if str(path).lower().endswith(".json"):
            values = json.loads(text)
        else:
            values = OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=True)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror or error}") from error
    except AssertionError:  # OmegaConf's answer to a bare number
        values = None
    except (ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"the config {path} is not valid YAML or JSON: {str(error).splitlines()[0]}") from error
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
