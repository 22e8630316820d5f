"""The machine: which device, which precision, how a run reports what it is doing."""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch

from vdot.errors import ConfigError

log = logging.getLogger("vdot")
T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Output(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Whoever read the messages has gone (``| head``): the video is made all the same."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Messages of this package to stdout, bare: they are the program's output."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console of another encoding must not stop a file name in it
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = _Output(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else CUDA, else MPS, else CPU. ``ConfigError`` when the named one is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use cuda, cuda:N, mps or cpu") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if there.get(device.type, False) and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if not there.get(device.type, False):
        raise ConfigError(f"device {name!r} is not available on this machine: leave --device out to choose one")
    return device


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, whoever uses them now; host memory counts its swap."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: on CUDA since the last :func:`reset_peak`, of this process otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0)) or _peak_resident()


def _peak_resident() -> int:
    import resource  # not on Windows, where psutil knows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def clock(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named precision, else bfloat16 on an accelerator and float32 on a CPU."""
    if isinstance(name, torch.dtype):
        return name
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def start_aside(function: Callable[..., T], *args: Any, aside: bool = True) -> Callable[[], T]:
    """Begin a call in a thread (``aside``), or make it at once; the function returned gives its result or error."""
    if not aside:
        done = function(*args)
        return lambda: done
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args)
    pool.shutdown(wait=False)
    return future.result


class Stages:
    """Named stages of a run with their wall-clock seconds, announced as they end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        log.info("%-22s %7.2f s", name, seconds)
