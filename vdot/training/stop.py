"""Stopping on request: SIGTERM, Ctrl-C and SLURM's warning let the step finish; the loop then saves and leaves."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from vdot.parallel.state import Ranks

# SIGUSR1 is what clusters send ahead of the end of a job's time (sbatch --signal=USR1@120).
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopSignal:
    """While entered, the first of :data:`SIGNALS` only sets :attr:`requested`; a second Ctrl-C interrupts at once.

    Of several processes any one may get the signal (a launcher forwards it to those of its machine): the loop asks
    :meth:`agreed` after each step, or reduces :attr:`requested` (largest over ranks) together with its metrics.
    torchrun waits 30 s between SIGTERM and SIGKILL, so step and save together should take less.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.reason: str | None = None  # the first signal's name
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process got a signal; others may not have."""
        return self.reason is not None

    def agreed(self) -> bool:
        """Whether any rank got a signal: the same answer on all. One all-reduce of four bytes through gloo.

        Collective over all ranks.
        """
        if self.ranks.world == 1:
            return self.requested
        flag = torch.tensor(int(self.requested), dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)  # of the default group, whose CPU backend is gloo
        return bool(flag)

    def request(self, reason: str) -> None:
        """Ask for a stop as a signal would."""
        self.reason = self.reason or reason

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            # The watchdog's wakeup descriptor stays: it is told of every signal that has a handler.
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
            self._set_graceful(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._before:
            self._set_graceful(False)
        self._before = {}

    def _set_graceful(self, value: bool) -> None:
        if self.ranks.watchdog is not None:
            self.ranks.watchdog.graceful = value

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.reason == "SIGINT":
            raise KeyboardInterrupt
        if name == "SIGINT" and self.ranks.rank == 0:
            # Not through logging: the main thread may be in the middle of a message.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step and saving; Ctrl-C again stops at once, without saving\n")
        if not self.requested or name == "SIGINT":
            self.reason = name
