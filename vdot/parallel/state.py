"""Ranks that agree: one error message, one exit code, nobody left waiting.

Expected errors are exchanged before any collective work (:meth:`Ranks.agree`). For everything else each rank has a
watchdog thread with its own connection to the launcher's store: it beats, watches its neighbour, and ends the process
within a second when any rank has failed, even while the main thread is stuck in a collective.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import psutil
import torch.distributed as dist

from vdot.errors import VdotError, one_line
from vdot.parallel.mesh import Mesh

T = TypeVar("T")
BEAT = 0.2  # seconds between two looks of the watchdog
PATIENCE = 30.0  # seconds without a beat after which a rank counts as lost; VDOT_RANK_PATIENCE overrides it
SETTLE = 2.0  # seconds in which a broken connection may turn out to be another rank's death


class OtherRankFailed(VdotError):
    """This rank is well, another one is not and has said why."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass
class Ranks:
    """This process among the others; the default is a process alone, for which every method is free.

    ``control`` is a gloo group of the ranks that make one video together (of all, until they are arranged); errors
    and other small objects go through it, so that they need no accelerator.
    """

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    world: int = 1
    control: Any = None
    watchdog: "Watchdog | None" = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes its group's results."""
        return self.mesh.sequence.rank == 0

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Run a block that communicates nothing; if it fails on one rank of the group, it fails on all of them.

        The first rank that failed raises its own error, every other :class:`OtherRankFailed` with the same message.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.control is None:
            if error is not None:
                raise error
            return
        mine = None if error is None else (one_line(error), getattr(error, "exit_code", 1), self.rank)
        failures = [report for report in self.gather(mine) if report is not None]
        if not failures:
            return
        message, code, rank = failures[0]
        if error is not None and rank == self.rank:
            raise error
        raise OtherRankFailed(f"rank {rank}: {message}", code) from error

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank of the group."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: T, source: int = 0) -> T:
        """The ``value`` of the group's rank ``source``, on all of them."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, dist.get_global_rank(self.control, source), group=self.control)
        return values[0]


class Board:
    """Notes that all processes can read and write, through a connection of their own to the launcher's store."""

    def __init__(self, name: str = "vdot") -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        # A restarted group of workers must not read the notes of the last one.
        self.store = dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def write(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def count(self, key: str) -> int:
        """One more than the number of calls before, over all processes."""
        return self.store.add(key, 1)


class Queue:
    """Numbers ``0 .. count - 1``, each for the group of ranks that is free first, and what came of them.

    All ranks of a group see the same numbers. Several queues of one run need a name each.
    """

    def __init__(self, ranks: Ranks, count: int, name: str = "vdot-queue") -> None:
        self.ranks, self.count = ranks, count
        self.board = Board(name) if ranks.world > 1 else None
        self.results: dict[int, Any] = {}
        self._taken = 0

    def __iter__(self) -> Iterator[int]:
        while (index := self.ranks.share(self._next() if self.ranks.leads else 0)) < self.count:
            yield index

    def _next(self) -> int:
        self._taken = self._taken + 1 if self.board is None else self.board.count("taken")
        return self._taken - 1

    def report(self, index: int, result: Any) -> None:
        """Keep a JSON-like result of one number, for the first rank to collect."""
        if self.board is None:
            self.results[index] = result
        elif self.ranks.leads:
            self.board.write(f"result/{index}", json.dumps(result))

    def collect(self) -> list[Any]:
        """All results in order, on the first rank once all groups are done; nothing on the others."""
        if self.board is None:
            return [self.results[index] for index in range(self.count)]
        if self.ranks.rank:
            return []
        results: list[Any] = []
        while len(results) < self.count:  # the watchdog ends the wait if a rank is lost
            text = self.board.read(f"result/{len(results)}")
            if text is None:
                time.sleep(BEAT)
            else:
                results.append(json.loads(text))
        return results

    def close(self) -> None:
        """All ranks go on together once the first one is here, which it is after :meth:`collect`: all work is done."""
        if self.board is None:
            return
        if self.ranks.rank == 0:
            self.board.write("closed", "1")
        while self.board.read("closed") is None:
            time.sleep(BEAT)


class Watchdog(threading.Thread):
    """Beats for this rank, watches the next one, and ends the process when any has failed.

    The first rank to report takes the floor (:meth:`report`): only it writes to stderr.

    SIGTERM ends the process, unless ``graceful`` is set: then it ends only those whose neighbour is lost, and somebody
    else (:class:`vdot.training.stop.StopSignal`) has the main thread save and leave.
    """

    graceful = False

    def __init__(self, rank: int, world: int, patience: float | None = None) -> None:
        super().__init__(name="vdot-watchdog", daemon=True)
        self.rank, self.world = rank, world
        given = os.environ.get("VDOT_RANK_PATIENCE")
        self.patience = patience or (float(given) if given else PATIENCE)
        self.board = Board("vdot-watchdog")
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._seen: tuple[str | None, float] = (None, time.monotonic())
        self._woken = self._listen()
        self.board.write(f"process/{rank}", f"{socket.gethostname()}:{os.getpid()}")

    def _listen(self) -> socket.socket | None:
        """A socket that becomes readable on SIGTERM, also while the main thread is inside a collective."""
        if threading.current_thread() is not threading.main_thread():
            return None
        here, there = socket.socketpair()
        there.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        self._there = there  # kept open
        return here

    def run(self) -> None:
        beats = 0
        while not self.ended.is_set():
            terminated = self._sleep()
            if self.ended.is_set():
                return
            try:
                beats += 1
                with self._lock:
                    self.board.write(f"beat/{self.rank}", str(beats))
                    self._look(terminated)
            except Exception:  # the store is gone, and with it the launcher or the rank that held it
                if not self.ended.is_set():
                    os._exit(1)

    def _sleep(self) -> bool:
        """Wait for the next look; whether SIGTERM came meanwhile."""
        if self._woken is None:
            self.ended.wait(BEAT)
            return False
        readable, _, _ = select.select([self._woken], [], [], BEAT)
        return bool(readable) and signal.SIGTERM in self._woken.recv(64)

    def _look(self, terminated: bool) -> None:
        code = self.board.read("failed")
        if code is not None:
            os._exit(int(code))
        # On SIGTERM any rank may be why: the launcher ends all others as soon as one has died.
        others = range(self.world) if terminated else [(self.rank + 1) % self.world]
        for other in others:
            reason = None if other == self.rank else self._lost(other, terminated)
            if reason is not None:
                self._say(f"error: rank {other} {reason}", 1)
                self._kill(other)
                os._exit(1)
        if terminated and not self.graceful:
            code = self.board.read("failed")  # another rank may have had its say since the first look
            os._exit(128 + signal.SIGTERM if code is None else int(code))

    def _lost(self, other: int, now: bool) -> str | None:
        """Why rank ``other`` will not come back, or None."""
        where = self.board.read(f"process/{other}")
        if where is None or self.board.read(f"done/{other}") is not None:
            return None
        host, pid = where.rsplit(":", 1)
        if host == socket.gethostname() and not _alive(int(pid)):
            if self.board.read("failed") is not None:  # it had its say while we looked
                return None
            return f"(process {pid} on {host}) was killed, perhaps for want of host memory; all others end too"
        if now:
            return None
        beat = self.board.read(f"beat/{other}")
        if beat != self._seen[0]:
            self._seen = beat, time.monotonic()
        silent = time.monotonic() - self._seen[1]
        if silent < self.patience:
            return None
        return f"(process {pid} on {host}) has not answered for {silent:.0f} s; all others end too"

    def _kill(self, other: int) -> None:
        """A stopped process of this run is deaf to the launcher's SIGTERM, which would be waited for."""
        host, pid = (self.board.read(f"process/{other}") or ":0").rsplit(":", 1)
        if host == socket.gethostname() and int(pid) > 0:
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)

    def _say(self, message: str, code: int) -> None:
        """Write one line to stderr, unless another rank already has."""
        if self.board.count("failures") == 1:
            with suppress(OSError):  # nobody listens any more
                os.write(2, (message + "\n").encode(errors="replace"))
        self.board.write("failed", str(code))

    def report(self, message: str, code: int) -> None:
        """Say why this rank failed, if it is the first, and make all others end with ``code``."""
        with self._lock:
            self._say(message, code)

    def finish(self) -> None:
        """This rank is done and well: its silence from now on means nothing."""
        with self._lock:
            self.ended.set()
            self.board.write(f"done/{self.rank}", "1")


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_together(ranks: Ranks, error: BaseException, message: str, code: int) -> NoReturn:
    """End every process because of ``error`` on this one: one message on stderr, ``code`` as the exit code.

    A foreign error may be the echo of another rank's death (a connection that closed): the watchdogs get a moment to
    find out, and end this process if so. Nothing is torn down: that would wait for ranks that are gone.
    """
    assert ranks.watchdog is not None
    sys.stdout.flush()
    if isinstance(error, OtherRankFailed):
        time.sleep(PATIENCE)  # the watchdog ends this process as soon as the other has spoken
    if not isinstance(error, VdotError | KeyboardInterrupt):
        time.sleep(SETTLE)
    ranks.watchdog.report(message, code)
    os._exit(code)
