"""Where the parts of a checkpoint lie: every published folder layout, found by what is there.

====================  ==========================================================================================
layout                DiT; text encoder; autoencoder; tokenizer
====================  ==========================================================================================
``vdot``              ``vdot-weights/*.pt``; ``models_t5*.pth``; ``Wan2.1_VAE.pth``; ``google/umt5-xxl/``
``wan``               ``diffusion_pytorch_model*.safetensors`` + ``config.json``; the others as ``vdot``
``diffusers``         ``transformer/``; ``text_encoder/``; ``vae/``; ``tokenizer/``
``native``            our export: DiT as ``wan`` with ``schedule.json``; the others as ``diffusers``
``part``              one file, or the folder of one network
====================  ==========================================================================================

Everything of ``vdot`` may lie one level down, under ``google/``, as the release's README draws it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdot.errors import CheckpointError

PARTS = ("dit", "text_encoder", "vae")
PART_NAMES = {"dit": "video transformer", "text_encoder": "text encoder", "vae": "autoencoder"}
CLASSES = {
    "dit": ("VaceWanModel", "WanVACETransformer3DModel", "VaceDiT"),
    "text_encoder": ("UMT5EncoderModel", "UMT5ForConditionalGeneration", "UMT5Model"),
    "vae": ("AutoencoderKLWan",),
}
LIBRARY_FOLDERS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
LOOSE_FILES = {
    "dit": ("vdot-weights/*",),
    "text_encoder": ("models_t5*", "*umt5*"),
    "vae": ("Wan2.1_VAE*", "*[vV][aA][eE]*"),
}
STEMS = {
    "dit": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
    "vae": ("diffusion_pytorch_model",),
}
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2", ".cache/huggingface/download/*.incomplete")
SUBFOLDERS = ("vdot-weights", "transformer", "text_encoder", "vae")  # of a single file: its checkpoint is one level up
NOTES = ("schedule", "defaults")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Location:
    """The files of one network and the JSON that describes it, if any."""

    files: tuple[Path, ...]
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Layout:
    """What a path holds. A part that is not there is missing from ``parts``."""

    path: Path
    name: str
    parts: dict[str, Location]
    tokenizer: Path | None
    notes: dict[str, dict[str, Any]]  # schedule.json and defaults.json, by name
    text_len: int | None


def find_layout(path: str | Path) -> Layout:
    """Recognise a folder or a file. CheckpointError when it is missing, empty, unfinished or of another model."""
    path = Path(path).expanduser()
    try:
        return _find_layout(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _find_layout(path: Path) -> Layout:
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give the folder or the file of a checkpoint.")
    if not any(path.iterdir()):
        raise CheckpointError(f"{path} is an empty folder: the checkpoint was not downloaded, or is elsewhere.")
    roots = [root for root in (path, path / "google") if root.is_dir()]
    config = read_json(path / "config.json")
    part = _part_of(config)
    if part is not None and not (part == "dit" and _weights(path, "dit", required=False) is None):
        parts = {part: _part_folder(path, part)}
        if part == "dit":
            parts.update(_parts(roots, ("text_encoder", "vae")))
    else:
        parts = _parts(roots, PARTS)
    if not parts:
        raise CheckpointError(_nothing_found(path, config))
    tokenizer = _tokenizer(roots)
    return Layout(path, _name(path, parts), parts, tokenizer, _notes(roots), _text_len(parts, roots, tokenizer))


def location(layout: Layout, part: str) -> Location:
    """The files of ``part``. CheckpointError names what was looked for."""
    if part in layout.parts:
        return layout.parts[part]
    looked = {
        "dit": "vdot-weights/*.pt, diffusion_pytorch_model*.safetensors or transformer/",
        "text_encoder": "models_t5*.pth or text_encoder/",
        "vae": "Wan2.1_VAE.pth or vae/",
    }[part]
    hint = _unfinished(layout.path)
    raise CheckpointError(f"{layout.path} holds no {PART_NAMES[part]} (looked for {looked}){hint}.")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, ``None`` if the file is not there. CheckpointError if it is not JSON."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return content


# -- one part -------------------------------------------------------------------------------------------------------


def _parts(roots: list[Path], which: Iterable[str]) -> dict[str, Location]:
    found = {}
    for part in which:
        place = _locate(roots, part)
        if place is not None:
            found[part] = place
    return found


def _locate(roots: list[Path], part: str) -> Location | None:
    """First hit of: library folder, weights at the top (DiT only), loose files of the native release."""
    for root in roots:
        folder = root / LIBRARY_FOLDERS[part]
        if folder.is_dir() and any(folder.iterdir()):
            return _part_folder(folder, part)
        if part == "dit":
            files = _weights(root, part, required=False)
            if files is not None:
                return Location(files, _checked_config(root, part))
        file = _loose_file(root, part)
        if file is not None:
            folders = (file.parent, root, roots[0]) if part == "dit" else ()
            return Location((file,), next((c for c in (read_json(f / "config.json") for f in folders) if c), None))
    return None


def _part_folder(folder: Path, part: str) -> Location:
    config = _checked_config(folder, part)
    files = _weights(folder, part)
    assert files is not None
    return Location(files, config)


def _checked_config(folder: Path, part: str) -> dict[str, Any] | None:
    config = read_json(folder / "config.json")
    kind = _class_name(config)
    if kind is not None and kind not in CLASSES[part]:
        raise CheckpointError(f"{folder} holds a {kind}, not the {PART_NAMES[part]} {CLASSES[part][0]}.")
    return config


def _weights(folder: Path, part: str, required: bool = True) -> tuple[Path, ...] | None:
    """The one file, or all shards, of a library-style folder. CheckpointError names a missing shard."""
    for stem in STEMS[part]:
        for suffix in (".safetensors", ".bin"):
            files = _shards(folder, stem, suffix)
            if files:
                return files
    if required:
        raise CheckpointError(f"{folder} has no {STEMS[part][0]}*.safetensors{_unfinished(folder)}.")
    return None


def _shards(folder: Path, stem: str, suffix: str) -> tuple[Path, ...]:
    if (folder / f"{stem}{suffix}").is_file():
        return (folder / f"{stem}{suffix}",)
    indices = sorted(folder.glob(f"{stem}*{suffix}.index*.json"))
    if indices:
        index = read_json(indices[0]) or {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indices[0]} has no weight_map: download it again.")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = sorted(file.name for file in folder.glob(f"{stem}*{suffix}"))
        names = _complete(names)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files ({listed}){_unfinished(folder)}."
        )
    if not indices and len(names) > 1 and not re.search(r"-of-\d+", names[0]):
        raise CheckpointError(f"{folder} holds several weight files ({', '.join(names[:5])}): give one of them.")
    return tuple(folder / name for name in names)


def _complete(names: list[str]) -> list[str]:
    """The full set of which ``names`` are shards (``x-00001-of-00007.safetensors``), or ``names``."""
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(.*)", names[0]) if names else None
    if not match:
        return names
    stem, digits, of, total, rest = match.groups()
    return [f"{stem}{i:0{len(digits)}d}{of}{total}{rest}" for i in range(1, int(total) + 1)]


def _loose_file(root: Path, part: str) -> Path | None:
    for pattern in LOOSE_FILES[part]:
        files = sorted(f for f in root.glob(pattern) if f.suffix in WEIGHT_SUFFIXES and f.is_file())
        if len(files) > 1:
            listed = ", ".join(f.name for f in files[:5])
            raise CheckpointError(f"{files[0].parent} holds several {PART_NAMES[part]} files ({listed}): give one.")
        if files:
            return files[0]
    if part != "dit":
        return None
    taken = {_loose_file(root, "text_encoder"), _loose_file(root, "vae")}
    rest = sorted(f for f in root.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.is_file() and f not in taken)
    return rest[0] if len(rest) == 1 else None


# -- what surrounds them --------------------------------------------------------------------------------------------


def _single_file(path: Path) -> Layout:
    """One file may be any part: it is offered as each of them, and its keys decide. Neighbours give the tokenizer."""
    roots = [path.parent, path.parent.parent] if path.parent.name in SUBFOLDERS else [path.parent]
    config = next((c for c in (read_json(root / "config.json") for root in roots) if c), None)
    kind = _part_of(config)
    parts = {
        part: Location((path,), config if kind == part or (kind, part) == (None, "dit") else None) for part in PARTS
    }
    tokenizer = _tokenizer(roots)
    return Layout(path, "part", parts, tokenizer, _notes(roots), _text_len(parts, roots, tokenizer))


def _tokenizer(roots: list[Path]) -> Path | None:
    for root in roots:
        for folder in (root / "google" / "umt5-xxl", root / "umt5-xxl", root / "tokenizer", root.parent / "tokenizer"):
            if any((folder / name).is_file() for name in TOKENIZER_FILES):
                return folder
    return next((r for r in roots if any((r / name).is_file() for name in TOKENIZER_FILES)), None)


def _notes(roots: list[Path]) -> dict[str, dict[str, Any]]:
    """The JSON files that travel with our exports, by their names without suffix."""
    found = {}
    for name in NOTES:
        note = next((n for n in (read_json(root / f"{name}.json") for root in roots) if n is not None), None)
        if note is not None:
            found[name] = note
    return found


def _text_len(parts: dict[str, Location], roots: list[Path], tokenizer: Path | None) -> int | None:
    """From the DiT's config, else from the tokenizer (where our diffusers export keeps it), else unknown."""
    configs = [parts["dit"].config if "dit" in parts else None, *(read_json(root / "config.json") for root in roots)]
    for config in configs:
        if config is not None and isinstance(config.get("text_len"), int):
            return config["text_len"]
    limit = (read_json(tokenizer / "tokenizer_config.json") or {}).get("model_max_length") if tokenizer else None
    return limit if isinstance(limit, int) and 0 < limit <= 65536 else None


