"""The queue of a page and the one who serves it: first come, first served, by a worker that is restarted."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from vdot.errors import InputError, VdotError
from vdot.page.crew import Crew
from vdot.page.worker import Order
from vdot.runtime import log

ATTEMPTS = 3  # generations in a row that may end before they are ready
ENDED = ("done", "failed", "cancelled")
EFFICIENCY = 0.3  # of a network against a plain matrix product, until a video has been measured


class WorkerError(VdotError):
    """The worker cannot be had: it failed several times before it was ready. Says why."""


@dataclass
class Ticket:
    """An order on its way. Written by the engine's thread, read by anybody."""

    number: int
    order: Order
    status: str = "waiting"  # waiting, running, done, failed, cancelled
    stage: str = ""
    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    message: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    seconds: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.status in ENDED


class Engine:
    """Owns the queue and this rank's crew."""

    def __init__(self, crew: Crew, longest: int) -> None:
        self.crew, self.longest = crew, longest
        self.waiting: deque[Ticket] = deque()
        self.running: Ticket | None = None
        self.ready = threading.Event()
        self.broken: str | None = None  # why there is no worker and will be none
        self.exit_code = 1
        self.restarts = 0
        self.speed = 0.0  # operations a second
        self.measured = False
        self._change = threading.Condition(threading.RLock())
        self._count = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="vdot-page-engine", daemon=True)

    # -- the page's side -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._thread.start()

    def wait_ready(self) -> None:
        """``WorkerError`` when the worker cannot be started."""
        while not self.ready.wait(0.1):
            if self.broken is not None:
                raise WorkerError(self.broken)

    def submit(self, order: Order) -> Ticket:
        """Put an order at the end of the queue. ``InputError`` when it is full or nobody serves it."""
        with self._change:
            if self.broken is not None:
                raise InputError(f"no video can be made, the model does not start: {self.broken}")
            if len(self.waiting) >= self.longest:
                raise InputError(f"{self.longest} videos are waiting already: try again in a while")
            self._count += 1
            ticket = Ticket(self._count, order)
            self.waiting.append(ticket)
            self._change.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """A waiting order is dropped now, a running one at its next step on all ranks."""
        with self._change:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self._end(ticket, "cancelled")
            elif ticket is self.running:
                try:
                    self.crew.pipe.send(("cancel", ticket.number))
                except OSError:
                    log.info("order %d ends with its worker", ticket.number)

    def position(self, ticket: Ticket) -> int:
        """How many come first: 0 for the one that runs or is next with nobody before it."""
        with self._change:
            ahead = list(self.waiting).index(ticket) if ticket in self.waiting else 0
            return ahead + (self.running is not None and ticket is not self.running)

    def seconds_for(self, flops: float) -> float | None:
        return flops / self.speed if self.speed else None

    def close(self) -> None:
        self._closing = True
        with self._change:
            self._change.notify_all()
        self.crew.finish()

    # -- the worker's side ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._closing:
            self.crew.start()
            was_ready, said, known = self._talk()
            self.ready.clear()
            if self._closing:
                return
            why = self.crew.end(said, known)
            failures = 0 if was_ready else failures + 1
            self.restarts += 1
            log.error("%s; starting again", why)
            self._fail_running(f"{why}; the model is loaded again, try once more")
            if failures >= ATTEMPTS or (said is not None and not was_ready and self.exit_code == 2):
                self._give_up(why)
                return

    def _talk(self) -> tuple[bool, str | None, bool]:
        """Serve with one worker until it ends: whether it was ever ready, what it said of its end, if it was sure."""
        was_ready = False
        try:
            while not self._closing:
                if was_ready and self.running is None:
                    self._next()
                if not self.crew.pipe.poll(0.02 if self.running is None else 0.2):
                    if self.crew.outdated() or not self.crew.process.is_alive():
                        break
                    continue
                event = self.crew.pipe.recv()
                if event[0] == "ready":
                    was_ready = True
                    if not self.measured:
                        self.speed = event[1] * EFFICIENCY
                    self.ready.set()
                elif event[0] == "fatal":
                    self.exit_code = event[2]
                    return was_ready, event[1], event[3]
                else:
                    self._hear(*event)
        except (EOFError, OSError):
            pass
        return was_ready, None, True

    def _next(self) -> None:
        with self._change:
            if not self.waiting:
                self._change.wait(0.2)
            if not self.waiting:
                return
            ticket = self.running = self.waiting.popleft()
            ticket.status, ticket.started = "running", time.monotonic()
            ticket.steps = ticket.order.schedule.steps
        self.crew.pipe.send(("order", ticket.number, replace(ticket.order, original=None)))

    def _hear(self, kind: str, number: int, *rest: Any) -> None:
        ticket = self.running
        if ticket is None or ticket.number != number:
            return
        if kind == "stage":
            ticket.stage = rest[0]
        elif kind == "step":
            ticket.step, ticket.steps, ticket.preview = rest
        elif kind == "done":
            ticket.record = rest[0]
            self.speed, self.measured = rest[1] / max(sum(ticket.record["seconds"].values()), 1e-3), True
            self._end(ticket, "done")
        else:
            ticket.message = rest[0] if rest else ""
            self._end(ticket, kind)

    def _end(self, ticket: Ticket, status: str) -> None:
        with self._change:
            ticket.seconds = time.monotonic() - ticket.started if ticket.started else 0.0
            ticket.status = status
            if ticket is self.running:
                self.running = None
            ticket.ended.set()

    def _fail_running(self, message: str) -> None:
        if self.running is not None:
            self.running.message = message
            self._end(self.running, "failed")

    def _give_up(self, why: str) -> None:
        with self._change:
            self.broken = why
            waiting = list(self.waiting)
            self.waiting.clear()
        for ticket in waiting:
            ticket.message = why
            self._end(ticket, "failed")
