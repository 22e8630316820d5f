"""The procedural world, encoded once: the same examples as those that are drawn while training."""

import pytest
import torch

from tests.conftest import TINY
from vdot.data import encoding
from vdot.data.dataset import EncodedSource
from vdot.data.encoding import EncodeConfig, encode_table
from vdot.data.world import WorldConfig, WorldSource
from vdot.errors import ConfigError
from vdot.parallel.state import Ranks

# A control, several references, a mask with a reference.
TASKS = ["depth", "r2v_several", "swap_anything"]


@pytest.fixture
def encode(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(encoding, "load_encoder", lambda *_: encoder)

    def run(clips: int, **options):
        world = WorldConfig(clips, 32, 5, TASKS, seed=3)
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


def test_more_clips_of_the_same_world_go_on(encode, tmp_path):
    encode(3, workers=0)
    _, summary = encode(6, workers=0)
    assert [bool(o.seconds) for o in summary.outcomes] == [False] * 3 + [True] * 3
    assert len(EncodedSource(tmp_path / "w")) == 6


def test_a_table_and_the_world_at_once_are_refused(encode):
    with pytest.raises(ConfigError, match="once"):
        encode(3, path="table.csv")
