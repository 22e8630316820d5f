"""Which rows are drawn, that they arrive whatever happens to files and processes, and that nothing is left behind."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import chisquare

from tests.conftest import TINY
from tests.data import failing
from tests.data.conftest import MIXED
from vdot.data import dataset, encoding
from vdot.data.batch import Example, Shape
from vdot.data.dataset import (
    EncodedSource,
    Feeder,
    JointSampler,
    JointSource,
    LiveSource,
    Sampler,
    make_sampler,
    open_source,
)
from vdot.data.decoding import Workers
from vdot.data.encoding import EncodeConfig, encode_table
from vdot.data.manifest import DataConfig, StillsConfig, check_table
from vdot.data.shards import part_files
from vdot.errors import ConfigError, InputError
from vdot.parallel.state import Ranks
from vdot.request import Defaults

CPU = torch.device("cpu")
SMALL, LARGE = Shape(0, 1, 2, 2), Shape(1, 2, 2, 4)
DEFAULTS = Defaults(size="128*128", frame_num=17, negative_prompt="")


class Numbers:
    """Examples that say which row they are; ``broken`` rows cannot be read, ``bug`` is no file's fault."""

    def __init__(self, tasks, shapes=None, paired=None, slow=0.0) -> None:
        self.tasks = list(tasks)
        self.shapes = list(shapes or [SMALL] * len(self.tasks))
        self.paired = list(paired or [True] * len(self.tasks))
        self.identity, self.slow = "numbers", slow
        self.broken: set[int] = set()
        self.bug: Exception | None = None
        self.loads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.tasks)

    def load(self, index: int) -> Example:
        self.loads[index] += 1
        time.sleep(self.slow * (index % 3))  # threads finish out of order
        if self.bug is not None:
            raise self.bug
        if index in self.broken:
            raise InputError(f"file {index} is damaged")
        shape = self.shapes[index]
        context = torch.full((96, *shape.latent[1:]), float(index))
        real = context[:16] if self.paired[index] else None
        return Example(
            torch.full((1 + index % 4, 8), 1.0), context, real, shape.references, self.tasks[index], "p", index
        )

    def negative(self) -> torch.Tensor:
        return torch.zeros(1, 8)

    def close(self) -> None:
        pass


def take(feeder: Feeder, count: int) -> list:
    with feeder:
        return [next(feeder) for _ in range(count)]


def same(one, two) -> bool:
    tensors = [(one.text, two.text), (one.context, two.context)]
    if one.real is not None or two.real is not None:
        tensors.append((one.real, two.real))
    return (one.rows, one.numbers, one.lengths) == (two.rows, two.numbers, two.lengths) and all(
        torch.equal(a, b) for a, b in tensors
    )


# -- which rows -------------------------------------------------------------------------------------------------------


def test_rows_come_by_the_weight_of_their_task():
    """100 rows of "a" at weight 3 and 5 of "b" at weight 1: 3/400 and 1/20 each, also across shapes."""
    tasks = ["a"] * 100 + ["b"] * 5 + ["off"] * 10
    shapes = [SMALL if i % 2 else LARGE for i in range(len(tasks))]
    sampler = Sampler(shapes, tasks, {"a": 3.0, "off": 0.0}, batch_size=4, seed=1)
    counts = np.zeros(len(tasks))
    draws = 20000
    for number in range(draws):
        rows = sampler.draw(number)
        assert len({shapes[row] for row in rows}) == 1
        counts[rows[0]] += 1  # one of each batch: those of a batch share its shape and are not independent
    assert counts[105:].sum() == 0
    expected = draws * np.array([3 / 4 / 100] * 100 + [1 / 4 / 5] * 5)
    assert chisquare(counts[:105], expected).pvalue > 0.001
    later = Counter(row for number in range(draws) for row in sampler.draw(number)[1:])
    share = sum(later[row] for row in range(100)) / sum(later.values())
    assert share == pytest.approx(0.75, abs=0.01)


def test_a_draw_depends_on_seed_and_number_alone():
    make = lambda seed: Sampler([SMALL, LARGE] * 20, ["a"] * 40, batch_size=3, seed=seed)  # noqa: E731
    one, two = make(5), make(5)
    forward = [one.draw(n) for n in range(50)]
    assert forward == [two.draw(n) for n in reversed(range(50))][::-1]
    assert forward != [make(6).draw(n) for n in range(50)]


