"""What a run tells: a line of JSON per step, wandb on request, one live line of progress, and where the time goes."""

import json
import logging
import math
import os
import secrets
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from vdot.errors import ConfigError, MissingDependencyError, OutputError
from vdot.parallel.state import Ranks
from vdot.runtime import log
from vdot.video.output import atomic_path

FILE = "metrics.jsonl"
WANDB_MODES = ("disabled", "offline", "online")

# Dense bfloat16 matrix multiplication in TFLOP/s, as the vendors' data sheets have it (their figures "with sparsity"
# halved), looked for in the device's name in this order.
PEAK_TFLOPS = (
    ("GB200", 2500.0),  # NVIDIA GB200 NVL72 data sheet, per GPU
    ("B200", 2250.0),  # NVIDIA DGX B200 data sheet
    ("GH200", 990.0),  # NVIDIA GH200 data sheet
    ("H200", 989.0),  # NVIDIA H200 data sheet (SXM)
    ("H100 NVL", 835.0),  # NVIDIA H100 data sheet
    ("H100 PCIe", 756.0),
    ("H100", 989.0),  # SXM
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),  # NVIDIA A100 data sheet
    ("A800", 312.0),
    ("L40S", 362.0),  # NVIDIA L40S data sheet
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 150.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A6000", 155.0),  # RTX A6000
    ("RTX 5090", 209.5),  # NVIDIA Blackwell RTX whitepaper, float32 accumulation
    ("RTX 4090", 165.2),  # NVIDIA Ada whitepaper, float32 accumulation
    ("RTX 3090", 71.0),  # NVIDIA GA102 whitepaper, float32 accumulation
    ("MI300X", 1307.4),  # AMD Instinct MI300X data sheet
    ("MI250X", 191.5),  # AMD Instinct MI250X data sheet, each of its two dies
)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device could do at most in dense bfloat16; None when it is not in the table (and for CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in PEAK_TFLOPS if part in name), None)


