"""The judge of the procedural world is calibrated: near 1 on what was rendered, near chance on other scenes."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tests.evaluate.conftest import interval, worn
from vdot.data.sprites import COLOURS, Background, Motion, Scene, Thing, draw_scene, render
from vdot.data.sprites.scene import SHAPES
from vdot.data.sprites.shapes import distance
from vdot.errors import InputError
from vdot.evaluate.outlines import shape_overlaps
from vdot.evaluate.palette import BINS, colour_bins, density
from vdot.evaluate.tracks import Trail, fit, hypotheses, turns
from vdot.evaluate.truth import Found, Judge, Verdict, judge

CLIPS = 32


@pytest.fixture(scope="module")
def judges() -> list[Judge]:
    return [Judge(draw_scene(seed, "test")) for seed in range(CLIPS)]


@pytest.fixture(scope="module")
def real(judges) -> list[Verdict]:
    return [judge_(judge_.clip.frames) for judge_ in judges]


def things(verdicts: list[Verdict]) -> list[Found]:
    return [thing for verdict in verdicts for thing in verdict.things]


def rate(verdicts: list[Verdict], name: str) -> tuple[float, float]:
    """95% interval of the share of things for which it holds."""
    return interval([bool(getattr(thing, name)) for thing in things(verdicts)])


def test_rendered_clips_get_nearly_everything(real):
    assert rate(real, "present")[0] > 0.95
    assert rate(real, "shape")[0] > 0.93
    assert rate(real, "motion")[0] > 0.93
    assert rate(real, "right")[0] > 0.9
    assert np.mean([verdict.count_right for verdict in real]) > 0.97
    found = things(real)
    assert interval([t.shape_overlap for t in found])[0] > 0.9
    assert interval([t.place_overlap for t in found])[0] > 0.9
    assert interval([t.motion_error for t in found])[1] < 0.015  # short sides: one pixel of 64
    assert interval([t.place_error for t in found])[1] < 0.01
    assert interval([t.colour_error for t in found])[1] < 4
    assert np.mean([t.size_ratio for t in found]) == pytest.approx(0.97, abs=0.03)


def test_other_scenes_get_what_chance_gives(judges):
    """Of ten colours and fifteen shapes; a thing of the right size is there in half of all clips."""
    verdicts = [judge_(judges[i - 1].clip.frames) for i, judge_ in enumerate(judges)]
    assert rate(verdicts, "right")[1] < 0.05
    assert rate(verdicts, "present")[1] < 0.35
    assert np.mean([verdict.count_right for verdict in verdicts]) < 0.1
    found = [thing for thing in things(verdicts) if thing.found]
    assert interval([bool(thing.shape) for thing in found])[1] < 0.3
    assert interval([bool(thing.motion) for thing in found])[1] < 0.3
    assert interval([thing.motion_error for thing in found])[0] > 0.07
    assert interval([thing.place_overlap or 0 for thing in things(verdicts)])[1] < 0.1


def test_blur_and_noise_cost_little(judges):
    """As strong as a small autoencoder's: a pixel of blur at 64x64, five levels of noise."""
    verdicts = [judge_(worn(judge_.clip.frames, 1.0, 5.0, i)) for i, judge_ in enumerate(judges[:16])]
    assert rate(verdicts, "present")[0] > 0.85
    assert rate(verdicts, "motion")[0] > 0.9
    assert rate(verdicts, "right")[0] > 0.8


@pytest.mark.slow
def test_the_numbers_that_reports_quote():
    """Of 200 clips each: 0.986 of what was rendered, 0.936 after blur and noise, 0.007 of other scenes are right."""
    judges = [Judge(draw_scene(seed, "test")) for seed in range(200)]
    real = [judge_(judge_.clip.frames) for judge_ in judges]
    soft = [judge_(worn(judge_.clip.frames, 1.0, 5.0, i)) for i, judge_ in enumerate(judges)]
    other = [judge_(render(draw_scene(1000 + i, "test")).frames) for i, judge_ in enumerate(judges)]
    assert rate(real, "right")[0] > 0.965
    assert rate(real, "present")[0] > 0.99
    assert rate(soft, "right")[0] > 0.89
    assert rate(other, "right")[1] < 0.02
    assert rate(other, "present")[1] < 0.25


def test_more_damage_never_helps(judges):
    scores = []
    for blur, noise in ((0.5, 2), (1.5, 10), (3.0, 25), (6.0, 60)):
        verdicts = [judge_(worn(judge_.clip.frames, blur, noise, i)) for i, judge_ in enumerate(judges[:6])]
        scores.append(np.mean([verdict.right for verdict in verdicts]))
    assert scores[0] > 0.9 and scores[-1] < 0.1
    assert all(a >= b for a, b in pairwise(scores))