def test_rows_with_and_without_a_real_clip_do_not_mix():
    paired = [i % 2 == 0 for i in range(20)]
    sampler = Sampler([SMALL] * 20, ["a"] * 20, batch_size=4, paired=paired)
    kinds = [{paired[row] for row in sampler.draw(n)} for n in range(100)]
    assert all(len(kind) == 1 for kind in kinds) and {True} in kinds and {False} in kinds
    feeder = Feeder(Numbers(["a"] * 20, paired=paired), sampler)
    assert {batch.real is None for batch in take(feeder, 20)} == {True, False}


def test_substitutes_are_all_others_of_the_group_and_the_task_comes_first():
    tasks = ["a", "b"] * 10
    shapes = [SMALL] * 14 + [LARGE] * 6
    sampler = Sampler(shapes, tasks)
    order = list(sampler.substitutes(3, 0, 2))
    assert sorted(order) == [i for i in range(14) if i != 2]
    assert [tasks[i] for i in order] == ["a"] * 6 + ["b"] * 7
    assert order == list(sampler.substitutes(3, 0, 2)) != list(sampler.substitutes(4, 0, 2))


def test_smaller_examples_make_larger_batches_and_come_as_often_as_their_weights_say():
    """64 latent pixels a batch: 16 of SMALL, 2 of LARGE (2 + 1 frames of 8 pixels); rows as often as weights say."""
    tasks = ["a"] * 6 + ["b"] * 4
    shapes = [SMALL] * 5 + [LARGE] * 5
    sampler = Sampler(shapes, tasks, {"a": 3.0}, seed=2, pixels=64)
    counts, draws = np.zeros(10), 6000
    for number in range(draws):
        rows = sampler.draw(number)
        assert len(rows) == (16 if rows[0] < 5 else 2) and {shapes[row] for row in rows} == {shapes[rows[0]]}
        np.add.at(counts, rows, 1)
    assert sampler.sizes == (2, 16) and counts.sum() / draws == pytest.approx(sampler.mean_size, rel=0.05)
    np.testing.assert_allclose(counts / counts.sum(), [3 / 4 / 6] * 6 + [1 / 4 / 4] * 4, rtol=0.1)
    assert Sampler(shapes, tasks, pixels=64, multiple=3).sizes == (3, 15)
    assert Sampler(shapes, tasks, pixels=1).sizes == (1,)


def test_batches_of_clips_and_of_stills_come_by_their_share():
    clips = Sampler([LARGE] * 8, ["a"] * 8, batch_size=2, seed=4)
    both = JointSampler(clips, Sampler([SMALL] * 5, ["b"] * 5, seed=4, pixels=24), 0.7, seed=4)
    drawn = [both.draw(number) for number in range(4000)]
    assert both.sizes == (2, 6)
    assert all((len(rows) == 6) == (min(rows) >= 8) == (max(rows) >= 8) for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(13))
    assert sum(rows[0] >= 8 for rows in drawn) / 4000 == pytest.approx(0.7, abs=0.03)  # four deviations
    assert drawn[7] == both.draw(7)
    assert sorted(both.substitutes(0, 0, 3)) == [0, 1, 2, 4, 5, 6, 7]
    assert sorted(both.substitutes(0, 0, 10)) == [8, 9, 11, 12]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_batches_of_either_kind(workers):
    source = JointSource(Numbers(["a"] * 8, [LARGE] * 8), Numbers(["b"] * 5))
    config = DataConfig(encoded="a", stills=StillsConfig("b", share=0.5, task_weights={"b": 2.0}))
    sampler = make_sampler(source, config, 2, 1, multiple=2)
    assert sampler.sizes == (2, 12) and source.shapes[8:] == [SMALL] * 5  # 2 x 24 latent pixels and 12 x 4
    whole = take(Feeder(source, sampler, workers=workers), 12)
    assert {batch.shape for batch in whole} == {SMALL, LARGE}
    numbers = [number for batch in whole for number in batch.numbers]
    assert len(set(numbers)) == len(numbers)
    for rank in (0, 1):
        for batch, part in zip(whole, take(Feeder(source, sampler, rank, 2, workers), 12), strict=True):
            half = len(batch.rows) // 2
            assert part.rows == batch.rows[rank * half : (rank + 1) * half]
            assert part.numbers == batch.numbers[rank * half : (rank + 1) * half]
    with pytest.raises(ConfigError, match="a global batch of 2 cannot be shared by 3"):
        Feeder(source, sampler, 0, 3)


@pytest.mark.parametrize(
    "weights, word",
    [({"depht": 1}, "no rows"), ({"a": -1}, "from 0 up"), ({"a": float("nan")}, "from 0 up"), ({"a": 0}, "nothing")],
)
def test_weights_that_cannot_be(weights, word):
    with pytest.raises(ConfigError, match=word):
        Sampler([SMALL], ["a"], weights)


