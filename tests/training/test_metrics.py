"""Lines on disk survive kills and resumes; time adds up; the live line fits and says the right numbers."""

import io
import json
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from vdot.errors import ConfigError, OutputError
from vdot.parallel.state import Ranks
from vdot.training import metrics
from vdot.training.metrics import (
    Metrics,
    Progress,
    Timer,
    duration,
    memory_used,
    peak_flops,
    read_metrics,
    shares,
)
from vdot.video import write_image, write_video

CPU = torch.device("cpu")


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vdot"), "propagate", True)
    caplog.set_level(logging.INFO, "vdot")
    return caplog


# --- the file --------------------------------------------------------------------------------------------------------


def test_one_line_per_step_readable_at_any_moment(tmp_path):
    with Metrics(tmp_path / "run") as out:
        out.log(1, {"loss": 0.5, "tokens": 12, "norm": float("nan"), "peak": float("inf")})
        lines = read_metrics(tmp_path / "run" / "metrics.jsonl")  # before it is closed
        assert len(lines) == 1 and lines[0].items() >= {"step": 1, "loss": 0.5, "tokens": 12, "norm": None}.items()
        assert abs(lines[0]["time"] - time.time()) < 60
        out.log(2, {"loss": 0.25})
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"step": 6, "ti', b"\xe6\x97", b"", b'{"step": 6, "time": 1.0}'])
def test_resuming_drops_a_torn_line_and_steps_that_are_done_again(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path) as out:
        for step in range(1, 6):
            out.log(step, {"loss": step / 3})
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    with path.open("ab") as stream:
        stream.write(torn)
    with Metrics(tmp_path, start=3) as out:
        assert path.read_bytes() == b"".join(kept)
        out.log(4, {"loss": 9.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    with Metrics(tmp_path):  # from the beginning
        assert path.read_bytes() == b""


def test_a_sound_file_is_not_rewritten(tmp_path):
    with Metrics(tmp_path) as out:
        out.log(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").stat()
    with Metrics(tmp_path, start=1):
        after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_only_the_first_rank_writes(tmp_path):
    with Metrics(tmp_path / "run", ranks=Ranks(rank=1, world=2), wandb="offline") as out:
        out.log(1, {"loss": 1.0})
        out.log_media(1, {"sample": tmp_path / "none.mp4"})
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_nothing_and_spoils_one_line(tmp_path, messages):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path) as out:
        out.log(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
        try:
            out.log(2, {"loss": 2.0})
            out.log(3, {"loss": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        out.log(4, {"loss": 4.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]
    assert messages.text.count("cannot be written") == 1


def test_impossible_places_and_modes_are_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Metrics(tmp_path / "file")
    with pytest.raises(ConfigError, match="use disabled, offline, online"):
        Metrics(tmp_path, wandb="on")


WANDB = """
import sys
from pathlib import Path
from vdot.training.metrics import Metrics
folder, start = Path(sys.argv[1]), int(sys.argv[2])
with Metrics(folder, {"lr": 0.1, "nested": {"k": [1, 2]}}, start=start, wandb="offline", project="test") as out:
    for step in range(start + 1, start + 3):
        out.log(step, {"loss": 1 / step, "norm": float("nan")})
    out.log_media(start + 2, {"sample": folder / "clip.mp4", "picture": folder / "picture.png"})
"""


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_when_resumed(tmp_path):
    """A resumed run has the same id; what was logged lies in the folder for ``wandb sync``."""
    pytest.importorskip("wandb")
    write_video(tmp_path / "clip.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8)
    write_image(tmp_path / "picture.png", np.zeros((16, 16, 3), np.uint8))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_DIR": str(tmp_path)}
    for start in (0, 2):
        command = [sys.executable, "-c", WANDB, str(tmp_path), str(start)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(runs) == 2 and all(run.name.endswith(identity) for run in runs)
    assert all(list(run.glob("*.wandb")) for run in runs)
    assert len(list(runs[0].glob("files/media/*/*.*"))) == 2
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_missing_is_told_with_the_command(tmp_path, monkeypatch):
    from vdot.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        Metrics(tmp_path, wandb="offline")


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict] = []

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self, **options: object) -> None:
        self.logged.append(options)


def test_wandb_gets_the_same_numbers_and_the_outcome(tmp_path, monkeypatch):
    run = FakeRun()
    monkeypatch.setattr(metrics, "_start_wandb", lambda *_: run)
    with pytest.raises(KeyError), Metrics(tmp_path, wandb="online") as out:
        out.log(3, {"loss": 0.5})
        raise KeyError
    assert run.logged == [{"step": 3, "loss": 0.5}, {"exit_code": 1}]


# --- time ------------------------------------------------------------------------------------------------------------


def test_nested_sections_are_taken_out_of_the_outer_one(monkeypatch):
    clock = iter([0.0, 1, 2, 4, 7, 8, 10, 15, 16, 20])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = Timer(CPU)  # 0
    with timer("backward"):  # 1
        with timer("communication"):  # 2 to 4
            pass
        with timer("communication"):  # 7 to 8
            pass
    seconds = timer.step()  # backward until 10, end of the step at 15
    assert seconds == {"other": 6.0, "backward": 6.0, "communication": 3.0}
    assert sum(seconds.values()) == 15
    with pytest.raises(ValueError), timer("data"):  # 16 to 20
        raise ValueError
    monkeypatch.setattr(time, "perf_counter", lambda: 21.0)
    assert timer.step() == {"other": 2.0, "data": 4.0}


def test_shares_sum_to_one():
    assert shares({"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert shares({"a": 0.0}) == {"a": 0.0}


@pytest.mark.gpu
def test_cuda_sections_are_the_devices_time():
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    timer = Timer(device)
    for _ in range(2):
        started = time.perf_counter()
        with timer("heavy"):
            for _ in range(20):
                a @ a
        queued = time.perf_counter() - started
        with timer("light"):
            a.add_(0)
        seconds, total = timer.step(), time.perf_counter() - started
    assert queued < 0.5 * total  # nothing waited inside
    assert seconds["heavy"] > 20 * seconds["light"]
    assert sum(seconds.values()) == pytest.approx(total, rel=0.2)
    assert peak_flops(device) is None or peak_flops(device) > 1e13


# --- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(metrics, "memory_used", lambda _: 71.2e9)
    return Terminal()


def test_the_live_line_says_the_numbers_and_fits(terminal):
    progress = Progress(1000, CPU, peak=1e12, stream=terminal)
    progress.update(250, 2.0, tokens=130_200, flops=7.6e11, values={"loss": 0.12345, "skipped": 3})
    line = terminal.getvalue().removeprefix("\r\x1b[K")
    assert line == "step 250/1000  25%  eta 25:00  2 s/step  65.1k tokens/s  3…" and len(line) == 59
    os.environ["COLUMNS"] = "200"
    progress.update(251, 2.0, tokens=130_200, flops=7.6e11, values={"loss": 0.12345, "skipped": 3})
    assert terminal.getvalue().endswith("65.1k tokens/s  38% of peak  71.2 GB  loss 0.123  skipped 3")
    progress.close()
    assert terminal.getvalue().endswith("skipped 3\n")


def test_what_is_unknown_is_left_out(terminal):
    Progress(10, CPU, stream=terminal).update(10, 0.0005, flops=1e9, tokens=None)
    assert terminal.getvalue().endswith("step 10/10  100%  eta 0:00  0.0005 s/step  71.2 GB")


def test_one_slow_step_does_not_spoil_the_estimate(terminal):
    progress = Progress(100, CPU, stream=terminal)
    for step, seconds in enumerate([60.0] + [1.0] * 40, 1):
        progress.update(step, seconds)
    eta = terminal.getvalue().rsplit("eta ", 1)[1].split("  ")[0]
    assert eta == "0:59"


def test_messages_do_not_run_into_the_live_line(terminal):
    logger, handler = logging.getLogger("vdot"), logging.StreamHandler(terminal)
    before, level = logger.handlers[:], logger.level
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    try:
        with Progress(10, CPU, stream=terminal) as progress:
            progress.update(1, 1.0)
            logger.info("saved")
            progress.update(2, 1.0)
        assert "GB\r\x1b[Ksaved\n\r\x1b[Kstep 2/10" in terminal.getvalue()
        assert handler.filters == []
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)


def test_without_a_terminal_there_is_a_line_now_and_then(messages, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(30, CPU, stream=io.StringIO(), every_steps=5, every_seconds=10)
    for step in range(1, 31):
        now[0] += 3
        progress.update(step, 3.0, values={"loss": 1.0})
    lines = [record.message for record in messages.records]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 6, 11, 16, 21, 26, 30]
    assert lines[-1].endswith("loss 1")


def test_other_ranks_and_a_gone_terminal_are_silent(terminal, messages):
    Progress(5, CPU, stream=terminal, ranks=Ranks(rank=1, world=2)).update(5, 1.0)
    assert terminal.getvalue() == "" and not messages.records
    terminal.close()
    Progress(5, CPU, stream=_Closed()).update(5, 1.0)


class _Closed(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_durations_memory_and_peaks(monkeypatch):
    times = {42: "0:42", 3723: "1:02:03", 3599.6: "1:00:00", 273906: "3d 4:05:06", 86400: "1d 0:00:00"}
    assert {t: duration(t) for t in times} == times and duration(float("inf")) == "?"
    assert 1e7 < memory_used(CPU) < 1e12
    assert peak_flops(CPU) is None
    names = {"NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H20": 148}
    names |= {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GH200 480GB": 990}
    names |= {"NVIDIA GeForce RTX 4090": 165.2, "NVIDIA RTX A6000": 155, "NVIDIA A10G": 70, "Tesla T4": None}
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found = peak_flops(torch.device("cuda"))
        assert (found and found / 1e12) == tflops, name


def test_the_file_is_valid_json_lines(tmp_path):
    with Metrics(tmp_path) as out:
        out.log(1, {"α": np.float32(0.1), "t": torch.tensor(2.0)})  # type: ignore[dict-item]
    (line,) = Path(tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["t"] == 2.0
