"""The child process of one rank, started again whenever any rank's has ended.

Under torchrun every process of the launcher keeps such a child, and only the children meet in collectives. They are
counted in generations: when one ends, all of its generation do (their watchdogs see to it), and the next one begins.
"""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from typing import Any

from vdot.page.options import PageConfig
from vdot.page.worker import work
from vdot.parallel.launch import Launch
from vdot.parallel.state import GENERATION, Board
from vdot.runtime import log

LOOK = 0.2  # seconds between two looks at the others
WHY = 5.0  # seconds in which the rank that failed first may say why


class Crew:
    """This rank's child: ``start`` it, talk through ``pipe``, and when it ends learn ``why``."""

    def __init__(self, config: PageConfig, launch: Launch) -> None:
        self.config, self.launch = config, launch
        self.generation = 0
        self.board = Board("vdot-page-crew") if launch.world > 1 else None
        self.process: Any = None
        self.pipe: Any = None

    def start(self) -> None:
        self.pipe, there = multiprocessing.get_context("spawn").Pipe()
        if self.board is not None:
            os.environ[GENERATION] = str(self.generation)
        self.process = multiprocessing.get_context("spawn").Process(
            target=work, args=(there, self.config), name=f"vdot-rank-{self.launch.rank}", daemon=True
        )
        self.process.start()
        there.close()  # so that the pipe ends with the child

    def outdated(self) -> bool:
        """Whether another rank has gone on to a later generation."""
        return self.board is not None and self.board.read(f"begun/{self.generation + 1}") is not None

    def end(self, said: str | None = None, known: bool = True) -> str:
        """Make sure that this generation is over, here and elsewhere; why it is.

        ``said`` is what the child gave as its reason; unless ``known`` it may be the echo of another rank's death.
        """
        if self.board is not None:
            self.board.write(f"begun/{self.generation + 1}", "1")
        with suppress(OSError):
            self.pipe.close()
        if said is not None and not known:
            self._note("echo", said)
        self.process.join(WHY)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        own = said if known else None
        if own is None and code < 0:
            own = self._killed(-code)
        if own is not None:
            self._note("why", own)
        why = self._reason() or own or said or f"the process that generates ended with code {code}"
        self.generation += 1
        return why

    def _note(self, kind: str, words: str) -> None:
        """For all ranks; the first one's stands."""
        if self.board is not None and self.board.count(f"{kind}/count/{self.generation}") == 1:
            self.board.write(f"{kind}/{self.generation}", words)

    def _reason(self) -> str | None:
        """What is known of the end of this generation on any rank, else the first that was said."""
        if self.board is None:
            return None
        until = time.monotonic() + (WHY if self.launch.rank == 0 else 0)
        while (why := self.board.read(f"why/{self.generation}")) is None and time.monotonic() < until:
            time.sleep(LOOK)
        return why or self.board.read(f"echo/{self.generation}")

    def _killed(self, number: int) -> str | None:
        if number == signal.SIGTERM:  # by us or by the launcher
            return None
        reason = ", perhaps for want of host memory" if number == signal.SIGKILL else ""
        return f"the process that generates (rank {self.launch.rank}) was killed by signal {number}{reason}"

    def finish(self) -> None:
        """The page is over: the other ranks need not begin again."""
        if self.board is not None and self.launch.rank == 0:
            self.board.write("finished", "1")
        if self.process is not None:
            with suppress(OSError):
                self.pipe.close()
            self.process.join(WHY)
            self.process.kill()

    @property
    def finished(self) -> bool:
        return self.board is not None and self.board.read("finished") is not None


def attend(config: PageConfig, launch: Launch) -> int:
    """The whole life of a rank that does not serve: keep a child until the page ends."""
    crew = Crew(config, launch)
    while not crew.finished:
        crew.start()
        event: tuple[str, bool] | None = None
        while crew.process.is_alive() and not crew.outdated() and not crew.finished:
            event = _hear(crew.pipe) or event
        event = _hear(crew.pipe) or event
        if crew.finished:
            break
        log.error("rank %d: %s", launch.rank, crew.end(*event or ()))
    crew.finish()
    return 0


def _hear(pipe: Any) -> tuple[str, bool] | None:
    """What a child that has failed gives as its reason, and whether it is sure."""
    try:
        if pipe.poll(LOOK):
            event = pipe.recv()
            return (str(event[1]), bool(event[3])) if event[0] == "fatal" else None
    except (EOFError, OSError):
        time.sleep(LOOK)
    return None
