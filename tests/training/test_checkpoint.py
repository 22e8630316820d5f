"""Checkpoints are whole or not there, equal bit for bit, and load on another number of ranks."""

import json
import logging
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
from concurrent.futures import wait as wait_for
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.conftest import ROOT
from vdot.errors import CheckpointError, OutputError
from vdot.parallel.state import Ranks
from vdot.training.checkpoint import CheckpointStore, restore_rng, rng_state
from vdot.training.optim import Ema, clip_gradients, make_optimizer, optimizer_state

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_state(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "net": {"weight": torch.randn(5, 3, generator=g), "deep": {"er": torch.randn(4, generator=g).bfloat16()}},
        "odd": {"scalar": torch.tensor(float(seed)), "empty": torch.empty(0, 3), "count": torch.tensor([seed, 2**40])},
        "meta": {"step": seed, "lr": 0.1 + seed, "text": "日本"},
    }


def equal(a: dict, b: dict) -> bool:
    return all(
        equal(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a if k not in ("meta", "rank")
    )


def steps(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != ".lock")


@pytest.fixture
def messages(caplog, monkeypatch):
    logger = logging.getLogger("vdot")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "vdot")
    return caplog


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until the event is set."""
    gate, write = threading.Event(), dcp.FileSystemWriter.write_data

    def wait_and_write(self, *args):
        assert gate.wait(600)
        return write(self, *args)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", wait_and_write)
    yield gate
    gate.set()


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    state, other = make_state(3), make_state(4)
    with CheckpointStore(tmp_path) as store:
        assert store.latest() is None
        store.save(3, state | {"rank": {"any": [1, None]}}, blocking=True)
        notes = store.load(other)
    assert notes == {"step": 3, "meta": state["meta"], "rank": {"any": [1, None]}}
    assert equal(state, other)


def test_saves_what_was_there_when_save_was_called(tmp_path, slow_disk):
    state, other = make_state(1), make_state(2)
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):  # the second reuses the first's buffers
            state["net"]["weight"].fill_(step)
            state["meta"]["step"] = step
            slow_disk.set() if step == 2 else None
            store.save(step, state)
            state["net"]["weight"].fill_(-1)
            state["meta"]["step"] = -1
        for step in (1, 2):
            assert store.load(other, step)["meta"]["step"] == step
            assert (other["net"]["weight"] == step).all()


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, slow_disk, messages):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state())
        assert store._running is not None and not store._running[1].done()
        threading.Timer(0.2, slow_disk.set).start()
        store.save(2, make_state())
        assert "checkpoint of step 1 is still being written" in messages.text
        assert store.latest() == 2


def test_keeps_the_last_and_replaces_the_same_step(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (10, 20, 30, 30):
            store.save(step, make_state(step))
        store.wait()
        assert steps(tmp_path) == ["step_00000020", "step_00000030"]
        assert store.latest() == 30
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(40, make_state(), blocking=True)
    assert steps(tmp_path) == ["step_00000040"]


def test_kill_minus_9_at_twenty_random_moments_loses_nothing_that_was_saved(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "training" / "killing.py"), str(tmp_path / "run"), "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and len(reports) == 20, result.stderr
    latest, kept = -1, 0
    for report in reports:
        begun = report["begun"]
        assert begun, "the child could not resume"
        assert begun[0] == (latest // 3 + 1) * 3  # it went on where the one before was saved
        # The last save may not have been complete; the one before was, for the last one waited for it.
        assert report["whole"] and (len(begun) == 1 or report["latest"] >= begun[-2])
        # Two are kept; a kill before pruning leaves one more, and so may the next kill.
        before, kept = kept, len([name for name in report["tidied"] if name.startswith("step_")])
        assert kept <= max(2, before) + 1
        assert not any(name.startswith(".step") for name in report["tidied"])
        latest = -1 if report["latest"] is None else report["latest"]
    interrupted = sum(any(name.startswith(".step") for name in report["names"]) for report in reports)
    assert interrupted  # the test is about kills while saving, too


@pytest.mark.parametrize("large", [False, True], ids=["notes", "tensors"])
def test_a_full_disk_is_told_once_and_leaves_the_former_checkpoint(tmp_path, large):
    """Stood in for by a limit on the size of files, which fails with another word for it."""
    state = {"net": {"weight": torch.zeros(100 if not large else 300_000)}, "meta": {"text": "x" * 10}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(1, state, blocking=True)
        if not large:
            state["meta"]["text"] = "x" * 200_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            store.save(2, state)
            with pytest.raises(OutputError, match=r"checkpoint of step 2 could not be written to .*: File too large"):
                store.save(3, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        store.wait()  # told once
        assert steps(tmp_path) == ["step_00000001"] and store.latest() == 1
        store.save(3, state, blocking=True)
        assert steps(tmp_path) == ["step_00000003"]


def test_the_last_save_is_made_although_the_one_before_failed(tmp_path, messages, monkeypatch):
    full = OSError(28, "full")
    with CheckpointStore(tmp_path) as store:
        with monkeypatch.context() as disk:
            disk.setattr(dcp.FileSystemWriter, "write_data", lambda *_: (_ for _ in ()).throw(full))
            store.save(1, make_state(1))
            wait_for([store._running[1]])
        store.save(2, make_state(2), blocking=True)
        assert "step 1 could not be written" in messages.text and store.latest() == 2


def test_passes_over_damaged_ones_and_reports_them(tmp_path, messages):
    with CheckpointStore(tmp_path, keep=5) as store:
        for step in range(1, 6):
            store.save(step, make_state(step))
        store.wait()
        (tmp_path / "step_00000005" / "meta.json").unlink()
        (tmp_path / "step_00000004" / "meta.json").write_text('{"meta": {"st')
        next((tmp_path / "step_00000003").glob("*.distcp")).write_bytes(b"short")
        (tmp_path / "step_00000002" / ".metadata").write_bytes(
            bytes((tmp_path / "step_00000002" / ".metadata").stat().st_size)
        )
        (tmp_path / "step_what").mkdir()
        assert store.latest() == 1 and store.latest() == 1
        assert messages.text.count("is passed over") == 4
        for reason in ("meta.json is missing", "is damaged", "has 5 bytes instead of"):
            assert reason in messages.text
        assert store.load(make_state())["step"] == 1
        with pytest.raises(CheckpointError, match=r"step_00000003 cannot be used: __0_0.distcp has 5 bytes"):
            store.load(make_state(), step=3)
        (tmp_path / "step_00000001" / "meta.json").unlink()
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
            store.latest()


def test_damaged_ones_do_not_count_among_the_kept(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 9):
            store.save(step, make_state(step), blocking=True)
        (tmp_path / "step_00000009" / "meta.json").unlink()
        for step in (2, 3):
            store.save(step, make_state(step), blocking=True)
        assert steps(tmp_path) == ["step_00000002", "step_00000003", "step_00000009"]
        assert store.latest() == 3


def test_an_interrupted_replacement_is_put_back(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1), blocking=True)
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")
    with CheckpointStore(tmp_path) as store:
        assert store.latest() == 1
    assert steps(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s["net"].update(more=torch.ones(1)), "it lacks net/more"),
        (lambda s: s["net"].pop("weight"), "it has besides net/weight"),
        (lambda s: s.pop("odd"), "it has besides odd/scalar, odd/empty, odd/count"),
        (lambda s: s["net"].update(weight=torch.ones(3, 5)), r"net/weight is float32 \[5, 3\] there and .* \[3, 5\]"),
        (lambda s: s["net"].update(weight=torch.ones(5, 3).double()), "there and float64"),
        (lambda s: s.update({f"part {i}": {"a": torch.ones(1)} for i in range(9)}), "and 6 more"),
    ],
)
def test_refuses_other_networks_naming_what_differs(tmp_path, change, message):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1), blocking=True)
        state, untouched = make_state(2), make_state(2)
        change(state)
        with pytest.raises(CheckpointError, match=message):
            store.load(state)
        kept = {part: set(state[part]) & set(untouched[part]) for part in ("net", "odd") if part in state}
        for part, names in kept.items():
            for name in names - {"weight"}:
                assert equal({"_": {name: state[part][name]}}, {"_": {name: untouched[part][name]}})


def test_parts_can_be_loaded_alone_when_asked_for(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1), blocking=True)
    with CheckpointStore(tmp_path, read_only=True) as store:
        state = {"odd": make_state(2)["odd"]}
        store.load(state, partial=True)
        assert equal(state, {"odd": make_state(1)["odd"]})
        with pytest.raises(CheckpointError, match="it has besides odd/count"):
            store.load({"odd": {k: v for k, v in state["odd"].items() if k != "count"}}, partial=True)


def test_what_is_neither_tensor_nor_note_is_a_mistake(tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(TypeError, match=r"net/steps is int, not a tensor"):
        store.save(1, {"net": {"steps": 3}})


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(), blocking=True)
        path, meta = tmp_path / "step_00000001" / ".metadata", tmp_path / "step_00000001" / "meta.json"
        path.write_bytes(pickle.dumps(Bomb()))
        notes = json.loads(meta.read_text())
        notes["files"][".metadata"] = path.stat().st_size
        meta.write_text(json.dumps(notes))
        with pytest.raises(CheckpointError, match=r"mkdir has no place in a checkpoint"):
            store.load(make_state())
    assert not (tmp_path / "exploded").exists()


def test_two_runs_cannot_share_a_folder(tmp_path):
    code = f"""
