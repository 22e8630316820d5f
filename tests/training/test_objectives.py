"""Flow matching's dropped sources, against clips that never had one."""

from functools import partial

import pytest
import torch

from tests.conftest import TINY
from tests.training.toy import ToySource, toy_checkpoint, toy_config
from vdot.checkpoints import load_dit
from vdot.data.batch import Batch, Example, collate
from vdot.data.encoding import load_encoder
from vdot.data.world import WorldConfig, WorldSource
from vdot.errors import ConfigError
from vdot.parallel.state import Ranks
from vdot.training.config import FlowConfig
from vdot.training.loop import train
from vdot.training.objectives import Flow, drop_source, drop_text, without_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(TINY, CPU, "float32")


def batch_of(encoder, task: str) -> Batch:
    source = WorldSource(WorldConfig(clips=2, frames=5, tasks=[task], seed=7), encoder, "")
    return collate([source.load(0), source.load(1)], [0, 1])


@pytest.mark.parametrize("task", ["depth", "outpainting", "reference_depth"])
def test_without_its_source_a_clip_is_told_by_words_and_references(encoder, task):
    # float32 on both sides, in other batches: 1e-5 of latents whose deviation is 1.
    batch, plain = batch_of(encoder, task), batch_of(encoder, "t2v")
    lead, shape = batch.references, batch.shape
    nothing = without_source(TINY, {(shape.frames, shape.height, shape.width)}, CPU)
    dropped = drop_source(batch, nothing, 1.0, (0, 0))
    assert not torch.allclose(batch.context[:, :, lead:], plain.context, atol=0.1)
    torch.testing.assert_close(dropped.context[:, :, lead:], plain.context, rtol=0, atol=1e-5)
    assert torch.equal(dropped.context[:, :, :lead], batch.context[:, :, :lead])
    assert dropped.real is batch.real and dropped.text is batch.text


def test_which_samples_depends_on_their_numbers_alone():
    source, numbers = ToySource(2), range(400)
    nothing = {(2, 4, 4): torch.zeros(96, 2, 4, 4)}

    def dropped(numbers, key=(0, 0)) -> list[bool]:
        batch = drop_source(collate([source.load(0)] * len(numbers), numbers), nothing, 0.3, key)
        return [not bool(context.any()) for context in batch.context]

    whole = dropped(numbers)
    assert 0.3 * 400 - 30 < sum(whole) < 0.3 * 400 + 30  # more than three deviations
    assert dropped(numbers[100:200]) == whole[100:200] != dropped(numbers[100:200], (0, 1))
    batch = drop_text(collate([source.load(0)] * 400, numbers), torch.zeros(3, 128), 0.3, (0, 0))
    assert [not bool(text.any()) for text in batch.text] != whole  # drawn apart
    kept = collate([source.load(0)], [0])
    assert drop_source(kept, {}, 0.0, (0, 0)) is kept


class Changed(ToySource):
    """The same rows under other sources."""

    def load(self, index: int) -> Example:
        example = super().load(index)
        example.context[:, example.references :] += 1
        return example


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_teacher_that_sees_no_source_learns_the_same_whatever_it_was(tmp_path, share):
    teacher = toy_checkpoint(tmp_path / "teacher")
    learned = []
    for source in (ToySource(), Changed()):
        options = {"objective": "flow", "steps": 2, "flow__drop_source": share, "export_layouts": "[native]"}
        config = toy_config(teacher, tmp_path / type(source).__name__, **options)
        train(config, Ranks(), CPU, partial(Flow, config, Ranks(), CPU, source))
        learned.append(load_dit(f"{config.output_dir}/export", "float32", CPU).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(d.values() for d in learned), strict=True)) == bool(share)


@pytest.mark.parametrize("name", ["drop_text", "drop_source"])
def test_a_share_beyond_one_is_refused(name):
    with pytest.raises(ConfigError, match=f"flow.{name} is a share"):
        FlowConfig(**{name: 1.5})
