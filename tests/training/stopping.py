"""A program for test_stop.py: ``python stopping.py FOLDER``.

Stands in for torchrun with two ranks that count steps and are told to stop in several ways; prints one JSON object per
way. Also a rank program: under torchrun it counts until it is told to stop.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.parallel.conftest import free_port
from vdot.parallel.launch import connected
from vdot.parallel.state import Ranks, end_together
from vdot.training.checkpoint import CheckpointStore
from vdot.training.stop import StopSignal

SECONDS = 20  # after which a rank that nobody stops gives up


def count(folder: Path) -> int:
    """What a training loop does with the signal. The exit code."""
    ranks = Ranks()
    try:
        with connected() as ranks, StopSignal(ranks) as stop:
            store, value = CheckpointStore(folder / "checkpoints", ranks=ranks), torch.zeros(3)
            started = time.monotonic()
            for step in range(1, 10**6):
                value += 1
                dist.all_reduce(torch.ones(1)) if ranks.world > 1 else None
                time.sleep(0.01)
                if step == 3:
                    (folder / f"ready{ranks.rank}").write_text(str(os.getpid()))
                if stop.agreed():
                    store.save(step, {"net": {"value": value}, "meta": {"step": step}})
                    store.close()
                    (folder / f"stopped{ranks.rank}").write_text(f"{step} {stop.reason}")
                    return 0
                if time.monotonic() - started > SECONDS:
                    return 3
        return 4
    except Exception as error:
        end_together(ranks, error, f"error: rank {ranks.rank}: {error}", 1)


def start(folder: Path, port: int, rank: int) -> int:
    """Fork one rank; its process."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os._exit(count(folder))


def run(folder: Path, how: str) -> dict[str, object]:
    folder.mkdir(parents=True)
    port = free_port()
    children = [start(folder, port, rank) for rank in range(2)]
    deadline = time.monotonic() + SECONDS
    while not all((folder / f"ready{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    if how == "launcher":
        for child in children:
            os.kill(child, signal.SIGTERM)
    elif how == "one rank":
        os.kill(children[1], signal.SIGUSR1)
    elif how == "lost":
        os.kill(children[1], signal.SIGKILL)
        os.kill(children[0], signal.SIGTERM)  # what the launcher does next
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stopped = [path.read_text() for path in sorted(folder.glob("stopped*"))]
    errors = "".join(path.read_text() for path in sorted(folder.glob("stderr*")))
    with CheckpointStore(folder / "checkpoints", read_only=True) as store:
        saved = store.latest()
    seconds = time.monotonic() - began
    return {"codes": codes, "stopped": stopped, "saved": saved, "errors": errors, "seconds": seconds}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if "RANK" in os.environ:
        sys.exit(count(place))
    sys.stdout.write(json.dumps({how: run(place / how, how) for how in ("launcher", "one rank", "lost")}))
