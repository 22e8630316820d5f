"""Checkpoint folders and files -> networks, strictly, and without a random or a second copy of any weight.

Sizes come from ``config.json`` or from the tensors' shapes; the module is built on the meta device, its names and
shapes are compared with the files' headers, and only then are tensors read, cast one by one and assigned.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vdot.checkpoints import keymaps
from vdot.checkpoints.layouts import PART_NAMES, Layout, Location, find_layout, location
from vdot.checkpoints.reading import Header, Rows, WeightFile, open_weights
from vdot.checkpoints.shapes import dit_config, umt5_config, vae_config
from vdot.errors import CheckpointError
from vdot.models.text_encoder import UMT5TextEncoder
from vdot.models.vace import VaceDiT
from vdot.models.vae import WanVAE

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
Device = str | torch.device

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
KEYMAPS = {"dit": keymaps.DIT, "text_encoder": keymaps.T5, "vae": keymaps.VAE}


class Sharder(Protocol):
    """Splits a network's parameters by rows over processes (``vdot.parallel.shard``)."""

    def shard(self, module: nn.Module, device: torch.device) -> None:
        """Wrap ``module``, which is on the meta device, and allocate this process's part of it."""

    def local(self, parameter: Tensor) -> tuple[Tensor, int]:
        """The memory of this process's part of a parameter, and the row that it begins with."""
        ...


@dataclass(frozen=True)
class Source:
    """One tensor: where it lies and what its header says."""

    file: WeightFile
    name: str  # in the file
    header: Header


@dataclass(frozen=True)
class Weights:
    """All tensors of one network by the module's own names, none of them read yet."""

    part: str
    naming: str  # "native" or "library"
    files: tuple[Path, ...]
    config: dict[str, Any] | None
    tensors: dict[str, Source]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.header.shape for name, source in self.tensors.items()}

    @property
    def where(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def load_dit(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: Device = "cpu",
    *,
    mmap: bool = False,
    state_key: str | None = None,
    sharder: Sharder | None = None,
) -> VaceDiT:
    """The video transformer of a checkpoint folder of any layout, of its own folder, or of a single file.

    Args:
        path: folder or file.
        dtype: type of the weights; in half precision ``VaceDiT.FLOAT32_ISLANDS`` stay float32, as in the original.
        device: where the weights go, tensor by tensor.
        mmap: leave tensors that need no cast in a private map of the file (see :mod:`vdot.checkpoints.reading`).
        state_key: which state dict of a ``.pt`` that holds several, e.g. ``generator_ema``.
        sharder: split the weights over processes; this one reads no more of the files than its own rows.

    Raises:
        CheckpointError: missing, incomplete, unsafe or of another model; all missing, unexpected and mis-shaped
            tensors are named at once, before any is read.
    """
    layout = find_layout(path)
    weights = read_headers("dit", location(layout, "dit"), state_key)
    config = dit_config(weights.shapes, weights.config, weights.where, layout.text_len)
    with torch.device("meta"):
        dit = VaceDiT(config)
    return _fill(dit, weights, dtype_of(dtype), device, mmap, VaceDiT.FLOAT32_ISLANDS, sharder)


def load_text_encoder(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    device: Device = "cpu",
    *,
    text_len: int | None = None,
    mmap: bool = False,
    sharder: Sharder | None = None,
) -> UMT5TextEncoder:
    """The text encoder and its tokenizer. ``text_len`` defaults to what the checkpoint says, else 512.

    Frozen. float16 keeps ``UMT5TextEncoder.FLOAT16_ISLANDS`` in float32. Raises CheckpointError like ``load_dit``.
    """
    from transformers import UMT5EncoderModel

    layout = find_layout(path)
    weights = read_headers("text_encoder", location(layout, "text_encoder"))
    tokenizer = _load_tokenizer(layout)
    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(weights.shapes, weights.config, weights.where))
    dtype = dtype_of(dtype)
    islands = UMT5TextEncoder.FLOAT16_ISLANDS if dtype == torch.float16 else ()
    _fill(model, weights, dtype, device, mmap, islands, sharder)
    return UMT5TextEncoder(model, tokenizer, text_len or layout.text_len or 512).requires_grad_(False)


