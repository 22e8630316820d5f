"""Weight files: what they hold without reading it, and their tensors one at a time without holding two copies.

A safetensors header is JSON; a ``.pt`` is unpickled with ``weights_only=True`` over a memory map, so that in both
cases names and shapes cost no tensor memory and a pickle cannot run code.

Who owns the memory. By default every tensor is read into memory of its own: training in place, or the file being
replaced or deleted later, is safe, and peak memory is what is kept plus a few megabytes. With ``mmap=True`` tensors
that need no cast stay in a private copy-on-write map of the file: loading is instant and writing to them never
reaches the file, but the file must not be truncated or overwritten in place while they live.
"""

import json
import logging
import math
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vdot.errors import CheckpointError

log = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STATE_KEYS = ("generator", "generator_ema", "model", "state_dict")  # the first one present is the state dict
CAST_ELEMENTS = (
    32768  # cast at a time: stays in the processor's cache, and the most that torch casts in one thread (waking
)
#                       others for every piece takes ten times as long on a busy machine)
GROUP_BYTES = 256 << 20  # of a mapped file that one rank reads rows of before it is mapped anew
HUGE_HEADER = 100 << 20  # a safetensors header is kilobytes; more than this is not one


@dataclass(frozen=True)
class Header:
    """One tensor as its file describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, stop)`` of a tensor, to be read as ``dtype``."""

    start: int
    stop: int
    dtype: torch.dtype