def altered(judge_: Judge, **changes) -> Verdict:
    """The verdict on the scene with its first thing changed."""
    scene = judge_.scene
    thing = replace(scene.things[0], **changes)
    return judge_(render(replace(scene, things=(thing, *scene.things[1:]))).frames)


@pytest.fixture(scope="module")
def singles() -> list[Judge]:
    drawn = (draw_scene(seed, "test", things=1) for seed in range(40))
    return [Judge(scene) for scene in drawn if scene.things[0].shape != "person"][:20]


def test_a_wrong_colour_costs_the_colour_alone(singles):
    names = list(COLOURS)
    verdicts = []
    for judge_ in singles:
        thing = judge_.scene.things[0]
        far = max(names, key=lambda name: np.abs(np.subtract(COLOURS[name], thing.rgb)).sum())
        verdicts.append(altered(judge_, rgb=COLOURS[far], colour=far))
    assert rate(verdicts, "colour")[1] < 0.1
    assert rate(verdicts, "present")[1] < 0.1
    found = [thing for thing in things(verdicts) if thing.found]
    assert len(found) > 0.75 * len(singles)  # the others are lost before a background of their colour
    assert np.mean([bool(thing.motion) for thing in found]) > 0.85
    assert np.mean([thing.colour_error for thing in found]) > 20


def test_a_wrong_shirt_is_a_wrong_colour():
    drawn = (draw_scene(seed, "test", things=1, person=True) for seed in range(8))
    judges_ = [Judge(scene) for scene in drawn]
    right = [judge_(judge_.clip.frames) for judge_ in judges_]
    wrong = []
    for judge_ in judges_:
        name = "cyan" if judge_.scene.things[0].colour in ("red", "pink", "orange", "brown", "black") else "red"
        wrong.append(altered(judge_, rgb=COLOURS[name], colour=name))
    assert rate(right, "colour")[0] > 0.8
    assert rate(wrong, "colour")[1] < 0.3


def test_one_strange_thing_stands_for_one_only():
    scene = draw_scene(3, "test", things=2)
    shown = replace(
        scene, things=(replace(scene.things[0], rgb=(0, 255, 0), pattern="plain", second=""),), crossing=False
    )
    verdict = judge(render(shown).frames, scene)
    assert sum(thing.found for thing in verdict.things) == 1


def test_a_wrong_shape_costs_the_shape_alone(singles):
    verdicts = []
    for i, judge_ in enumerate(singles):
        wrong = ("star", "ring", "cross", "arrow", "triangle")[i % 5]
        if judge_.scene.things[0].shape == wrong:
            wrong = "moon"
        verdicts.append(altered(judge_, shape=wrong))
    assert rate(verdicts, "shape")[1] < 0.15
    assert rate(verdicts, "colour")[0] > 0.9
    assert rate(verdicts, "present")[0] > 0.85


def test_a_wrong_motion_costs_the_motion_alone(singles):
    wrong = [
        Motion("slide", "left", 0.5),
        Motion("slide", "down", 0.5),
        Motion("orbit", "clockwise", 0.2),
        Motion("stay"),
    ]
    verdicts = []
    for i, judge_ in enumerate(singles):
        motion = wrong[i % 4]
        if motion.kind == judge_.scene.things[0].motion.kind:
            motion = wrong[(i + 1) % 4]
        verdicts.append(altered(judge_, motion=motion, x=0.0, y=0.0))
    assert rate(verdicts, "motion")[1] < 0.15
    assert rate(verdicts, "present")[0] > 0.85
    assert np.mean([bool(thing.shape) for thing in things(verdicts)]) > 0.85


def test_a_clip_played_backwards_moves_wrongly(judges):
    """But what bounces, waves, jumps and stays looks alike both ways."""
    for judge_ in judges[:12]:
        verdict = judge_(judge_.clip.frames[::-1])
        for thing, asked in zip(verdict.things, judge_.scene.things, strict=True):
            if asked.motion.kind in ("slide", "walk", "grow", "shrink"):
                assert not thing.motion
            assert thing.present


def test_a_thing_too_many_is_counted():
    counted = Counter()
    for seed in range(8):
        scene = draw_scene(seed, "test", things=2)
        alone = replace(scene, things=scene.things[:1], crossing=False)
        verdict = judge(render(scene).frames, alone)
        counted[verdict.surplus] += 1
        missing = judge(render(alone).frames, scene)
        assert missing.things[0].found and not missing.things[1].present and not missing.count_right
    assert counted[1] >= 7


