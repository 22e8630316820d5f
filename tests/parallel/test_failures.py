"""Whatever ends one rank ends all of them within seconds, with one message and a code that is not zero."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.parallel.conftest import free_port

SECONDS = 8.0  # from the first rank's start to the end of all, on a busy machine; typically two


def torchrun(count: int, *command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    values = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    arguments = [*launcher, f"--master_port={free_port()}", *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, env=values, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "mode,message",
    [
        ("bad file", "error: rank 1: the video gone.mp4 does not exist"),
        ("memory", "error: rank 1: RuntimeError: .*memory"),
        ("kill", r"error: rank 1 \(process \d+ on \S+\) was killed"),
        ("starve", r"error: rank 1 \(process \d+ on \S+\) has not answered for \d+ s"),
    ],
)
def test_one_rank_fails_and_all_end(mode, message):
    result = torchrun(3, ROOT / "tests" / "parallel" / "failing.py", mode, VDOT_RANK_PATIENCE="3")
    ended = time.time()
    ours = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode != 0
    assert len(ours) == 1 and re.match(message, ours[0]), result.stderr
    started = max(float(t) for t in re.findall(r"started (\S+)", result.stderr))
    assert ended - started < SECONDS + (3 if mode == "starve" else 0)
    # torchrun lists what each rank exited with: 2 is the user's to mend
    codes = {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", result.stderr)}
    assert codes <= ({2} if mode == "bad file" else {1, -9})
