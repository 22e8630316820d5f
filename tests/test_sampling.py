"""Schedules and solvers against the golden tables, diffusers and analytic velocity fields."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vdot.errors import ConfigError
from vdot.sampling import (
    RELEASE_NOISE_LEVELS,
    SOLVERS,
    VACE_SCHEDULE,
    VDOT_SCHEDULE,
    FewStepSchedule,
    draw_noise,
    sample,
    trajectory,
)


def schedule_of(case: str) -> FewStepSchedule:
    solver, steps, shift = case.split(".")
    return FewStepSchedule(
        steps=int(steps.removeprefix("steps")),
        shift=float(shift.removeprefix("shift")),
        solver={"unipc": "unipc", "dpmpp": "dpm++"}[solver],
    )


CASES = [f"{s}.steps{n}.shift{k}" for s in ("unipc", "dpmpp") for n in (4, 10) for k in (16, 8, 5)]


@pytest.mark.parametrize("case", CASES)
def test_tables_and_trajectories_equal_the_original(case, golden, golden_json):
    tensors, coefficients = golden("solver/trajectories"), golden_json("solver/cases")["velocity"]
    a, b, c = (coefficients[k] for k in "abc")
    schedule = schedule_of(case)
    assert torch.equal(schedule.timesteps(), tensors[f"{case}.timesteps"])
    torch.testing.assert_close(schedule.sigmas(), tensors[f"{case}.sigmas"], atol=1e-7, rtol=0)

    def velocity(x, t):
        t = t[0].item()
        return a * x - b * torch.sin(3 * x) * (t / 1000) + c * math.cos(5 * t / 1000)

    path = torch.stack([tensors["x_init"], *trajectory(velocity, tensors["x_init"], schedule, torch.randn)])
    torch.testing.assert_close(path, tensors[f"{case}.trajectory"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_one_evaluation_a_step_and_exact_on_straight_paths(solver, steps):
    """If x = (1-s) x0 + s n moves at the constant velocity n - x0, every solver must end at x0 (float32: 1e-5)."""
    x0, noise = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    schedule, calls = FewStepSchedule(steps=steps, shift=8.0, solver=solver), []
    levels = dict(zip(schedule.timesteps().tolist(), schedule.sigmas().tolist(), strict=False))

    def velocity(x, t):
        calls.append(t.item())
        return (x - x0) / levels[t.item()]  # the exact velocity of any point on a straight path to x0

    out = sample(velocity, noise, schedule, torch.Generator().manual_seed(1))
    assert len(calls) == steps == schedule.evaluations
    torch.testing.assert_close(out, x0, atol=2e-5, rtol=0)


def gaussian_error(solver: str, steps: int) -> float:
    """Distance from the exact end point for data N(0, 0.5^2), whose velocity is x (s - (1-s)/4) / (s^2 + (1-s)^2/4)."""
    schedule = FewStepSchedule(steps=steps, shift=1.0, solver=solver)
    table = dict(zip(schedule.timesteps().tolist(), schedule.sigmas().tolist(), strict=False))

    def velocity(x, t):
        s = table[t.item()]
        return x * (s - (1 - s) / 4) / (s**2 + (1 - s) ** 2 / 4)

    return (sample(velocity, torch.ones(1, 1, 1, 1, 1), schedule) - 0.5).abs().item()


def test_convergence_on_a_gaussian():
    """Euler is first order (4x the steps, a quarter of the error); the multistep solvers do better, at less error.

    Their last step is first order, so the whole path is between first and second order: a factor above 5.5, not 16.
    """
    coarse, fine = gaussian_error("euler", 20), gaussian_error("euler", 80)
    assert 3.2 < coarse / fine < 4.8
    for solver in ("unipc", "dpm++"):
        assert gaussian_error(solver, 20) / gaussian_error(solver, 80) > 5.5
        assert gaussian_error(solver, 20) < coarse / 2


def test_euler_equals_diffusers():
    schedule = FewStepSchedule(steps=4, shift=8.0, solver="euler")
    theirs = FlowMatchEulerDiscreteScheduler(shift=8.0)
    theirs.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(schedule.timesteps(), theirs.timesteps, atol=1e-3, rtol=0)
    x = y = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    ours = sample(lambda x, t: torch.sin(3 * x), x, schedule)
    for t in theirs.timesteps:
        y = theirs.step(torch.sin(3 * y), t, y, return_dict=False)[0]
    torch.testing.assert_close(ours, y, atol=1e-5, rtol=0)


def test_renoise_is_the_training_rollout(golden):
    """Golden backward simulation, linear schedule: labels 1000, 960, 888.9, 727.3 and the noise levels that match."""
    schedule = FewStepSchedule(steps=4, shift=8.0, solver="renoise")
    expected = torch.tensor([1000.0, 960.0, 888.8889, 727.2728])
    torch.testing.assert_close(schedule.timesteps(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(schedule.sigmas()[:-1] * 1000, schedule.timesteps(), atol=1e-3, rtol=0)


def test_same_seed_same_bytes():
    schedule = FewStepSchedule(solver="renoise")

    def run():
        noise, generator = draw_noise((1, 4, 2, 3, 3), seed=7)
        return sample(lambda x, t: torch.sin(x), noise, schedule, generator)

    assert torch.equal(run(), run())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 0}, "whole number"),
        ({"steps": -1}, "whole number"),
        ({"steps": 1.5}, "whole number"),
        ({"shift": 0.0}, "positive"),
        ({"shift": float("nan")}, "positive"),
        ({"guide_scale": float("nan")}, "finite"),
        ({"guide_scale": float("inf")}, "finite"),
        ({"solver": "ddim"}, "unipc, dpm"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        FewStepSchedule(**values)


def test_published_schedules():
    assert (VDOT_SCHEDULE.steps, VDOT_SCHEDULE.shift, VDOT_SCHEDULE.solver, VDOT_SCHEDULE.evaluations) == (
        4,
        16.0,
        "unipc",
        4,
    )
    assert VACE_SCHEDULE.evaluations == 100
    assert VDOT_SCHEDULE.timesteps().tolist() == [999, 979, 941, 841]
    assert FewStepSchedule(guide_scale=1.5).guided and not FewStepSchedule(guide_scale=1).guided
    assert VDOT_SCHEDULE.override(steps=8, shift=None) == FewStepSchedule(steps=8)


def test_noise_levels_belong_to_the_steps_that_they_were_given_for():
    schedule = FewStepSchedule(4, 8.0, "renoise", noise_levels=RELEASE_NOISE_LEVELS)
    assert schedule.override(steps=4, shift=8.0, guide_scale=2.0).noise_levels == RELEASE_NOISE_LEVELS
    assert schedule.override(steps=2).noise_levels is None and schedule.override(solver="unipc").noise_levels is None
    assert FewStepSchedule.from_dict(schedule.to_dict()) == schedule
    assert "noise_levels" not in FewStepSchedule().to_dict()
    for wrong in ({"steps": 3}, {"solver": "unipc"}):
        with pytest.raises(ConfigError, match="noise_levels"):
            FewStepSchedule(**{"steps": 4, "solver": "renoise", "noise_levels": RELEASE_NOISE_LEVELS} | wrong)