from vdot.training.checkpoint import CheckpointStore
from vdot.errors import OutputError
CheckpointStore({str(tmp_path)!r}, read_only=True)
try:
    CheckpointStore({str(tmp_path)!r})
except OutputError as error:
    assert "another process is training into" in str(error)
else:
    raise SystemExit("not refused")
"""
    with CheckpointStore(tmp_path):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_an_unwritable_folder_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="checkpoints cannot be written to"):
        CheckpointStore(tmp_path / "file" / "checkpoints")


def test_random_states_go_on_where_they_were(tmp_path):
    own = torch.Generator().manual_seed(5)

    def draw() -> list[float]:
        values = [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]
        return [*values, random.gauss(0, 1), torch.rand((), generator=own).item()]

    draw()
    state = json.loads(json.dumps(rng_state(CPU, {"own": own})))
    expected = draw()
    draw()
    restore_rng(state, CPU, {"own": own})
    assert draw() == expected


# --- several ranks ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three rows, which two ranks share unevenly; one row, which leaves the second with nothing; a whole one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 3), nn.Linear(3, 1).to(torch.bfloat16)
        self.whole = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.b(self.a(x * self.whole).bfloat16())


class Run:
    """A network, its optimizer and average, sharded over ``world`` ranks, and the state they make up."""

    def __init__(self, world: int) -> None:
        self.net = Net()
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            for part in (self.net.b, self.net):
                fully_shard(part, mesh=mesh, ignored_params={self.net.whole})
        self.named = dict(self.net.named_parameters())
        self.optimizer = make_optimizer(self.named, 0.05, betas=(0.9, 0.99))
        self.ema = Ema(self.named, 0.5)

    def step(self, number: int) -> None:
        """The same batch on all ranks, so that the mean over them is that of one."""
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        self.net(x).float().square().mean().backward()
        clip_gradients(self.named.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(number)

    def state(self, number: int) -> dict:
        return {
            "net": self.named,
            "optimizer": optimizer_state(self.optimizer, self.named),
            "ema": self.ema.state(),
            "meta": {"step": number},
            "rank": {"of": dist.get_rank() if dist.is_initialized() else 0},
        }

    def whole(self) -> dict[str, torch.Tensor]:
        parts = {part: v for part, v in self.state(0).items() if part not in ("meta", "rank")}
        return {
            f"{part}/{name}": (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for part, named in parts.items()
            for name, t in named.items()
        }


def go_on(folder: str, first: int, last: int) -> dict[str, torch.Tensor]:
    """Load what is there, take the steps after it up to ``last``, save; on any number of ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    run = Run(world)
    ranks = Ranks(rank=dist.get_rank(), world=world) if world > 1 else Ranks()
    with CheckpointStore(folder, keep=9, ranks=ranks) as store:
        assert store.latest() == (first or None)
        if first:
            notes = store.load(run.state(0))
            saved_by = len(json.loads((Path(folder) / f"step_{first:08d}" / "meta.json").read_text())["ranks"])
            assert notes["meta"]["step"] == first
            assert notes["rank"] == ({"of": ranks.rank} if saved_by == world else None)
        before = run.whole()
        for number in range(first + 1, last + 1):
            run.step(number)
            store.save(number, run.state(number))
    return before if first == last else run.whole()


