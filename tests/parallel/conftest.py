"""Worlds of two and four gloo processes on the CPU, started once per session and fed with functions to run."""

import contextlib
import multiprocessing
import os
import pickle
import secrets
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest


def free_port() -> int:
    """Nobody listens on it; it is below the ports of outgoing connections, one of which could take it meanwhile."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := 20000 + secrets.randbelow(12000)))
            return port


def _work(rank: int, pipe: Any) -> None:
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

    def __init__(self) -> None:
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
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((size, self.port, function, args)))
        answers: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(seconds):
                failed = [a for ok, a in answers if not ok]
                self.close()
                pytest.fail(f"rank {rank} of {size} does not answer\n" + "\n".join(failed))
            answers.append(pickle.loads(pipe.recv_bytes()))
        failed = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failed:
            pytest.fail("\n".join(failed))
        return [answer for _, answer in answers]

    def _grow(self, size: int) -> None:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        while len(self.workers) < size:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_work, args=(len(self.workers), there), daemon=True)
            process.start()
            self.workers.append((here, process))
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)

    def close(self) -> None:
        for _, process in self.workers:
            process.kill()
        self.workers.clear()
        self.size = 0


@pytest.fixture(scope="session")
def pool():
    made = Pool()
    yield made
    made.close()