def load_vae(
    path: str | Path, dtype: str | torch.dtype = "float32", device: Device = "cpu", *, mmap: bool = False
) -> WanVAE:
    """The autoencoder, frozen. Raises CheckpointError like ``load_dit``."""
    from diffusers import AutoencoderKLWan

    weights = read_headers("vae", location(find_layout(path), "vae"))
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(vae_config(weights.shapes, weights.config, weights.where))
    return WanVAE(_fill(model, weights, dtype_of(dtype), device, mmap)).requires_grad_(False).channels_last()


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise CheckpointError(f"Unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise CheckpointError(f"Weights can be loaded as float32, bfloat16 or float16, not as {dtype}.")
    return dtype


# -- headers --------------------------------------------------------------------------------------------------------


def read_headers(part: str, place: Location, state_key: str | None = None) -> Weights:
    """Open the files of one network and translate their names to the module's. Reads no tensor."""
    raw: dict[str, Source] = {}
    for path in place.files:
        file = open_weights(path, state_key)
        names, clashes = keymaps.clean_keys(file.headers)
        clashes += [name for name in names if name in raw]
        if clashes:
            raise CheckpointError(f"{path} holds {_listed(sorted(clashes))} twice under different prefixes.")
        raw.update({clean: Source(file, name, file.headers[name]) for clean, name in names.items()})
    naming = _naming(part, raw, place)
    tensors = _to_module_names(part, naming, raw)
    return Weights(part, naming, place.files, place.config, tensors)


def _naming(part: str, raw: dict[str, Source], place: Location) -> str:
    """Which naming most of the names follow. CheckpointError if most follow neither."""
    naming, share = _best_naming(part, raw)
    if share < 0.5 or _is_lora(raw):
        raise CheckpointError(
            f"{place.files[0]} is not the {PART_NAMES[part]} of Wan2.1-VACE or VDOT: {_recognise(raw)}."
        )
    return naming


def _best_naming(part: str, raw: Iterable[str]) -> tuple[str, float]:
    """-> ("native" or "library", share of the names that have a rule in it)."""
    keymap, keys = KEYMAPS[part], list(raw)
    native = sum(keymap.to_library(key) is not None for key in keys)
    library = sum(keymap.to_native(key) is not None for key in keys)
    return ("native" if native >= library else "library"), max(native, library) / max(1, len(keys))


def _to_module_names(part: str, naming: str, raw: dict[str, Source]) -> dict[str, Source]:
    """The DiT module has native names, the two others their library's. Names without a rule stay, to be reported."""
    module_naming = "native" if part == "dit" else "library"
    keymap = KEYMAPS[part]
    translate: Callable[[str], str | None] = keymap.to_native if module_naming == "native" else keymap.to_library
    if naming != module_naming:
        raw = {translate(key) or key: source for key, source in raw.items()}
    if part == "text_encoder":  # the embedding is one tensor under two names, of which files hold either or both
        tied = raw.pop("encoder.embed_tokens.weight", None)
        if tied is not None:
            raw.setdefault("shared.weight", tied)
    return raw


def _is_lora(keys: Iterable[str]) -> bool:
    return any("lora_" in key or ".lora." in key for key in keys)


def _recognise(raw: Iterable[str]) -> str:
    """What a file with other names probably is."""
    keys = list(raw)
    if _is_lora(keys):
        return "it is a LoRA adapter, which has to be merged into its base model first"
    part, share = max(((part, _best_naming(part, keys)[1]) for part in KEYMAPS), key=lambda guess: guess[1])
    if share >= 0.5:
        return f"it holds the {PART_NAMES[part]}"
    return f"its tensors are named {_listed(keys, 3)}"


# -- strictness -----------------------------------------------------------------------------------------------------


def compare(weights: Weights, expected: dict[str, tuple[int, ...]], what: str) -> None:
    """CheckpointError naming every missing, unexpected and mis-shaped tensor (ten of each, with counts)."""
    have = weights.shapes
    missing = [key for key in expected if key not in have]
    extra = [key for key in have if key not in expected]
    wrong = [f"{k} is {list(have[k])}, needs {list(s)}" for k, s in expected.items() if have.get(k, s) != s]
    integer = [key for key, source in weights.tensors.items() if not source.header.dtype.is_floating_point]
    problems = [
        f"{len(keys)} {name} ({_listed(keys)})"
        for name, keys in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", wrong),
            ("not floating point", integer),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"{weights.where} does not fit {what}: {'; '.join(problems)}{_hint(missing, extra)}.")


def _hint(missing: list[str], extra: list[str]) -> str:
    if any(key.startswith("vace_") for key in missing) and not any(key.startswith("vace_") for key in extra):
        return "; a Wan2.1 model without the VACE branch cannot be used"
    if any(key.startswith(("_cls_pred_branch", "_gan_ca_blocks", "_register_tokens")) for key in extra):
        return "; these are discriminator heads: load the generator of this training run instead"
    return ""


def _listed(items: list[str], limit: int = 10) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")


# -- tensors --------------------------------------------------------------------------------------------------------


def _fill(
    module: M,
    weights: Weights,
    dtype: torch.dtype,
    device: Device,
    mmap: bool,
    islands: tuple[str, ...] = (),
    sharder: Sharder | None = None,
) -> M:
    """Check, read, cast and assign every tensor of a module that was built on the meta device."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    tied = expected.pop("encoder.embed_tokens.weight", None) if weights.part == "text_encoder" else None
    compare(weights, expected, _describe(weights, module))
    wanted = {key: torch.float32 if any(i in key for i in islands) else dtype for key in weights.tensors}
    if sharder is not None:
        return _fill_shards(module, weights, wanted, torch.device(device), sharder)
    state = dict(_tensors(weights, wanted, torch.device(device), mmap))
    if tied is not None:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    if tied is not None:
        module.tie_weights()  # type: ignore[operator]
    return module.eval()


def _tensors(
    weights: Weights, wanted: dict[str, torch.dtype], device: torch.device, mmap: bool
) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[WeightFile, dict[str, str]] = {}
    for key, source in weights.tensors.items():
        by_file.setdefault(source.file, {})[source.name] = key
    for file, names in by_file.items():
        for name, tensor in file.read({n: wanted[key] for n, key in names.items()}, device, mmap):
            yield names[name], tensor


@torch.no_grad()
def _fill_shards(
    module: M, weights: Weights, wanted: dict[str, torch.dtype], device: torch.device, sharder: Sharder
) -> M:
    """Split the meta module and read this process's rows of every tensor, one tensor in memory at a time."""
    for key, parameter in module.named_parameters():
        parameter.data = parameter.data.to(wanted[key])
    sharder.shard(module, device)
    by_file: dict[WeightFile, dict[str, tuple[Tensor, int]]] = {}
    for key, parameter in module.named_parameters():
        source = weights.tensors[key]
        by_file.setdefault(source.file, {})[source.name] = sharder.local(parameter)
    for file, places in by_file.items():
        rows = {name: Rows(start, start + len(place), place.dtype) for name, (place, start) in places.items()}
        for name, tensor in file.read_rows(rows):
            places[name][0].copy_(tensor)
    return module.eval()


def _describe(weights: Weights, module: nn.Module) -> str:
    if isinstance(module, VaceDiT):
        c = module.config
        return f"a VACE transformer of dim {c.dim}, {c.num_layers} blocks and {len(c.vace_layers)} VACE blocks"
    return f"the {PART_NAMES[weights.part]} that its config and first tensors describe"


def _load_tokenizer(layout: Layout) -> Any:
    """From a folder with ``tokenizer_config.json``, or from UMT5's bare ``spiece.model`` or ``tokenizer.json``."""
    from transformers import AutoTokenizer, T5Tokenizer

    folder = layout.tokenizer
    if folder is None:
        raise CheckpointError(
            f"{layout.path} has no tokenizer (looked for google/umt5-xxl/, umt5-xxl/ and tokenizer/ with "
            "tokenizer.json or spiece.model)."
        )
    kind: Any = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else T5Tokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many types on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(". :")
        raise CheckpointError(f"{folder} is not a usable tokenizer folder: {reason}.") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder} is not the tokenizer of UMT5: it has no padding or no end token.")
    return tokenizer