def test_an_empty_video_has_nothing_and_measures_nothing():
    scene = draw_scene(4, "test")
    verdict = judge(np.full((17, 64, 64, 3), 128, np.uint8), scene)
    assert verdict.right == 0
    for thing in verdict.things:
        assert not thing.found and thing.share == 0
        assert thing.shape_overlap is None and thing.motion is None and thing.colour_error is None


def test_frames_of_another_size_are_refused():
    with pytest.raises(InputError, match="its scene"):
        judge(np.zeros((5, 64, 64, 3), np.uint8), draw_scene(0))


def test_larger_clips_are_judged_alike():
    scenes = [draw_scene(seed, "test", height=96, width=160, frames=17) for seed in range(6)]
    assert np.mean([judge(render(scene).frames, scene).right for scene in scenes]) > 0.9


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "person"])
def test_outlines_are_recognised_at_any_angle_and_size(shape):
    rng = np.random.default_rng(SHAPES.index(shape))
    masks = []
    for _ in range(6):
        radius, angle, (x0, y0) = rng.uniform(11, 20), rng.uniform(0, 2 * np.pi), rng.uniform(28, 36, 2)
        rows, cols = np.mgrid[:64, :64] + 0.5
        x, y = (cols - x0) / radius, (rows - y0) / radius
        turned = (np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)
        masks.append(distance(shape, *turned) < 0)
    overlaps = shape_overlaps(np.stack(masks))
    # Star and flower have five tips each: of eleven pixels of radius, now and then one frame is taken for the other.
    assert (overlaps.argmax(1) == SHAPES.index(shape)).mean() > 0.8
    assert overlaps.mean(0).argmax() == SHAPES.index(shape)
    assert overlaps.max(1).min() > 0.85


def trail_of(motion: Motion, noise: float = 0.01, turn: float = 0.0) -> Trail:
    u = np.linspace(0, 1, 17)
    path = motion.path(u)
    place = path[:, :2] + np.random.default_rng(0).normal(0, noise, (17, 2))
    return Trail(u, place, path[:, 3] / path[:, 3].mean(), path[:, 2] / (2 * np.pi) + turn * u, 0.0)


@pytest.mark.parametrize(
    "motion",
    [
        *(Motion("slide", way, 0.5) for way in ("left", "right", "up", "down")),
        *(Motion("bounce", way, 0.35, 2) for way in ("", "left", "right")),
        *(Motion("orbit", way, 0.2, 1, 1.3) for way in ("clockwise", "counterclockwise")),
        *(Motion("spin", way, cycles=0.7) for way in ("clockwise", "counterclockwise")),
        Motion("grow"),
        Motion("shrink"),
        Motion("stay"),
    ],
    ids=lambda m: f"{m.kind} {m.direction}",
)
def test_every_path_is_told_from_all_others(motion):
    trail = trail_of(motion)
    fits = [fit(trail, kind, way, False) for kind, way in hypotheses(False)]
    best, second = sorted(fits, key=lambda f: f.misfit)[:2]
    assert best.motion == (motion.kind, motion.direction)
    assert second.misfit > best.misfit + 1
    assert best.error < 0.02


@pytest.mark.parametrize("way", [1, -1])
def test_rotation_is_measured_in_turns(way):
    direction = "clockwise" if way > 0 else "counterclockwise"
    spinning = Thing("fish", "red", (220, 40, 40), "striped", "white", "large", 0.25, 0, 0, 0, 0.5,
                     Motion("spin", direction, cycles=0.75))  # fmt: skip
    clip = render(Scene(Background("plain", "white"), (spinning,)))
    measured = turns(clip.frames, clip.masks == 1)
    np.testing.assert_allclose(measured, way * 0.75 * np.linspace(0, 1, 17), atol=0.03)


def test_densities_are_smoothed_shares():
    table = density(np.full((10, 3), (100, 150, 200), np.uint8))
    assert table.sum() == pytest.approx(1)
    here, beside, away = (
        table[colour_bins(np.array(c, np.uint8))] for c in ((100, 150, 200), (100, 150, 208), (0, 0, 0))
    )
    assert here > beside > 0 and away == 0
    assert here / beside == pytest.approx(np.exp(0.5), rel=0.01)  # a Gaussian of one bin
    cube = table.reshape(BINS, BINS, BINS)
    assert np.unravel_index(cube.argmax(), cube.shape) == (12, 18, 25)
