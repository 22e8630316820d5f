"""Decoders for test_dataset.py that fail as native code does: with their whole process, or for ever."""

import os
import signal
import time

from vdot.data.decoding import Pixels, decode
from vdot.data.manifest import Layout, Row


def crash(row: Row, layout: Layout) -> Pixels:
    """Dies at every row of the task "bad"."""
    if row.task == "bad":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(row, layout)


def misbehave(what: str, path: str = "") -> str:
    """As asked: dies once and leaves ``path`` as a note, raises, or never answers."""
    if what == "input":
        raise FileNotFoundError(2, "No such file", "x.mp4")
    if what == "bug":
        raise KeyError("x")
    if what == "hang":
        time.sleep(60)
    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(3)
    return path
