"""A program for test_checkpoint.py: ``python killing.py FOLDER COUNT``.

Forks a child that trains (counts) and saves at every third step, kills it with SIGKILL at a random moment, looks at
what is left, and lets the next child resume. Prints one JSON object per kill.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vdot.training.checkpoint import CheckpointStore

INTERVAL = 3
KEEP = 2


def make_state() -> dict[str, Any]:
    return {
        "net": {"weight": torch.zeros(256, 256), "bias": torch.zeros(7, dtype=torch.bfloat16)},
        "optimizer": {"weight.step": torch.zeros(()), "weight.exp_avg_sq": torch.zeros(256, 256)},
    }


def fill(state: dict[str, Any], step: int) -> None:
    for part in ("net", "optimizer"):
        for tensor in state[part].values():
            tensor.fill_(step % 251)


def is_of(state: dict[str, Any], step: int) -> bool:
    return all((t == step % 251).all().item() for part in ("net", "optimizer") for t in state[part].values())


def train(folder: Path, pipe: int) -> None:
    """Never returns. Writes the step of each save once :meth:`save` has returned."""
    store, state = CheckpointStore(folder, KEEP), make_state()
    latest = store.latest()
    if latest is not None:
        assert store.load(state)["meta"] == {"step": latest} and is_of(state, latest)
    for step in itertools.count(0 if latest is None else latest + 1):
        fill(state, step)
        if step % INTERVAL == 0:
            store.save(step, state | {"meta": {"step": step}})
            os.write(pipe, f"{step}\n".encode())
        time.sleep(0.0005)


def kill_one(folder: Path, after: float) -> list[int]:
    """The steps whose saves had begun when the child was killed, ``after`` seconds from its first."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(here)
            train(folder, there)
        finally:
            os._exit(1)
    os.close(there)
    with os.fdopen(here, "rb") as stream:
        first = stream.readline()
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return [int(line) for line in [first, *stream] if line.strip()]


def main(folder: Path, count: int) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    rng = random.Random(0)
    for _ in range(count):
        begun = kill_one(folder, rng.uniform(0, 0.12))
        names = sorted(os.listdir(folder))
        copy = folder.with_name("copy")  # looked at as the next run would find it, without tidying up for that one
        shutil.copytree(folder, copy)
        store, state = CheckpointStore(copy, KEEP), make_state()
        latest = store.latest()
        if latest is not None:
            store.load(state)
        report = {"begun": begun, "latest": latest, "names": names, "whole": latest is None or is_of(state, latest)}
        sys.stdout.write(json.dumps(report | {"tidied": sorted(os.listdir(copy))}) + "\n")
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
