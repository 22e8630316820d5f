"""A row's files to pixels, in processes of their own: a decoder that crashes or hangs takes no training run with it."""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdot.conditioning import Condition
from vdot.data.manifest import Layout, Row, check_real
from vdot.errors import InputError, VdotError
from vdot.request import Prepared, prepare
from vdot.runtime import log
from vdot.video import VideoInfo, probe, read_frames, to_model

CLOSED = "the decoding processes have been closed"
PATIENCE = 300.0  # seconds after which a decoder counts as hung


@dataclass(frozen=True)
class Pixels:
    """What is decoded of a row: bytes, a quarter of what the networks get, to be passed between processes."""

    frames: int
    height: int
    width: int
    source: np.ndarray | None  # uint8 [T, H, W, 3]
    mask: np.ndarray | None  # uint8 [T, H, W]
    references: tuple[np.ndarray, ...]  # float32 [3, 1, H, W]: letterboxed between pixels
    real: np.ndarray | None  # uint8 [T, H, W, 3]
    condition_key: bytes  # equal for equal conditions
    real_key: bytes
    prompt: str | None = None  # of a row that has its words only once it is drawn

    def condition(self, device: torch.device | str = "cpu") -> Condition:
        """As :func:`vdot.request.prepare` makes it, bit for bit; bytes are widened where they are needed."""
        source = None if self.source is None else to_model(self.source, device)
        mask = None if self.mask is None else torch.from_numpy(self.mask).to(device).float().div_(255)
        references = [torch.from_numpy(reference).to(device) for reference in self.references]
        return Condition(self.frames, self.height, self.width, source, mask, references)


def widen(rows: Sequence[Pixels], device: torch.device) -> tuple[list[Condition], list[Tensor | None]]:
    """Conditions and real clips of rows of one size, as :meth:`Pixels.condition` and ``to_model`` make them.

    They cross to the device in three copies, not in some for each row.
    """
    clips = [clip for row in rows for clip in (row.source, row.real)]
    videos = _at_once(clips, lambda whole: to_model(whole, device), 0, 1)
    masks = _at_once([row.mask for row in rows], lambda whole: torch.from_numpy(whole).to(device).float().div_(255), 0)
    pictures = [reference for row in rows for reference in row.references]
    references = _at_once(pictures, lambda whole: torch.from_numpy(whole).to(device), 1)
    conditions, reals = [], []
    for row, mask in zip(rows, masks, strict=True):
        source, real = next(videos), next(videos)
        lead = [reference for reference in islice(references, len(row.references)) if reference is not None]
        conditions.append(Condition(row.frames, row.height, row.width, source, mask, lead))
        reals.append(real)
    return conditions, reals


def _at_once(
    parts: Sequence[np.ndarray | None], move: Callable[[np.ndarray], Tensor], axis: int, moved: int | None = None
) -> Iterator[Tensor | None]:
    """``move`` of parts joined along ``axis``, cut up again along that or ``moved``; what is not there stays None."""
    there = [part for part in parts if part is not None]
    lengths = [part.shape[axis] for part in there]
    pieces = iter(move(np.concatenate(there, axis)).split(lengths, axis if moved is None else moved) if there else ())
    return (None if part is None else next(pieces) for part in parts)


def decode(row: Row, layout: Layout) -> Pixels:
    """Read the files of a row as inference would, and its real clip at the same frames and size.

    Raises:
        InputError, OSError: a file cannot be used.
    """
    prepared = prepare(layout.request(row), layout.defaults)
    condition, plan = prepared.condition, prepared.plan
    size = (condition.height, condition.width)
    real = None
    if row.video is not None:
        info = probe(row.video)
        source = None if row.src_video is None else probe(row.src_video)
        check_real(layout, info, source, _mask_info(row))
        real = read_frames(row.video, (plan or layout.free_plan(info)).model_ids, size)
    return pixels_of(prepared, real)