def _class_name(config: dict[str, Any] | None) -> str | None:
    if config is None:
        return None
    names = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    return str(names) if names else None


def _part_of(config: dict[str, Any] | None) -> str | None:
    kind = _class_name(config)
    return next((part for part in PARTS if kind in CLASSES[part]), None)


def _name(path: Path, parts: dict[str, Location]) -> str:
    """Which row of the table this is."""
    if "dit" not in parts:
        if (path / "model_index.json").is_file():
            return "diffusers"
        return "part" if len(parts) == 1 and _part_of(read_json(path / "config.json")) else "wan"
    folder = parts["dit"].files[0].parent
    if folder.name == "vdot-weights":
        return "vdot"
    if folder.name == "transformer" and folder != path:
        return "diffusers"
    if (path / "text_encoder").is_dir() or (path / "schedule.json").is_file():
        return "native"
    return "wan" if len(parts) > 1 or folder.name != "transformer" else "part"


def _unfinished(folder: Path) -> str:
    count = sum(1 for pattern in UNFINISHED for _ in folder.glob(pattern))
    return f"; {count} unfinished download{'s' if count > 1 else ''} in it, so complete that first" if count else ""


def _nothing_found(path: Path, config: dict[str, Any] | None) -> str:
    index = read_json(path / "model_index.json")
    kind = _class_name(index) or _class_name(config)
    if kind:
        return f"{path} holds a {kind}, not a Wan2.1-VACE or VDOT checkpoint."
    return f"{path} holds no checkpoint of a layout that is known{_unfinished(path)}."