# -- the same batches, however they are loaded ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers_or_ranks(workers):
    def feed(**options):
        source = Numbers(["a", "b", "c"] * 7, [SMALL, LARGE, SMALL] * 7, slow=0.002)
        source.broken = {0, 4}
        sampler = Sampler(source.shapes, source.tasks, {"b": 2.0}, batch_size=4, seed=3)
        return take(Feeder(source, sampler, **options), 12)

    alone = feed(workers=0)
    assert [batch.numbers for batch in alone[:2]] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert all(same(a, b) for a, b in zip(alone, feed(workers=workers, prefetch=3), strict=True))
    halves = [feed(workers=workers, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    for whole, left, right in zip(alone, *halves, strict=True):
        assert left.shape == right.shape == whole.shape
        assert left.rows + right.rows == whole.rows and left.numbers + right.numbers == whole.numbers
        assert torch.equal(torch.cat([left.context, right.context]), whole.context)
    assert all(same(a, b) for a, b in zip(alone[5:], feed(workers=workers, start=5), strict=False))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    source = Numbers(["a"])
    with pytest.raises(ConfigError, match="multiple of 2"):
        Feeder(source, Sampler(source.shapes, source.tasks, batch_size=3), 0, 2)


# -- files that rot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_reported_once_and_replaced_by_one_of_its_shape_and_task(workers, said):
    source = Numbers(["a", "a", "b", "a"], [SMALL, SMALL, SMALL, LARGE])
    source.broken = {0}
    feeder = Feeder(source, Sampler(source.shapes, source.tasks, {"b": 0.1}, seed=2), workers=workers)
    batches = take(feeder, 60)
    drawn = [feeder.sampler.draw(n)[0] for n in range(60)]
    assert 0 in drawn
    assert [batch.rows[0] for batch in batches] == [1 if row == 0 else row for row in drawn]
    assert feeder.failures == 1 and source.loads[0] <= 2 * max(1, workers)
    reports = [line for line in said if "cannot be read" in line]
    assert len(reports) == 1 and "row 0 (a)" in reports[0] and "file 0 is damaged" in reports[0]


def test_a_disk_that_stumbles_once_costs_nothing(said):
    source = Numbers(["a", "a"])
    loaded = source.load
    stumbles = iter([OSError(5, "Input/output error")])

    def load(index):
        for error in stumbles:
            raise error
        return loaded(index)

    source.load = load
    feeder = Feeder(source, Sampler(source.shapes, source.tasks), workers=0)
    assert [b.rows for b in take(feeder, 5)] == [tuple(feeder.sampler.draw(n)) for n in range(5)]
    assert feeder.failures == 0 and not said


def test_when_all_rows_of_a_shape_are_gone_it_is_said():
    source = Numbers(["a", "b", "a"], [SMALL, SMALL, LARGE])
    source.broken = {0, 1}
    with pytest.raises(InputError, match=r"no row of the shape .*frames=1.* can be read any more.*damaged"):
        take(Feeder(source, Sampler(source.shapes, source.tasks)), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_is_raised_and_not_taken_for_a_bad_file(workers):
    source = Numbers(["a", "a"])
    source.bug = ZeroDivisionError("a bug")
    feeder = Feeder(source, Sampler(source.shapes, source.tasks), workers=workers)
    with pytest.raises(ZeroDivisionError):
        take(feeder, 1)
    assert feeder.failures == 0


def test_a_row_that_has_changed_its_shape_is_not_let_into_a_batch(said):
    source = Numbers(["a"] * 4)
    feeder = Feeder(source, Sampler(source.shapes, source.tasks, batch_size=4), workers=0)
    loaded = source.load
    source.load = lambda i: replace(loaded(i), context=torch.zeros(96, 5, 2, 2)) if i == 1 else loaded(i)
    assert all(1 not in batch.rows for batch in take(feeder, 10)) and feeder.failures == 1


def test_loading_threads_leave_the_cores_to_training():
    """One OpenMP thread each, and those of the thread that trains stay as they were."""
    source, before, seen = Numbers(["a"] * 4), torch.get_num_threads(), set()
    loaded = source.load
    source.load = lambda i: seen.add(torch.get_num_threads()) or loaded(i)
    try:
        torch.set_num_threads(3)
        with Feeder(source, Sampler(source.shapes, source.tasks), workers=2) as feeder:
            take(feeder, 3)
        assert seen == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_thread_is_left():
    def feeders() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("vdot-feeder")]

    source = Numbers(["a"] * 9, slow=0.02)
    feeder = Feeder(source, Sampler(source.shapes, source.tasks, batch_size=3), workers=3, prefetch=8)
    next(feeder)
    assert feeders()
    start = time.monotonic()
    feeder.close()
    feeder.close()
    assert not feeders() and time.monotonic() - start < 1  # what has not begun is dropped


# -- encoded rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(tmp_path, table, encoder, monkeypatch):
    """Three equal shapes in one file; the folder and its table."""
    monkeypatch.setattr(encoding, "load_encoder", lambda *_: encoder)
    path = table([MIXED[0], {**MIXED[0], "prompt": "another"}, {**MIXED[1], "prompt": "third"}])
    folder = tmp_path / "encoded"
    encode_table(EncodeConfig(path=path, ckpt_dir=str(TINY), out=str(folder), workers=0), CPU, Ranks())
    return folder, path


def test_a_shard_that_rots_while_training_is_reported_and_its_row_replaced(encoded, said):
    folder, _ = encoded
    source = EncodedSource(folder)
    sampler = Sampler(source.shapes, source.tasks, batch_size=2, seed=1, paired=source.paired)
    want = take(Feeder(source, sampler), 8)
    (path,) = part_files(folder)
    place = source._places[source.records[1].key]
    data = bytearray(path.read_bytes())
    data[place.tensors["real"][2]] ^= 1  # one bit of one row, under a source that is open
    path.write_bytes(data)
    feeders = [Feeder(source, sampler, rank, 2) for rank in (0, 1)]
    halves = [take(feeder, 8) for feeder in feeders]
    for whole, *parts in zip(want, *halves, strict=True):
        assert {part.shape for part in parts} == {whole.shape}
        for part, row in zip(parts, whole.rows, strict=True):
            assert part.rows[0] == row if row != 1 else part.rows[0] in (0, 2)
    assert [feeder.failures for feeder in feeders] == [1, 1]
    assert sum("is damaged at row 1" in line for line in said) == 2  # once on each rank
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        take(Feeder(source, sampler), 1)


def test_encoded_rows_are_the_same_for_any_number_of_workers_and_ranks(encoded):
    source = EncodedSource(encoded[0])
    sampler = Sampler(source.shapes, source.tasks, batch_size=2, paired=source.paired)
    alone = take(Feeder(source, sampler, workers=0), 5)
    assert all(same(a, b) for a, b in zip(alone, take(Feeder(source, sampler, workers=2), 5), strict=True))
    for rank in (0, 1):
        for whole, part in zip(alone, take(Feeder(source, sampler, rank, 2, workers=2), 5), strict=True):
            assert torch.equal(whole.context[rank], part.context[0]) and torch.equal(whole.real[rank], part.real[0])


# -- rows encoded on the fly ------------------------------------------------------------------------------------------


@pytest.fixture
def live(table, encoder):
    """``live(rows, workers)`` -> a source, closed at the end."""
    made = []

    def make(rows, workers=0, **options):
        entries, layout = check_table(DataConfig(path=table(rows)), DEFAULTS)
        made.append(LiveSource(entries, layout, encoder, "", workers))
        return made[-1]

    yield make
    for source in made:
        source.close()


def feed(source, count, **options):
    sampler = Sampler(source.shapes, source.tasks, batch_size=2, paired=source.paired)
    return take(Feeder(source, sampler, **options), count)


def test_a_clip_that_vanishes_while_training_is_replaced(tmp_path, clips, live, said):
    mine = tmp_path / "mine.mp4"
    mine.write_bytes((clips / "real.mp4").read_bytes())
    source = live([MIXED[0], {"task": "depth", "src": str(mine), "video": "real.mp4"}])
    feed(source, 2)
    mine.unlink()
    batches = feed(source, 4)
    assert {row for batch in batches for row in batch.rows} == {0}
    assert sum("row 1 (depth) cannot be read" in line and "mine.mp4 does not exist" in line for line in said) == 1


def test_a_decoding_process_that_dies_is_replaced_and_changes_nothing(live, said):
    """Killed from outside, as the kernel does when memory is short: decoded again. By a row, each time: replaced."""
    source = live([*MIXED[:2], {"task": "bad", "src": "wide.mp4", "video": "wide.mp4"}])
    want = feed(source, 8, workers=0)
    source.workers = Workers(failing.crash, 1)
    sampler = Sampler(source.shapes, source.tasks, batch_size=2, paired=source.paired)
    start = next(n for n in range(8) if 2 in sampler.draw(n)) - 1
    assert 2 not in sampler.draw(start)
    with Feeder(source, sampler, workers=1, start=start, prefetch=1) as feeder:
        source.workers.call(source.entries[0].row, source.layout)
        (pid,) = source.workers.processes
        psutil.Process(pid).kill()
        got = [next(feeder) for _ in range(4)]
    source.workers.close()
    assert same(got[0], want[start]) and not source.workers.processes and not psutil.pid_exists(pid)
    for mine, other in zip(got, want[start:], strict=False):
        for place, row in enumerate(other.rows):
            assert mine.rows[place] == row if row != 2 else mine.rows[place] in (0, 1)
            assert row == 2 or torch.equal(mine.context[place], other.context[place])
    assert feeder.failures == 1
    assert sum("SIGKILL, perhaps for want of host memory" in line for line in said) == 1
    assert sum("row 2 (bad) cannot be read" in line and "SIGSEGV" in line for line in said) == 1


def test_a_process_gets_its_call_again_and_errors_come_through(tmp_path, said):
    workers, note = Workers(failing.misbehave, 1), str(tmp_path / "note")
    assert workers.call("die once", note) == note
    assert said == ["a decoding process died (exit code 3); it is started anew and goes on where it was"]
    with pytest.raises(FileNotFoundError):
        workers.call("input")
    with pytest.raises(RuntimeError, match=r"(?s)in a decoding process:.*KeyError"):
        workers.call("bug")
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.call("input")


def test_a_process_that_hangs_is_given_up_on(said):
    workers = Workers(failing.misbehave, 1, patience=0.1)
    with pytest.raises(InputError, match="has not answered for 0 s again"):
        workers.call("hang")
    workers.close()
    assert len(said) == 1


def test_closing_ends_a_call_that_hangs():
    workers = Workers(failing.misbehave, 1)
    errors = []

    def call():
        try:
            workers.call("hang")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    while not workers.processes:
        time.sleep(0.01)
    workers.close()
    thread.join(300)
    assert errors == ["the decoding processes have been closed"]


# -- what a config names ----------------------------------------------------------------------------------------------


def test_a_source_is_opened_as_the_config_says(encoded, encoder, monkeypatch, said):
    folder, path = encoded
    monkeypatch.setattr(dataset, "load_encoder", lambda *_: encoder)
    stored = open_source(DataConfig(encoded=str(folder)), TINY, CPU)
    live = open_source(DataConfig(path=path, workers=0), TINY, CPU)
    assert isinstance(stored, EncodedSource) and isinstance(live, LiveSource)
    assert (stored.shapes, stored.tasks, stored.paired) == (live.shapes, live.tasks, live.paired)
    assert live.negative().shape == stored.negative().shape == (1, 128)
    assert stored.identity == EncodedSource(folder).identity != live.identity
    with pytest.raises(ConfigError, match="no training table"):
        open_source(DataConfig(), TINY, CPU)
    with pytest.raises(ConfigError, match="size"):
        open_source(DataConfig(encoded=str(folder), size="128*128"), TINY, CPU)


def test_clips_and_stills_of_two_folders_are_one_source(encoded, tmp_path, table, encoder, monkeypatch):
    """A second folder of two rows, a single frame each, and one made with another negative prompt."""
    folder, _ = encoded
    path = table([MIXED[0], MIXED[1]], "stills.csv")
    for name, more in (("stills", {}), ("other", {"negative_prompt": "blurred"})):
        options = EncodeConfig(path=path, frame_num=1, ckpt_dir=str(TINY), out=str(tmp_path / name), workers=0, **more)
        encode_table(options, CPU, Ranks())
    config = DataConfig(encoded=str(folder), stills=StillsConfig(str(tmp_path / "stills")))
    source = open_source(config, TINY, CPU)
    assert isinstance(source, JointSource) and len(source) == 5
    clips, stills = EncodedSource(folder), EncodedSource(tmp_path / "stills")
    assert source.identity not in (clips.identity, stills.identity)
    assert [shape.frames for shape in source.shapes[3:]] == [1, 1] and source.shapes[:3] == clips.shapes
    for index in range(5):
        got, want = source.load(index), clips.load(index) if index < 3 else stills.load(index - 3)
        assert got.row == index and got.task == want.task and torch.equal(got.context, want.context)
    assert torch.equal(source.negative(), clips.negative())
    with pytest.raises(ConfigError, match="different negative prompts, '' and 'blurred'"):
        open_source(DataConfig(encoded=str(folder), stills=StillsConfig(str(tmp_path / "other"))), TINY, CPU)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"data\.stills\.share is a share"):
            StillsConfig(share=share)
