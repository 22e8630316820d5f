"""Worlds of two and four gloo processes on the CPU, started once per session and fed with functions to run."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import secrets
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    """Nobody listens on it; it is below the ports of outgoing connections, one of which could take it meanwhile."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := 20000 + secrets.randbelow(12000)))
            return port


def _work(rank: int, pipe: Any, last_words: str) -> None:
    # What the process was at when a signal ended it: nothing else would say so.
    faulthandler.enable(file := open(last_words, "w"))
    os.dup2(file.fileno(), 2)
    import torch
    import torch.distributed as dist

    from tests.parallel.networks import MESHES

    torch.set_num_threads(1)
    world = None
    while True:
        size, port, function, args = pickle.loads(pipe.recv_bytes())
        if world != (size, port):
            if world:
                dist.destroy_process_group()
            MESHES.clear()
            world = size, port
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("gloo", rank=rank, world_size=size)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


class Pool:
    """Up to four processes that stay; the first of them form a world of any size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of what the processes say on stderr
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[tuple[Any, Any]] = []
        self.port, self.size = 0, 0

    def run(self, size: int, function: Callable, *args: Any, seconds: float = 600) -> list[Any]:
        """What ``function(*args)`` returned on each rank; it lives in an importable module."""
        if size != self.size:
            # A new port each time: a smaller world leaves processes behind in the old one.
            self.port, self.size = free_port(), size
            self._grow(size)
        pipes = [pipe for pipe, _ in self.workers[:size]]
        answers: list[tuple[bool, Any]] = []
        try:
            for pipe in pipes:
                pipe.send_bytes(pickle.dumps((size, self.port, function, args)))
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(seconds):
                    raise TimeoutError(f"rank {rank} of {size} does not answer")
                answers.append(pickle.loads(pipe.recv_bytes()))
        except (OSError, EOFError) as error:  # TimeoutError and BrokenPipeError are among them
            failed = [answer for ok, answer in answers if not ok]
            said = self._last_words()
            self.close()  # the next test gets processes of its own
            pytest.fail("\n".join([f"{type(error).__name__}: {error}", *failed, *said]))
        failed = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failed:
            pytest.fail("\n".join(failed))
        return [answer for _, answer in answers]

    def _grow(self, size: int) -> None:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        while len(self.workers) < size:
            here, there = self.context.Pipe()
            rank = len(self.workers)
            process = self.context.Process(target=_work, args=(rank, there, str(self._words(rank))), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            self.workers.append((here, process))
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)

    def _words(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def _last_words(self) -> list[str]:
        """How each process ended, if it did, and the end of what it wrote to stderr."""
        for _, process in self.workers:
            process.join(1)
        states = [f"exit code {p.exitcode}" if p.exitcode is not None else "lives" for _, p in self.workers]
        return [f"rank {i} {s}:\n{self._words(i).read_text()[-16000:]}" for i, s in enumerate(states)]

    def close(self) -> None:
        for _, process in self.workers:
            process.kill()
        self.workers.clear()
        self.size = 0


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("pool"))
    yield made
    made.close()