def pixels_of(prepared: Prepared, real: np.ndarray | None) -> Pixels:
    """``real``: uint8 ``[T, H, W, 3]`` of the prepared size, where the row has a clip."""
    condition = prepared.condition
    size = (condition.height, condition.width)
    mask = None if condition.mask is None else (condition.mask * 255).round().byte().numpy()
    references = tuple(reference.numpy() for reference in condition.references)
    keys = _key(condition.frames, *size, prepared.source, mask, *references), _key(condition.frames, *size, real)
    return Pixels(condition.frames, *size, prepared.source, mask, references, real, *keys)


def _mask_info(row: Row) -> VideoInfo | None:
    return None if row.src_mask is None else probe(row.src_mask, allow_image=True)


def _key(*parts: Any) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"|")
    return digest.digest()


class FatalRowError(InputError):
    """A row that ends the process which decodes it; trying again would end another."""


class Workers:
    """Processes that run ``function``, which can be pickled; ``call`` may come from many threads.

    A process that dies or hangs is reported, started anew and given its call once more. What kills two processes in a
    row is a fault of the call: ``FatalRowError``. Without processes the calls are made where they come from.
    """

    def __init__(self, function: Callable[..., Any], count: int, patience: float = PATIENCE) -> None:
        self._workers = [_Worker(function, patience) for _ in range(count)]
        self._function = function
        self._idle: LifoQueue[_Worker] = LifoQueue()  # the last one used first: as few are started as are needed
        for worker in self._workers:
            self._idle.put(worker)

    def call(self, *args: Any) -> Any:
        """``function(*args)``. Its ``VdotError`` or ``OSError`` comes as it is, any other as a RuntimeError."""
        if not self._workers:
            return self._function(*args)
        worker = self._idle.get()
        try:
            try:
                return worker.call(args)
            except _Lost as lost:
                log.warning("a decoding process %s; it is started anew and goes on where it was", lost)
            try:
                return worker.call(args)
            except _Lost as lost:
                raise FatalRowError(f"decoding it a second time, the process {lost} again") from lost
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes, also in the middle of a call."""
        for worker in self._workers:
            worker.close()

    @property
    def processes(self) -> list[int]:
        """Ids of those that were started."""
        return [worker.process.pid for worker in self._workers if worker.process is not None and worker.process.pid]


class _Lost(Exception):
    """Why a process did not answer."""


class _Worker:
    """One process and the line to it."""

    def __init__(self, function: Callable[..., Any], patience: float) -> None:
        self.function, self.patience = function, patience
        self.process: Any = None
        self.line: Connection | None = None
        self._lock = threading.Lock()
        self._closed = False

    def call(self, args: tuple[Any, ...]) -> Any:
        line = self._start()
        try:
            line.send(args)
            if not line.poll(self.patience):
                self._kill()
                raise _Lost(f"has not answered for {self.patience:.0f} s")
            answer, value = line.recv()
        except (EOFError, OSError) as error:
            code = self._kill()
            if self._closed:
                raise RuntimeError(CLOSED) from error
            raise _Lost(f"died ({_cause(code)})") from error
        if answer == "done":
            return value
        if answer == "known":
            raise value
        raise RuntimeError(f"in a decoding process:\n{value}")

    def _start(self) -> Connection:
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self.process is None or self.line is None:
                # Spawned: a fork of a process with threads and a GPU context is not safe.
                context = multiprocessing.get_context("spawn")
                self.line, there = context.Pipe()
                self.process = context.Process(target=_serve, args=(there, self.function), daemon=True)
                self.process.start()
                there.close()  # so that the process's end is the only one, and its death is seen
            return self.line

    def _kill(self) -> int | None:
        with self._lock:
            if self.process is None or self.line is None:
                return None
            self.process.kill()  # before the line is closed: who waits at our end of it is woken by this
            self.process.join()
            self.line.close()
            code = self.process.exitcode
            self.process.close()
            self.process = self.line = None
            return code

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._kill()


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps for want of host memory" if -code == signal.SIGKILL else name


def _serve(line: Connection, function: Callable[..., Any]) -> None:
    """Answer calls until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; who started us ends us
    torch.set_num_threads(1)
    while True:
        try:
            args = line.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", function(*args))
        except (VdotError, OSError) as error:
            answer = ("known", error)
        except Exception:
            answer = ("unknown", traceback.format_exc())
        try:
            line.send(answer)
        except OSError:
            return
