"""The folder of encoded rows: what is stored as what, whole or not at all, and told apart from what rotted.

- ``meta.json``: how the rows were cut and by which weights, so that a run with others is refused;
- ``part-<name>.safetensors``: up to 64 rows each (more of small clips), with their keys and checksums in the header. A
  file appears whole or not at all, and is named by what it holds, so that any number of ranks and runs may write at
  once;
- ``index.jsonl``: the rows of the table as it was last encoded, by key; written when all of them are there;
- ``negative.safetensors``: the negative prompt.

Text and the context's latents are bfloat16 by default, the precision that the networks read them in. The mask channels
are bytes, which is exact, and one byte where the whole mask has one value. Real latents are always float32: a
discriminator compares them with samples that were never rounded.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vdot.checkpoints.reading import HUGE_HEADER, SAFETENSORS_DTYPES
from vdot.data.batch import Example, Shape
from vdot.data.manifest import Layout
from vdot.errors import InputError
from vdot.video import atomic_path

VERSION = 1  # of what is computed and stored: another one is never mixed in
STORE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MASK_CHANNELS = 64
META, INDEX, NEGATIVE = "meta.json", "index.jsonl", "negative.safetensors"
NAMES = ("text", "latents", "mask", "real")  # of a row's tensors


@dataclass(frozen=True)
class Settings:
    """``meta.json``: all that decides an encoded row besides the row, and the negative prompt that lies beside them."""

    version: int
    weights: dict[str, str]  # weights_identity
    layout: Layout
    dtype: str  # that the text encoder computed in
    vae_dtype: str
    store: str
    text_len: int
    negative_prompt: str

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """``InputError`` when the folder holds no encoded rows, or those of another version."""
        try:
            values = json.loads((folder / META).read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise InputError(f"{folder} was encoded by another version of this program: encode the table again")
            return cls(**{**values, "layout": Layout(**values["layout"])})
        except FileNotFoundError as error:
            raise InputError(f"{folder} holds no encoded rows: make them with training/encode.py") from error
        except OSError as error:
            raise InputError(f"{folder}/{META} cannot be read: {error.strerror or error}") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{folder}/{META} is damaged: encode the table again, into another folder") from error

    def write(self, folder: Path) -> None:
        _write(folder / META, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    def of_rows(self) -> dict[str, Any]:
        """What decides the rows, by name."""
        values = {**asdict(self), **asdict(self.layout)}
        del values["layout"], values["negative_prompt"]
        return values

    def difference(self, other: "Settings") -> str | None:
        """The first thing in which their rows differ, in words."""
        theirs = other.of_rows()
        for name, mine in self.of_rows().items():
            if mine != theirs[name]:
                return f"{name} {mine}, not {theirs[name]}"
        return None


@dataclass(frozen=True)
class Place:
    """Where an encoded row lies, and what its bytes must hash to."""

    file: Path
    number: int  # in the file
    checksum: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]  # dtype, shape, first and last byte


def write_shard(path: Path, rows: dict[str, dict[str, Tensor]]) -> None:
    """Write packed rows by key as one file, whole or not at all. ``OutputError`` when the disk refuses."""
    tensors: dict[str, Tensor] = {}
    headers = []
    for number, (key, stored) in enumerate(rows.items()):
        tensors |= {f"{number}.{name}": tensor for name, tensor in stored.items()}
        headers.append({"key": key, "checksum": _checksum(key, stored)})
    _write(path, save(tensors, {"rows": json.dumps(headers)}))


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def pack(example: Example, store: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an example as they are stored."""
    context, references = example.context, example.references
    mask = (context[-MASK_CHANNELS:, references:] * 255).round().byte()
    if bool((mask == mask.flatten()[0]).all()):
        mask = mask[:1, :1, :1, :1]
    packed = {
        "text": example.text.to(store),
        "latents": context[:-MASK_CHANNELS].to(store),
        "mask": mask,
    }
    if example.real is not None:
        packed["real"] = example.real.float()
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(stored: dict[str, Tensor], references: int) -> tuple[Tensor, Tensor | None]:
    """Packed tensors -> context float32 ``[96, R + F, H, W]``, real latents."""
    latents = stored["latents"].float()
    mask = latents.new_zeros(MASK_CHANNELS, *latents.shape[1:])  # 0 on references: keep
    mask[:, references:] = stored["mask"].float().div_(255)
    return torch.cat([latents, mask]), stored.get("real")


def _checksum(key: str, stored: dict[str, Tensor]) -> str:
    digest = blake2b(key.encode(), digest_size=16)
    for name in NAMES:
        if name in stored:
            digest.update(f"{name} {stored[name].dtype} {tuple(stored[name].shape)}".encode())
            digest.update(stored[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_shard(path: Path) -> dict[str, Place]:
    """Places of a file's rows by key. ``InputError`` when its header is damaged or its end is missing."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > HUGE_HEADER:
                raise ValueError
            table = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
        headers = json.loads(table.pop("__metadata__")["rows"])
        places: dict[str, Place] = {}
        tensors: list[dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]] = [{} for _ in headers]
        for name, entry in table.items():
            number, _, part = name.partition(".")
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
            if last > size or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError
            tensors[int(number)][part] = (dtype, shape, first, last)
        for number, header in enumerate(headers):
            places[header["key"]] = Place(path, number, header["checksum"], tensors[number])
        return places
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise InputError(f"{path} is damaged: delete it and encode the table again") from error


def read_row(key: str, place: Place) -> dict[str, Tensor]:
    """The stored tensors of a row. ``InputError`` when they are not what was written, ``OSError`` from the disk."""
    stored: dict[str, Tensor] = {}
    with place.file.open("rb") as file:
        for name, (dtype, shape, first, last) in place.tensors.items():
            file.seek(first)
            data = bytearray(file.read(last - first))
            if len(data) < last - first:
                raise InputError(f"{place.file} is cut short: delete it and encode the table again")
            stored[name] = torch.frombuffer(data, dtype=dtype).reshape(shape)
    if _checksum(key, stored) != place.checksum:
        raise InputError(
            f"{place.file} is damaged at row {place.number}: its checksum is wrong; delete the file and encode again"
        )
    return stored


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def find_rows(folder: Path) -> dict[str, Place]:
    """Every row of the folder by key. ``InputError`` names a file that is damaged."""
    places: dict[str, Place] = {}
    with ThreadPoolExecutor(8, "vdot-shards") as pool:
        for found in pool.map(read_shard, part_files(folder)):
            places.update(found)
    return places


@dataclass(frozen=True)
class Record:
    """A line of ``index.jsonl``."""

    key: str
    line: int  # of the table
    task: str
    prompt: str
    paired: bool
    shape: Shape


def write_index(folder: Path, records: Sequence[Record]) -> None:
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    _write(folder / INDEX, ("\n".join(lines) + "\n").encode())


def read_index(folder: Path) -> list[Record]:
    """``InputError`` when the table was not encoded to its end, or the file is damaged."""
    try:
        lines = (folder / INDEX).read_text(encoding="utf-8").split("\n")
        values = [json.loads(line) for line in lines if line]
        return [Record(**{**value, "shape": Shape(**value["shape"])}) for value in values]
    except FileNotFoundError as error:
        raise InputError(f"the table of {folder} is not encoded to its end: run training/encode.py again") from error
    except OSError as error:
        raise InputError(f"{folder}/{INDEX} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/{INDEX} is damaged: run training/encode.py again, it writes it anew") from error
