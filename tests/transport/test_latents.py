"""Latents to clouds and back, the YAML config, and the distillation term built from them."""

from dataclasses import fields

import pytest
import torch

from vdot.config import load_config
from vdot.errors import ConfigError, InputError
from vdot.transport import OTConfig, clouds_to_latents, latents_to_clouds, sinkhorn, transport_latents
from vdot.transport.problem import build
from vdot.transport.sinkhorn import choose_engine


def latents(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 3, 16, 8, 12)), generator=torch.Generator().manual_seed(seed))


def test_shapes_and_values():
    z = latents(0, 2, 3, 16, 8, 12)
    frames = latents_to_clouds(z)
    assert frames.shape == (6, 24, 16)
    torch.testing.assert_close(frames[4, 7], z[1, 1, :, 2:4, 2:4].mean((1, 2)))  # point 7 = row 1, column 1 of 4 x 6
    clip = latents_to_clouds(z, clouds="clip")
    assert clip.shape == (2, 72, 16)
    torch.testing.assert_close(clip[1, 24:48], frames[4])
    assert latents_to_clouds(z, pooling=1).shape == (6, 96, 16)
    assert latents_to_clouds(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("clouds", ["frame", "clip"])
@pytest.mark.parametrize("pooling", [1, 2, 3])
def test_back_is_the_adjoint(clouds, pooling):
    """<pool(z), g> = <z, pool^T(g)>, also where the last pixels do not fill a pool (they get no gradient)."""
    z = latents(1, 2, 3, 4, 7, 11).double()
    points = latents_to_clouds(z, pooling=pooling, clouds=clouds)
    g = torch.randn(points.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    back = clouds_to_latents(g, z.shape, pooling=pooling)
    torch.testing.assert_close((points * g).sum(), (z * back).sum())


def test_bad_latents():
    with pytest.raises(InputError, match=r"\[B,T,C,H,W\]"):
        latents_to_clouds(torch.zeros(3, 16, 8, 8))
    with pytest.raises(InputError, match="pooling"):
        latents_to_clouds(latents(0), pooling=9)
    with pytest.raises(ConfigError, match="clip"):
        latents_to_clouds(latents(0), clouds="video")
    with pytest.raises(InputError, match="one shape"):
        transport_latents(latents(0), latents(0, 1, 3, 16, 8, 8), OTConfig())


@pytest.mark.parametrize("clouds", ["frame", "clip"])
@pytest.mark.parametrize("gradient", ["closed", "unrolled"])
def test_gradient_is_that_of_the_cost(clouds, gradient):
    """Along a random direction of the un-pooled latents: central difference of the summed value, 1e-5 (float64)."""
    fake, real = latents(1, 1, 2, 16, 6, 6).double(), latents(2, 1, 2, 16, 6, 6).double()
    solved = {"tol": 1e-10, "max_iters": 5000} if gradient == "closed" else {"tol": 0.0, "max_iters": 20}
    config = OTConfig(eps=0.5, gradient=gradient, clouds=clouds, **solved)
    grad, transport = transport_latents(fake, real, config)
    assert grad.shape == fake.shape and len(transport.cost) == (2 if clouds == "frame" else 1)
    direction = latents(3, *fake.shape).double()

    def value(z: torch.Tensor) -> torch.Tensor:
        out = transport_latents(z, real, config)[1]
        return (out.objective if gradient == "closed" else out.cost).sum()

    expected = (value(fake + 1e-4 * direction) - value(fake - 1e-4 * direction)) / 2e-4
    torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=0)


CHANGES = {
    "eps": 0.1,
    "eps_mode": "relative",
    "p": 1,
    "reach": 1.0,
    "gradient": "unrolled",
    "debias": True,
    "pooling": 1,
    "clouds": "clip",
    "max_iters": 3,
    "tol": 1e-4,
    "relaxation": 1.2,
    "eps_scaling": 0.5,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_the_result(name):
    configs = [OTConfig(**{"eps": 1.0, **change}) for change in ({}, {name: CHANGES[name]})]
    grads = [transport_latents(latents(1), latents(2), config)[0] for config in configs]
    assert not torch.equal(*grads)


def test_fields_that_choose_how_not_what():
    """engine and memory_mb change no result, but the engine built and the size of a group."""
    assert {f.name for f in fields(OTConfig)} == {*CHANGES, "engine", "memory_mb"}
    x = latents(0, 8, 512, 16)
    problem = build(x, x, torch.zeros(8, 1, 16), torch.full((8,), 0.1), 2, (None, None), None)
    kinds = {name: choose_engine(problem, name, 2)[0](problem) for name in ("auto", "cached", "streamed", "compiled")}
    assert [type(k).__name__ for k in kinds.values()] == ["Cached", "Cached", "Streamed", "Streamed"]
    assert [choose_engine(problem, "auto", mb)[1] for mb in (1, 2, 4, 100)] == [1, 2, 4, 8]
    assert type(choose_engine(problem, "auto", None)[0](problem)).__name__ == "Cached"
    small = OTConfig(engine="streamed", memory_mb=1)
    torch.testing.assert_close(
        transport_latents(latents(1), latents(2), small)[0],
        transport_latents(latents(1), latents(2), OTConfig())[0],
        rtol=1e-3, atol=1e-6,
    )  # fmt: skip


def test_config_is_strict_yaml(tmp_path):
    def load(text):
        (tmp_path / "ot.yaml").write_text(text)
        return load_config(OTConfig, tmp_path / "ot.yaml")

    assert load("eps: 0.05\nreach: 2.0\nclouds: clip") == OTConfig(eps=0.05, reach=2.0, clouds="clip")
    with pytest.raises(ConfigError, match="unknown key 'epsilon'"):
        load("epsilon: 0.05")
    with pytest.raises(ConfigError, match="max_iters is 'many'"):
        load("max_iters: many")


def test_clip_sees_motion_between_frames():
    """A clip whose frames are swapped costs nothing as one cloud and much frame by frame."""
    fake = latents(1)
    swapped = fake.flip(1)
    options = {"pooling": 2}
    clip = sinkhorn(*(latents_to_clouds(z, clouds="clip", **options) for z in (fake, swapped)), eps=0.01)
    frame = sinkhorn(*(latents_to_clouds(z, clouds="frame", **options) for z in (fake, swapped)), eps=0.01)
    assert clip.cost.item() < 0.01 * frame.cost.max().item()