class WeightFile(Protocol):
    """``headers`` by the names in the file; ``read`` yields the asked-for tensors in file order, cast and placed."""

    path: Path
    headers: dict[str, Header]

    def read(
        self, wanted: Mapping[str, torch.dtype], device: torch.device, mmap: bool = False
    ) -> Iterator[tuple[str, Tensor]]: ...

    def read_rows(self, wanted: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
        """Only some rows (of the first dimension) of each tensor, cast, on the CPU."""
        ...


def open_weights(path: Path, state_key: str | None = None) -> WeightFile:
    """Open one file by what its first bytes say, whatever its extension. CheckpointError says what is wrong with it.

    ``state_key`` picks one of several state dicts in a ``.pt`` (``generator``, ``generator_ema``, ...).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    _refuse_placeholders(path, head)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return TorchFile(path, state_key, zipped=head[:2] == b"PK")
    return SafetensorsFile(path)


def _refuse_placeholders(path: Path, head: bytes) -> None:
    if path.suffix in (".incomplete", ".part", ".crdownload", ".aria2"):
        raise CheckpointError(f"{path} is an unfinished download: complete it first.")
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-LFS pointer, not the weights: run `git lfs pull` in its folder.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download went to an error or login page.")
    if head[:4] == b"GGUF":
        raise CheckpointError(f"{path} is a GGUF file, which is not supported: use the safetensors release.")


class SafetensorsFile:
    """A ``.safetensors`` file: 8 bytes of header length, JSON, then the tensors back to back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        table, start = _safetensors_header(path)
        self.headers: dict[str, Header] = {}
        self._offsets: dict[str, int] = {}
        end = start
        for key, entry in table.items():
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(f"{path} stores {key} as {entry['dtype']}, which is not supported.")
            self.headers[key] = Header(tuple(entry["shape"]), dtype)
            self._offsets[key] = start + entry["data_offsets"][0]
            end = max(end, start + entry["data_offsets"][1])
            if entry["data_offsets"][1] - entry["data_offsets"][0] != self.headers[key].nbytes:
                raise CheckpointError(f"{path} is damaged: {key} does not have the size of its shape.")
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(f"{path} is cut short ({size:,} of {end:,} bytes): download it again.")

    def read(
        self, wanted: Mapping[str, torch.dtype], device: torch.device, mmap: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        keys = sorted(wanted, key=self._offsets.__getitem__)
        if mmap:
            storage: Any = torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
            for key in [key for key in keys if self._mappable(key, wanted[key])]:
                keys.remove(key)
                yield key, self._view(key, storage).to(device)
        # One pass in file order by one reader: what disks and the kernel's read-ahead like best.
        with self.path.open("rb", buffering=0) as file:
            scratch = torch.empty(8 * CAST_ELEMENTS, dtype=torch.uint8)
            for key in keys:
                header = self.headers[key]
                # What goes to another device is cast there.
                out = torch.empty(header.shape, dtype=wanted[key] if device.type == "cpu" else header.dtype)
                file.seek(self._offsets[key])
                _read(file, header.dtype, out.view(-1), scratch)
                yield key, out.to(device).to(wanted[key])

    def read_rows(self, wanted: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
        keys = sorted(wanted, key=self._offsets.__getitem__)
        with self.path.open("rb", buffering=0) as file:
            scratch = torch.empty(8 * CAST_ELEMENTS, dtype=torch.uint8)
            for key in keys:
                header, rows = self.headers[key], wanted[key]
                shape = (rows.stop - rows.start, *header.shape[1:])
                out = torch.empty(math.prod(shape), dtype=rows.dtype)
                row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
                file.seek(self._offsets[key] + rows.start * row_bytes)
                _read(file, header.dtype, out, scratch)
                yield key, out.view(shape)

    def _mappable(self, key: str, dtype: torch.dtype) -> bool:
        return self.headers[key].dtype == dtype and self._offsets[key] % dtype.itemsize == 0

    def _view(self, key: str, storage: Any) -> Tensor:
        header = self.headers[key]
        view = torch.empty(0, dtype=header.dtype)
        view.set_(storage, self._offsets[key] // header.dtype.itemsize, header.shape, _strides(header.shape))
        return view


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """-> (name -> entry, position of the first tensor byte)."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= HUGE_HEADER:
            raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch weight file.")
        text = file.read(length)
    if len(text) < length:
        if text[:1] != b"{":
            raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch weight file.")
        raise CheckpointError(f"{path} is cut short inside its header: download it again.")
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        for entry in table.values():
            entry["dtype"], entry["shape"], entry["data_offsets"][1]
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is neither a safetensors nor a PyTorch weight file.") from error
    return table, 8 + length


def _read(file: Any, dtype: torch.dtype, out: Tensor, scratch: Tensor) -> None:
    """Fill the flat ``out`` from the file's position, where ``dtype`` is stored, casting on the way."""
    if dtype == out.dtype:
        _fill(file, out)
        return
    buffer = scratch.view(dtype)[:CAST_ELEMENTS]
    for part in out.split(len(buffer)):
        source = buffer[: part.numel()]
        _fill(file, source)
        part.copy_(source)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _fill(file: Any, out: Tensor) -> None:
    view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} was cut short while it was read.")
        done += count


class TorchFile:
    """A ``torch.save`` file, current (zip, memory-mapped) or legacy, unwrapped to its state dict."""

    def __init__(self, path: Path, state_key: str | None = None, zipped: bool = True) -> None:
        self.path = path
        self._state_key = state_key
        self._mapped = zipped
        state, self.chosen = self._open()
        self.headers = {key: Header(tuple(t.shape), t.dtype) for key, t in state.items()}
        if self.chosen:
            log.info("%s: using the state dict under %s.", path, self.chosen)

    def _open(self) -> tuple[dict[str, Tensor], str]:
        content = _unpickle(self.path, self._mapped)
        return _state_dict(self.path, content, self._state_key)

    def read(
        self, wanted: Mapping[str, torch.dtype], device: torch.device, mmap: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        keys = [key for key in self.headers if key in wanted]
        total = sum(self.headers[key].nbytes for key in keys)
        # Pages of a map stay resident once read. Mapping the file anew every 1/16 drops them.
        limit = max(total // 16, 64 << 20) if self._mapped and not mmap else max(total, 1)
        done = 0
        for group in _groups(keys, lambda key: self.headers[key].nbytes, limit):
            state, _ = self._open()
            size = sum(self.headers[key].nbytes for key in group)
            _read_ahead(self.path, done, size)
            done += size
            for key in group:
                tensor = state.pop(key).detach()
                if device.type != "cpu":
                    yield key, tensor.to(device).to(wanted[key])
                else:
                    keep = mmap and tensor.dtype == wanted[key]
                    yield key, tensor if keep else tensor.to(wanted[key], copy=True)

    def read_rows(self, wanted: Mapping[str, Rows]) -> Iterator[tuple[str, Tensor]]:
        keys = [key for key in self.headers if key in wanted]
        # As above: mapping anew drops the pages that were read. They belong to the file and are shared by processes.
        for group in _groups(keys, lambda key: self.headers[key].nbytes, GROUP_BYTES if self._mapped else 1 << 62):
            state, _ = self._open()
            for key in group:
                rows = wanted[key]
                yield key, state[key].detach()[rows.start : rows.stop].to(rows.dtype, copy=True)


def _read_ahead(path: Path, start: int, size: int) -> None:
    """Have the kernel fetch a stretch of the file in one go: page faults would fetch it in small pieces.

    ``start`` is a guess (tensors are stored in the order of their names, nearly always); a wrong one only costs time.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, size + (1 << 20), os.POSIX_FADV_WILLNEED)


def _unpickle(path: Path, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            what = f"wants to run or build {unsafe[1]} when opened"
            raise CheckpointError(
                f"{path} {what} and was refused without running it: only plain tensors are loaded; "
                "if you trust its author, convert it to safetensors elsewhere."
            ) from error
        raise CheckpointError(f"{path} is damaged or not a weight file ({_first_line(error)}).") from error
    except Exception as error:  # damaged pickles and archives raise about anything
        raise CheckpointError(f"{path} is cut short or damaged ({_first_line(error)}): download it again.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(". ")


def _state_dict(path: Path, content: Any, state_key: str | None) -> tuple[dict[str, Tensor], str]:
    """-> (name -> tensor, the keys it was found under)."""
    chosen: list[str] = []
    while isinstance(content, Mapping):
        nested = [key for key in STATE_KEYS if isinstance(content.get(key), Mapping)]
        if state_key is not None and not chosen:
            if not isinstance(content.get(state_key), Mapping):
                have = ", ".join(nested) or "none"
                raise CheckpointError(f"{path} has no state dict named {state_key} (it has: {have}).")
            nested = [state_key]
        if not nested:
            break
        if len(nested) > 1:
            log.warning("%s holds %s: %s is used.", path, " and ".join(nested), nested[0])
        chosen.append(nested[0])
        content = content[nested[0]]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of named tensors.")
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if len(state) < len(content):
        other = next(str(key) for key in content if key not in state)
        raise CheckpointError(f"{path} is not a state dict of named tensors: {other!r} in it is something else.")
    if not state:
        raise CheckpointError(f"{path} holds no tensors.")
    return state, ".".join(chosen)


def _groups(keys: Sequence[str], size: Any, limit: int) -> Iterator[list[str]]:
    """Consecutive groups of about ``limit`` bytes, never empty."""
    group: list[str] = []
    total = 0
    for key in keys:
        if group and total + size(key) > limit:
            yield group
            group, total = [], 0
        group.append(key)
        total += size(key)
    if group:
        yield group
