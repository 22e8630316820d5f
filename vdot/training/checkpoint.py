"""Checkpoints of a training run: written beside the training, complete or not there at all, the last few kept.

A folder ``step_00000100`` has the tensors in torch.distributed.checkpoint's format, each rank's shards in a file of its
own, and ``meta.json``: the rest of the state and the size of every file. It is written under a hidden name, flushed to
the disk and renamed at the end, so what has the final name is whole, whatever kills the process. All ranks must see the
same file system.
"""

import base64
import fcntl
import io
import json
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vdot.errors import CheckpointError, OutputError, one_line
from vdot.parallel.launch import TIMEOUT
from vdot.parallel.state import Ranks
from vdot.runtime import log

META = "meta.json"
NOTES = ("meta", "rank")  # the parts of a state that are JSON, not tensors
_NAME = re.compile(r"step_(\d{8,})")

# One process is a use that we mean; the writer's folder is always fresh.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")

State = Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in ``folder``.

    A state is ``{part: {name: tensor or DTensor, nested as deep as wanted}}``, with two parts that are JSON-like
    instead: ``"meta"``, equal on all ranks (step, config, counters), and ``"rank"``, each rank's own (random states,
    see :func:`rng_state`).

    Construction, :meth:`save`, :meth:`wait`, :meth:`latest`, :meth:`load` and :meth:`close` are collective: all ranks
    call them alike, and an error of one is raised on all.

    Args:
        keep: how many complete checkpoints stay.
        read_only: for looking into a run that may be going on: nothing is locked, tidied or written.

    Raises:
        OutputError: the folder cannot be written, or another process trains into it.
    """

    def __init__(self, folder: str | Path, keep: int = 2, ranks: Ranks | None = None, read_only: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.ranks = ranks or Ranks()
        # Used by the writing thread, while the main thread may be using every other group.
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.ranks.world > 1 else None
        self._aside = replace(self.ranks, control=group)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vdot-checkpoint")
        self._running: tuple[int, Future[None]] | None = None
        self._staged: dict[str, Tensor] = {}
        self._reported: set[str] = set()
        self._lock: io.IOBase | None = None
        with self._aside.agree():
            if self.ranks.rank == 0 and not read_only:
                self._open()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            _tidy(self.folder)
        except OSError as error:
            raise OutputError(
                f"checkpoints cannot be written to {self.folder}: {error.strerror or error}", error.strerror
            ) from error

    def _take_lock(self) -> None:
        """The kernel gives it back whatever ends this process; children do not inherit it."""
        lock = (self.folder / ".lock").open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.close()
            raise OutputError(f"another process is training into {self.folder}: wait for it, or end it") from error
        except OSError:  # a file system without locks
            lock.close()
            return
        self._lock = lock

    # --- writing

    def save(self, step: int, state: State, blocking: bool = False) -> None:
        """Copy ``state`` to host memory and return; a thread writes it. Afterwards the weights may change.

        Waits first for a save that is still going on.

        Raises:
            OutputError: without ``blocking``, the save before this one failed, and this one was not begun; with it,
                this one failed (one before gives a warning: a run that is told to stop must save what it has).
        """
        if self._running is not None and not self._running[1].done():
            log.info("the checkpoint of step %d is still being written: waiting for it", self._running[0])
        try:
            self.wait()
        except OutputError as error:
            if not blocking:
                raise
            log.warning("warning: %s; trying again now", error)
        notes = json.dumps({part: state.get(part) for part in NOTES})  # now: they may change as well
        self._stage(flatten(state))
        self._running = step, self._pool.submit(self._write, step, notes)
        if blocking:
            self.wait()

    def wait(self) -> None:
        """Until no save is going on. ``OutputError`` when it failed."""
        if self._running is None:
            return
        future = self._running[1]
        wait_for([future])
        self._running = None
        future.result()

    @torch.no_grad()
    def _stage(self, tensors: Mapping[str, Tensor]) -> None:
        """The buffers stay from save to save, for fresh memory costs as much as the copy."""
        old, self._staged = self._staged, {}
        for name, tensor in tensors.items():
            buffer = old.get(name)
            same = buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
            if buffer is None or not same:
                self._staged[name] = tensor.detach().to("cpu", copy=True)
            else:
                _local(buffer).copy_(_local(tensor))
                self._staged[name] = buffer

    def _write(self, step: int, notes: str) -> None:
        """In the thread, on all ranks: the tensors, the notes, the new name, and room for the next."""
        temporary = self.folder / f".{name_of(step)}.tmp"
        try:
            ranks = self._aside
            with ranks.agree():
                if ranks.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            with ranks.agree():
                if not temporary.is_dir():
                    raise OutputError("it is not the same folder on all ranks", "not on a shared file system")
            everyone = ranks.gather(json.loads(notes)["rank"])
            writer = _Writer(temporary, sync_files=True)
            dcp.save(self._staged, storage_writer=writer, process_group=ranks.control, no_dist=ranks.control is None)
            with ranks.agree():
                if ranks.rank == 0:
                    meta = {"step": step, "meta": json.loads(notes)["meta"], "ranks": everyone}
                    self._complete(step, temporary, meta)
        except (Exception, CheckpointException) as error:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            where = self.folder / name_of(step)
            raise OutputError(
                f"the checkpoint of step {step} could not be written to {where}: {_reason(error)}; "
                "the ones before are untouched",
                _reason(error),
            ) from error

    def _complete(self, step: int, temporary: Path, meta: dict[str, Any]) -> None:
        meta["files"] = {file.name: file.stat().st_size for file in temporary.iterdir()}
        with (temporary / META).open("w", encoding="utf-8") as stream:
            json.dump(meta, stream)
            stream.flush()
            os.fsync(stream.fileno())
        _sync(temporary)
        target = self.folder / name_of(step)
        if target.exists():  # of the same step: tidied up, or put back by whoever comes after a kill
            _hide(target, "old")
        temporary.rename(target)
        _sync(self.folder)
        whole = [s for s in self._steps() if s != step and problem(self.folder / name_of(s)) is None]
        for old in whole[: max(0, len(whole) - (self.keep - 1))]:
            _hide(self.folder / name_of(old), "tmp")
        _tidy(self.folder)

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.folder.iterdir() if (match := _NAME.fullmatch(entry.name)))

    # --- reading

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint; None when there is none at all.

        A damaged one is reported and passed over.

        Raises:
            CheckpointError: there are some, and all are damaged: starting anew would hide that.
        """
        self.wait()
        found: int | None = None
        with self._aside.agree():
            if self.ranks.rank == 0:
                found = self._newest()
        return self._aside.share(found)

    def _newest(self) -> int | None:
        reason = None
        for step in reversed(self._steps()):
            reason = problem(self.folder / name_of(step))
            if reason is None:
                return step
            if name_of(step) not in self._reported:
                log.warning("warning: %s is passed over: %s", self.folder / name_of(step), reason)
                self._reported.add(name_of(step))
        if reason is not None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read (the first: {reason}): move them away to start anew"
            )
        return None

    def read(self, step: int | None = None) -> dict[str, Any]:
        """``{"step": ..., "meta": ..., "rank": ...}`` of the newest (or that) checkpoint, without its tensors.

        ``rank`` is None when the checkpoint is of another number of ranks: random states then have to be made anew.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} has no checkpoint")
        self.wait()
        folder = self.folder / name_of(step)
        with self._aside.agree():
            reason = problem(folder)
            if reason is not None:
                raise CheckpointError(f"{folder} cannot be used: {reason}")
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
        everyone = meta["ranks"]
        mine = everyone[self.ranks.rank] if len(everyone) == self.ranks.world else None
        return {"step": step, "meta": meta["meta"], "rank": mine}

    def load(self, state: State, step: int | None = None, partial: bool = False) -> dict[str, Any]:
        """Fill the tensors of ``state`` in place from the newest (or that) checkpoint; returns what :meth:`read` does.

        The ranks may be more or fewer than those that saved. With ``partial``, parts that ``state`` does not have
        are left where they are; the ones it has must agree in every name, shape and type.

        Raises:
            CheckpointError: there is none, or it is of other networks (nothing was loaded), or it cannot be read.
        """
        notes = self.read(step)
        folder = self.folder / name_of(notes["step"])
        tensors = {name: tensor.detach() for name, tensor in flatten(state).items()}
        reader = _Reader(folder)
        with self._aside.agree():
            check(reader.read_metadata(), tensors, folder, partial)
        group = self._aside.control
        try:
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be read: {_reason(error)}") from error
        return notes

    # --- the end

    def close(self) -> None:
        """Wait for the last save and end the thread. ``OutputError`` when that save failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._staged = {}
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self.ranks.world == 1:  # with others, who may be gone, the process is about to be ended anyway
            try:
                self.close()
            except OutputError as error:
                log.warning("warning: %s", error)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def flatten(state: State) -> dict[str, Tensor]:
    """``{"part/name": tensor}`` without the parts that are notes. ``TypeError`` for anything else among them."""
    return dict(_leaves({part: value for part, value in state.items() if part not in NOTES}, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            yield prefix + name, value
        else:
            raise TypeError(f"{prefix}{name} is {type(value).__name__}, not a tensor: put it into one of {NOTES}")


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _reason(error: BaseException) -> str:
    """In a few words, without tracebacks of other ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        return _reason(cause) + (f" (rank {rank})" if len(error.failures) == 1 else "")
    link: BaseException | None = error
    while link is not None:  # torch.save speaks of positions where the system said that the disk is full
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return one_line(error)[:200] or type(error).__name__


class _Writer(dcp.FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # what led to it does not travel to the other ranks
            raise OSError(getattr(error, "errno", None), _reason(error)) from error


def _sync(folder: Path) -> None:
    """Make names in ``folder`` survive a power cut."""
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hide(folder: Path, why: str) -> None:
    """Rename a checkpoint for :func:`_tidy`: a kill while it is being removed leaves nothing half there."""
    hidden = folder.with_name(f".{folder.name}.{why}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)


def _tidy(folder: Path) -> None:
    """Remove what killed saves left behind; put back a checkpoint that was being replaced."""
    for entry in folder.iterdir():
        match = re.fullmatch(r"\.(step_\d{8,})\.(tmp|old)", entry.name)
        if match is None:
            continue
        target = folder / match[1]
        if match[2] == "old" and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def problem(folder: Path) -> str | None:
    """Why the checkpoint in ``folder`` cannot be used, or None: its files are there and have their sizes."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sizes: dict[str, int] = meta["files"]
        meta["meta"], meta["ranks"]
        for name, size in sizes.items():
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there} bytes instead of {size}"
        _Reader(folder).read_metadata()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        return f"{META} or .metadata is damaged ({one_line(error)[:100]})"
    return None


def check(metadata: Metadata, tensors: Mapping[str, Tensor], folder: Path, partial: bool = False) -> None:
    """``CheckpointError`` naming what differs between a checkpoint and the tensors it is to fill."""
    there = metadata.state_dict_metadata
    parts = {name.split("/")[0] for name in tensors}
    missing = [name for name in tensors if name not in there]
    foreign = [name for name in there if name not in tensors and not (partial and name.split("/")[0] not in parts)]
    other = []
    for name, tensor in tensors.items():
        saved = there.get(name)
        if isinstance(saved, TensorStorageMetadata):
            has, wants = _describe(saved.properties.dtype, saved.size), _describe(tensor.dtype, tensor.shape)
            if has != wants:
                other.append(f"{name} is {has} there and {wants} here")
    findings = [
        _list("it lacks ", missing),
        _list("it has besides ", foreign),
        _list("", other),
    ]
    if any(findings):
        raise CheckpointError(
            f"{folder} is of another training setup, nothing was loaded: " + "; ".join(f for f in findings if f)
        )


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _list(lead: str, items: list[str], count: int = 3) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return lead + ", ".join(items[:count]) + more if items else ""


# The format's table of contents is a pickle. These are all the names that one of tensors needs; a checkpoint from
# elsewhere can thus do no more than describe tensors.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        kind = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if kind or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# --- random numbers --------------------------------------------------------------------------------------------------


def rng_state(device: torch.device, generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Any]:
    """All random states of this process, JSON-like, for a state's ``"rank"``: Python, NumPy, torch, ``device``, own."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    states = {
        "python": _plain(random.getstate()),
        "numpy": [kind, _encode(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(gauss)],
        "torch": _encode_tensor(torch.get_rng_state()),
        "generators": {name: _encode_tensor(g.get_state()) for name, g in (generators or {}).items()},
    }
    if device.type == "cuda":
        states["cuda"] = _encode_tensor(torch.cuda.get_rng_state(device))
    return states


def restore_rng(
    state: Mapping[str, Any], device: torch.device, generators: Mapping[str, torch.Generator] | None = None
) -> None:
    """The opposite of :func:`rng_state`, of the same generators by name."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode_tensor(state["cuda"]), device)
    for name, generator in (generators or {}).items():
        generator.set_state(_decode_tensor(state["generators"][name]))


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _encode_tensor(state: Tensor) -> str:
    return _encode(state.cpu().numpy().tobytes())


def _decode_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
