"""A rank program for test_failures.py: ``torchrun ... failing.py MODE``. Three ranks; rank 1 is the one that fails."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from vdot.errors import InputError, VdotError
from vdot.parallel.launch import connected
from vdot.parallel.state import Ranks, end_together


def fail(ranks: Ranks, mode: str) -> None:
    """Rank 1 fails in the way asked for; the others go on to a collective that can never complete."""
    with ranks.agree():
        if mode == "bad file" and ranks.rank == 1:
            raise InputError("the video gone.mp4 does not exist")
    if ranks.rank != 1:
        dist.all_reduce(torch.ones(1))
        return
    if mode == "memory":
        torch.empty(1 << 60, dtype=torch.uint8)
    elif mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "starve":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def main() -> int:
    ranks = Ranks()
    try:
        with connected() as ranks:
            sys.stderr.write(f"started {time.time()}\n")
            fail(ranks, sys.argv[1])
            return 0
    except VdotError as error:
        end_together(ranks, error, f"error: rank {ranks.rank}: {error}", error.exit_code)
    except Exception as error:
        end_together(ranks, error, f"error: rank {ranks.rank}: {type(error).__name__}: {error}", 1)


if __name__ == "__main__":
    sys.exit(main())