def test_one_rank_to_two_and_back(tmp_path, pool):
    folder = str(tmp_path / "moving")
    one = go_on(folder, 0, 2)
    loaded = pool.run(2, go_on, folder, 2, 2)
    for state in loaded:
        assert all(torch.equal(state[name], one[name]) for name in one)
    two = pool.run(2, go_on, folder, 2, 4)
    loaded = [go_on(folder, 4, 4), *pool.run(2, go_on, folder, 4, 4)]
    for state in loaded:
        assert all(torch.equal(state[name], two[0][name]) for name in two[0])
    # and the numbers are those of a run that stayed on one rank, up to the order of sums
    alone = go_on(str(tmp_path / "staying"), 0, 4)
    for name, value in alone.items():
        torch.testing.assert_close(two[0][name], value, rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    uninterrupted = go_on(str(tmp_path / "a"), 0, 5)
    go_on(str(tmp_path / "b"), 0, 2)
    resumed = go_on(str(tmp_path / "b"), 2, 5)
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


def fail_on_one(folder: str) -> list[str]:
    """What every rank is told when rank 1 alone cannot write, and when rank 0's table of contents is damaged."""
    ranks, run, told = Ranks(rank=dist.get_rank(), world=2), Run(2), []
    store = CheckpointStore(folder, ranks=ranks)
    store.save(1, run.state(1), blocking=True)
    write = dcp.FileSystemWriter.write_data
    if ranks.rank == 1:
        dcp.FileSystemWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        store.save(2, run.state(2))
        store.wait()
    except OutputError as error:
        told.append(str(error))
    finally:
        dcp.FileSystemWriter.write_data = write
    told.append(str(store.latest()))
    store.save(3, run.state(3), blocking=True)
    other = run.state(3)
    if ranks.rank == 1:
        other["net"] = dict(other["net"], foreign=torch.ones(1))
    try:
        store.load(other)
    except Exception as error:
        told.append(str(error))
    dist.barrier()
    if ranks.rank == 0:
        (Path(folder) / "step_00000003" / "meta.json").unlink()
    dist.barrier()
    told.append(str(store.latest()))
    store.close()
    return told


def test_all_ranks_fail_together(tmp_path, pool):
    for rank, told in enumerate(pool.run(2, fail_on_one, str(tmp_path))):
        assert "checkpoint of step 2 could not be written" in told[0]
        assert "No space left on device (rank 1)" in told[0]
        assert told[1] == "1"
        assert "it lacks net/foreign" in told[2] and (rank == 1 or told[2].startswith("rank 1: "))
        assert told[3] == "1"
