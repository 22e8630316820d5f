"""Gradients of both training updates on several processes equal those of one: data, sequence, both, sharded or not."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.networks import mesh
from tests.training.toy import ToySource, toy_checkpoint, toy_config
from vdot.parallel.state import Ranks
from vdot.training.networks import Trained
from vdot.training.objectives import Distill, Flow, Updater

# Relative to the largest gradient of a tensor; float32, sums in another order.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("teacher") / "toy")


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


def collected(trained: Trained) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in trained.parameters.items() if p.grad is not None}


def updates(teacher: str, output: str, values: dict, ulysses: int, ring: int) -> dict[str, dict[str, Tensor]]:
    """Gradients by update and name of a step of each kind on this process's share of the batch; no update."""
    world = dist.get_world_size() if dist.is_initialized() and ulysses else 1
    ranks = Ranks(mesh(ulysses, ring) if world > 1 else Ranks().mesh, dist.get_rank() if world > 1 else 0, world)
    config = toy_config(teacher, output, **values)
    kind = Flow if config.objective == "flow" else Distill
    objective = kind(config, ranks, torch.device("cpu"), ToySource())
    seen: dict[str, dict[str, Tensor]] = {}

    class Recorded(Updater):
        def _apply(self, step: int) -> None:
            seen[f"{self.name} {step}"] = collected(self.trained)

    for updater in objective.updaters:
        updater.__class__ = Recorded
    with objective.batches(0) as feeder:
        every = config.distill.generator_every
        for step in (0, every, every + 1):  # DMD and OT, GAN, the discriminator
            batches = [next(feeder) for _ in range(config.accumulation)]
            objective.step(step, batches, lambda name: nullcontext())
    return seen


def compare(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(expected) >= 2
    for update, gradients in expected.items():
        assert found[update].keys() == gradients.keys()
        for name, gradient in gradients.items():
            bound = TOLERANCE * gradient.abs().max() + 1e-7
            assert (found[update][name] - gradient).abs().max() <= bound, f"{update}: {name}"


LAYOUTS = {"data": (2, 1, 1), "ulysses": (2, 2, 1), "ring": (2, 1, 2), "data x ulysses": (4, 2, 1)}


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> Iterator:
    """One process's gradients of a setting, computed once."""
    known: dict[str, dict] = {}

    def of(**values) -> dict:
        key = repr(sorted(values.items()))
        if key not in known:
            known[key] = updates(str(teacher), str(tmp_path_factory.mktemp("alone")), values, 0, 1)
        return known[key]

    yield of


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["sharded", "whole"])
def test_gradients_equal_one_process(layout, shard, teacher, alone, pool, tmp_path):
    world, ulysses, ring = LAYOUTS[layout]
    values = {"batch_size": 4}
    more = {"parallel__shard": str(shard).lower(), "parallel__recompute": "full"}
    for found in pool.run(world, updates, str(teacher), str(tmp_path), values | more, ulysses, ring):
        compare(found, alone(**values))


@pytest.mark.parametrize("sync_each", [True, False])
def test_accumulation_on_shards_equals_the_large_batch(sync_each, teacher, alone, pool, tmp_path):
    """Two micro batches of two on two processes: the mean of all four, reduced once or each time."""
    values = {"batch_size": 2, "accumulation": 2}
    more = {"parallel__sync_each": str(sync_each).lower()}
    for found in pool.run(2, updates, str(teacher), str(tmp_path), values | more, 1, 1):
        compare(found, alone(**values))


@pytest.mark.parametrize("shard", [True, False], ids=["sharded", "whole"])
def test_adapters_over_one_base_equal_one_process(shard, teacher, alone, pool, tmp_path):
    values = {"batch_size": 4, "lora__rank": 4}
    more = {"parallel__shard": str(shard).lower(), "parallel__recompute": "selective"}
    for found in pool.run(2, updates, str(teacher), str(tmp_path), values | more, 2, 1):
        compare(found, alone(**values))


def test_flow_matching_and_replicas_of_shards(teacher, alone, pool, tmp_path):
    values = {"batch_size": 4, "objective": "flow"}
    for found in pool.run(4, updates, str(teacher), str(tmp_path), values | {"parallel__replicas": 2}, 1, 1):
        compare(found, alone(**values))