def memory_used(device: torch.device) -> int:
    """Bytes at the highest so far on an accelerator; what this process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


# --- the file --------------------------------------------------------------------------------------------------------


class Metrics:
    """``metrics.jsonl`` in ``folder``, one object per line: ``{"step": 7, "time": ..., "loss": ...}``; and wandb.

    Only the first rank writes; the others' calls do nothing.

    Args:
        config: of the run, JSON-like, for wandb.
        start: the step to go on from: lines of later steps, which will be done again, and a line cut off by a kill
            are dropped.
        wandb: "disabled", "offline" (synchronised later by ``wandb sync``) or "online". A resumed run goes on under
            the same id.

    Raises:
        OutputError: the folder cannot be written. ConfigError: wandb cannot start.
        MissingDependencyError: wandb is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        start: int = 0,
        wandb: str = "disabled",
        project: str = "vdot",
        ranks: Ranks | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self._file: int | None = None
        self._run: Any = None
        self._torn = False  # the last line was not written completely
        if wandb not in WANDB_MODES:
            raise ConfigError(f"unknown wandb mode {wandb!r}: use {', '.join(WANDB_MODES)}")
        if ranks is not None and ranks.rank != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            repair(self.path, start)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}", error.strerror) from error
        if wandb != "disabled":
            self._run = _start_wandb(self.folder, config or {}, wandb, project)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; not-a-number and infinity become null. A full disk is told once and ends nothing."""
        if self._file is None:
            return
        numbers = {key: _finite(value) for key, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **numbers}, allow_nan=False) + "\n"
        self._append((("\n" if self._torn else "") + line).encode())
        if self._run is not None:
            self._run.log({"step": step, **values})

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            written = os.write(self._file, data)  # in one piece: a kill finds all of the line or a part of the last
            reason = "No space left on device"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written < len(data) and not self._torn:
            log.warning("warning: %s cannot be written (%s); training goes on without its lines", self.path, reason)
        self._torn = written < len(data) and (self._torn or written > 0)

    def log_media(self, step: int, files: Mapping[str, str | Path]) -> None:
        """Show ``{name: video or image file}`` in wandb; nothing without it, as the files are there already."""
        if self._run is None:
            return
        import wandb

        def media(path: Path) -> Any:
            kind = path.suffix.lower().lstrip(".")
            return wandb.Video(str(path)) if kind in ("mp4", "gif", "webm") else wandb.Image(str(path))

        self._run.log({"step": step, **{name: media(Path(path)) for name, path in files.items()}})

    def close(self, exit_code: int = 0) -> None:
        """End the file, and the wandb run as finished (0) or failed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def _finite(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` in order; what is not a complete line is left out."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        return [record for line in stream if (record := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def repair(path: Path, start: int) -> None:
    """Drop torn lines and those of steps after ``start``; the rest keeps its bytes."""
    if not path.exists():
        return
    data = path.read_text(encoding="utf-8", errors="replace")
    lines = data.splitlines(keepends=True)
    good = [line for line in lines if line.endswith("\n") and (r := _parse(line)) is not None and r["step"] <= start]
    if len(good) < len(lines):
        with atomic_path(path) as temporary:
            Path(temporary).write_text("".join(good), encoding="utf-8")


def _start_wandb(folder: Path, config: Mapping[str, Any], mode: str, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError("wandb is not installed: pip install wandb, or set wandb to disabled") from error
    note = folder / "wandb_id.txt"
    identity = note.read_text().strip() if note.exists() else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=project,
            id=identity,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            name=folder.name,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),  # the terminal is the progress line's
        )
    except (wandb.errors.Error, OSError) as error:
        hint = "log in with `wandb login`, or set wandb to offline"
        raise ConfigError(f"wandb cannot start ({' '.join(str(error).split())}): {hint}") from error
    with atomic_path(note) as temporary:
        Path(temporary).write_text(identity + "\n")
    # Our own axis: after a kill, wandb may have seen later steps than the checkpoint that training resumes from.
    run.define_metric("*", step_metric="step")
    return run


# --- time ------------------------------------------------------------------------------------------------------------


class Timer:
    """Seconds per named section of a step; a nested section's time is taken out of the one around it.

        with timer("backward"):
            ...
            with timer("communication"):
                ...
        seconds = timer.step()      # {"backward": ..., "communication": ..., "other": ...}

    On CUDA the device's clock is read by events, so that nothing waits before :meth:`step`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stack = ["other"]
        self._marks: list[tuple[str, Any]] = []  # (the section that ended, when)
        self._start = self._now()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()

    def _mark(self) -> None:
        self._marks.append((self._stack[-1], self._now()))

    def step(self) -> dict[str, float]:
        """Seconds since the last call (or the beginning) by section; their sum is the step's. Waits for the device."""
        self._mark()
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for name, end in self._marks:
            seconds[name] = seconds.get(name, 0.0) + self._between(self._start, end)
            self._start = end
        self._marks.clear()
        return seconds

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Fractions of the sum."""
    total = sum(seconds.values())
    return {name: value / total if total else 0.0 for name, value in seconds.items()}


# --- progress --------------------------------------------------------------------------------------------------------


class _ClearLine(logging.Filter):
    """Takes the live line away before a message is printed."""

    def __init__(self, progress: "Progress") -> None:
        super().__init__()
        self.progress = progress

    def filter(self, record: logging.LogRecord) -> bool:
        self.progress.clear()
        return True


class Progress:
    """One line that is rewritten at every step on a terminal; elsewhere a line now and then.

    ``step 120/1000  12%  eta 1:02:03  4.23 s/step  65.1k tokens/s  38% of peak  71.2 GB  loss 0.123``

    Args:
        total: steps of the whole run.
        peak: FLOP/s of all devices together (:func:`peak_flops` times their number); None leaves the share out.
        every_steps, every_seconds: without a terminal, a line as soon as both have passed since the last one.
    """

    def __init__(
        self,
        total: int,
        device: torch.device,
        *,
        peak: float | None = None,
        ranks: Ranks | None = None,
        stream: TextIO | None = None,
        every_steps: int = 1,
        every_seconds: float = 10.0,
    ) -> None:
        self.total, self.device, self.peak = total, device, peak
        self.silent = ranks is not None and ranks.rank != 0
        self.stream = stream or sys.stdout
        self.live = not self.silent and self.stream.isatty()
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self._seconds: deque[float] = deque(maxlen=100)  # of the last steps
        self._warm = False
        self._shown = False
        self._last = (-(10**9), -math.inf)  # (step, time) of the last plain line
        self._filter = _ClearLine(self)
        if self.live:
            for handler in log.handlers:
                handler.addFilter(self._filter)

    def update(
        self,
        step: int,
        seconds: float,
        *,
        tokens: float | None = None,
        flops: float | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Show that ``step`` steps are done.

        Args:
            seconds: that the last one took.
            tokens, flops: that it handled and did on all ranks.
            values: a few numbers to show.
        """
        if self.silent:
            return
        if len(self._seconds) == 1 and not self._warm:  # the first step compiles and fills caches
            self._seconds.clear()
            self._warm = True
        self._seconds.append(seconds)
        parts = [*self._pace(step, seconds, tokens, flops), *(f"{k} {_short(v)}" for k, v in (values or {}).items())]
        line = "  ".join(parts)
        if self.live:
            self._rewrite(line)
        elif self._due(step):
            self._last = step, time.monotonic()
            log.info("%s", line)

    def _pace(self, step: int, seconds: float, tokens: float | None, flops: float | None) -> Iterable[str]:
        left = max(0, self.total - step) * sum(self._seconds) / len(self._seconds)
        yield f"step {step}/{self.total}"
        yield f"{100 * step // max(1, self.total)}%"
        yield f"eta {duration(left)}"
        yield f"{_short(seconds)} s/step"
        if tokens is not None and seconds > 0:
            yield f"{_thousands(tokens / seconds)} tokens/s"
        if flops is not None and self.peak and seconds > 0:
            yield f"{100 * flops / seconds / self.peak:.0f}% of peak"
        yield f"{memory_used(self.device) / 1e9:.1f} GB"

    def _due(self, step: int) -> bool:
        last_step, last_time = self._last
        long_ago = time.monotonic() - last_time >= self.every_seconds and step - last_step >= self.every_steps
        return long_ago or step >= self.total

    def _rewrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1  # a full last column would wrap
        text = line if len(line) <= width else line[: max(0, width - 1)] + "…"
        with suppress(OSError, ValueError):  # the terminal has gone; training has not
            self.stream.write(f"\r\x1b[K{text}")
            self.stream.flush()
        self._shown = True

    def clear(self) -> None:
        """Take the live line away; the next step brings it back."""
        if self._shown:
            with suppress(OSError, ValueError):
                self.stream.write("\r\x1b[K")
                self.stream.flush()
            self._shown = False

    def close(self) -> None:
        """Leave the last line on the screen and the cursor below it."""
        if self._shown:
            with suppress(OSError, ValueError):
                self.stream.write("\n")
                self.stream.flush()
            self._shown = False
        for handler in log.handlers:
            handler.removeFilter(self._filter)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """``0:42``, ``1:02:03`` or ``3d 4:05:06``."""
    if not math.isfinite(seconds):
        return "?"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {clock}" if days else clock


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _thousands(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
