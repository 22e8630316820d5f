"""The queue and its worker's ends, with a worker of a few lines in place of a model."""

import threading
import time
from multiprocessing import Pipe
from typing import Any

import pytest

from vdot.errors import InputError
from vdot.page.engine import Engine, WorkerError
from vdot.page.worker import Order
from vdot.request import Request
from vdot.sampling import FewStepSchedule

RECORD = {"seconds": {"sample": 2.0}}


class _Thread:
    """Stands in for a process."""

    def __init__(self, thread: threading.Thread) -> None:
        self.thread = thread

    def is_alive(self) -> bool:
        return self.thread.is_alive()


class FakeCrew:
    """Its child does what an order's prompt says: "ok", "bad", "slow" (until cancelled), "die"."""

    def __init__(self, starts: str = "ready") -> None:
        self.starts, self.generation, self.done = starts, 0, []

    def start(self) -> None:
        self.pipe, there = Pipe()
        thread = threading.Thread(target=self._work, args=(there,), daemon=True)
        self.process = _Thread(thread)
        thread.start()

    def _work(self, pipe: Any) -> None:
        if self.starts == "fatal":
            return pipe.send(("fatal", "the checkpoint is gone", 2, True))
        if self.starts == "ready":
            pipe.send(("ready", 1e9))
        try:
            while self.starts == "ready" and self._one(pipe):
                pass
        except (EOFError, OSError):
            pass
        pipe.close()

    def _one(self, pipe: Any) -> bool:
        kind, number, *rest = pipe.recv()
        if kind != "order":
            return True
        wanted = rest[0].request.prompt
        self.done.append(wanted)
        if wanted == "die":
            return False
        pipe.send(("step", number, 1, 4, b"picture"))
        if wanted == "slow":
            assert pipe.recv() == ("cancel", number)
            pipe.send(("cancelled", number))
        elif wanted == "bad":
            pipe.send(("failed", number, "it does not fit"))
        else:
            pipe.send(("done", number, RECORD, 4e9))
        return True

    def outdated(self) -> bool:
        return False

    def end(self, said: str | None = None, known: bool = True) -> str:
        self.generation += 1
        return said or "the process that generates was killed"

    def finish(self) -> None:
        pass


@pytest.fixture
def engine():
    made = Engine(FakeCrew(), longest=3)
    yield made
    made.close()


def order(prompt: str) -> Order:
    return Order(Request(prompt), FewStepSchedule(), "/nowhere", {})


def finished(ticket: Any) -> str:
    assert ticket.ended.wait(60)
    return ticket.status


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failing_order_shows_its_sentence_and_the_next_one_works(engine):
    engine.begin()
    bad, good = engine.submit(order("bad")), engine.submit(order("ok"))
    assert finished(bad) == "failed" and bad.message == "it does not fit"
    assert finished(good) == "done" and good.preview == b"picture"
    assert engine.measured and engine.seconds_for(2e9) == pytest.approx(1.0)


def test_a_worker_that_dies_brings_a_message_and_a_restart(engine):
    engine.begin()
    dead, next_one = engine.submit(order("die")), engine.submit(order("ok"))
    assert finished(dead) == "failed" and "was killed; the model is loaded again" in dead.message
    assert finished(next_one) == "done" and engine.restarts == 1


def test_first_come_first_served_with_positions_and_a_limit(engine):
    tickets = [engine.submit(order(prompt)) for prompt in ("slow", "ok", "a")]  # nobody serves yet
    assert [engine.position(ticket) for ticket in tickets] == [0, 1, 2]
    with pytest.raises(InputError, match="3 videos are waiting already"):
        engine.submit(order("one too many"))
    engine.begin()
    until(lambda: tickets[0].step == 1)
    assert [engine.position(ticket) for ticket in tickets] == [0, 1, 2]
    engine.cancel(tickets[1])
    assert finished(tickets[1]) == "cancelled" and engine.position(tickets[2]) == 1
    engine.cancel(tickets[0])
    assert finished(tickets[0]) == "cancelled" and finished(tickets[2]) == "done"
    assert engine.crew.done == ["slow", "a"]


@pytest.mark.parametrize("starts,generations,why", [("fatal", 1, "the checkpoint is gone"), ("dies", 3, "was killed")])
def test_a_worker_that_never_starts_is_given_up(starts, generations, why):
    engine = Engine(FakeCrew(starts), longest=3)
    ticket = engine.submit(order("ok"))
    engine.begin()
    with pytest.raises(WorkerError, match=why):
        engine.wait_ready()
    assert finished(ticket) == "failed" and engine.crew.generation == generations
    with pytest.raises(InputError, match="the model does not start"):
        engine.submit(order("ok"))
