"""The procedural world, encoded once: the same examples as those that are drawn while training."""

import pytest
import torch

from tests.conftest import TINY
from vdot.data import encoding
from vdot.data.dataset import EncodedSource
from vdot.data.decoding import widen
from vdot.data.encoding import EncodeConfig, encode_table
from vdot.data.world import WorldConfig, WorldSource, draw_pixels
from vdot.errors import ConfigError
from vdot.parallel.state import Ranks
from vdot.video import to_model

# A control, several references, a mask with a reference.
TASKS = ["depth", "r2v_several", "swap_anything"]


@pytest.fixture
def encode(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(encoding, "load_encoder", lambda *_: encoder)

    def run(clips: int, view: str = "far", **options):
        world = WorldConfig(clips, 32, 5, TASKS, seed=3, view=view)
        config = EncodeConfig(world=world, ckpt_dir=str(TINY), out=str(tmp_path / "w"), store="float32", **options)
        return world, encode_table(config, torch.device("cpu"), Ranks())

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_encoded_clips_are_those_drawn_live(encode, encoder, tmp_path, workers):
    world, summary = encode(5, workers=workers)
    assert [o.error for o in summary.outcomes] == [""] * 5
    stored, live = EncodedSource(tmp_path / "w", keep=3), WorldSource(world, encoder, "")
    assert list(stored.shapes) == list(live.shapes) and list(stored.tasks) == list(live.tasks) and all(stored.paired)
    for index in [*range(5), 0]:  # the last one from memory
        a, b = stored.load(index), live.load(index)
        # Batches of another size sum in another order; the mask channels are exact.
        for mine, other in ((a.text, b.text), (a.context[:, :, :], b.context), (a.real, b.real)):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        assert torch.equal(a.context[32:], b.context[32:]) and a.references == b.references


def test_how_many_go_together_does_not_matter(encode, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "together", 2)
    monkeypatch.setattr(encoder, "even", 4)
    monkeypatch.setattr(encoding, "TOGETHER_ON_CPU", 3)
    world, _ = encode(5, workers=0)
    stored, live = EncodedSource(tmp_path / "w"), WorldSource(world, encoder, "")
    for index in range(5):
        a, b = stored.load(index), live.load(index)
        torch.testing.assert_close(a.context, b.context, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.real, b.real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tasks", [[*TASKS, "t2v"], ["r2v_several"]])
def test_rows_are_widened_together_as_each_alone(tasks):
    world = WorldConfig(4, 32, 5, tasks, seed=3)
    rows = [draw_pixels(world, i, task) for i, task in enumerate(tasks)]
    for row, condition, real in zip(rows, *widen(rows, torch.device("cpu")), strict=True):
        alone = row.condition()
        assert condition.frames == 5 and (condition.height, condition.width) == (32, 32)
        assert len(condition.references) == len(alone.references)
        pairs = [(condition.source, alone.source), (condition.mask, alone.mask), (real, to_model(row.real))]
        for mine, other in [*pairs, *zip(condition.references, alone.references, strict=True)]:
            assert mine is other is None or torch.equal(mine, other)


def test_more_clips_of_the_same_world_go_on(encode, tmp_path):
    encode(3, workers=0)
    _, summary = encode(6, workers=0)
    assert [bool(o.seconds) for o in summary.outcomes] == [False] * 3 + [True] * 3
    assert len(EncodedSource(tmp_path / "w")) == 6


def test_time_left_is_reckoned_from_what_was_not_there(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(encoding.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"), encoding._Progress(100, shown=True) as bar:
        bar.bar.disable = True  # as where there is no terminal
        bar.reach(40)
        bar.skip(50)
        now[0] = 60.0
        bar.reach(60)  # ten rows a minute, forty to go
    assert [r.getMessage() for r in caplog.records] == ["60 of 100 rows, 4 min left"]


def test_another_view_in_the_same_folder_is_encoded_anew(encode, encoder, tmp_path):
    encode(3, workers=0)
    near, summary = encode(3, view="near", workers=0)
    assert all(o.seconds for o in summary.outcomes)
    mine, live = EncodedSource(tmp_path / "w").load(0), WorldSource(near, encoder, "").load(0)
    torch.testing.assert_close(mine.real, live.real, rtol=1e-4, atol=1e-4)


def test_a_table_and_the_world_at_once_are_refused(encode):
    with pytest.raises(ConfigError, match="once"):
        encode(3, path="table.csv")
