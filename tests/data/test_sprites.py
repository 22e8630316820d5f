"""The procedural world: what it says about its clips is measured in their pixels."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from vdot.data.sprites import (
    CONTROLS,
    PHRASINGS,
    SHAPES,
    TASKS,
    Background,
    Motion,
    Scene,
    Thing,
    build_task,
    caption,
    corpus,
    count_references,
    draw_scene,
    draw_task,
    render,
    scenes,
    split_of,
)
from vdot.data.sprites.captions import PATTERN_NOUNS, background_noun
from vdot.data.sprites.scene import ALL_MOTIONS, COLOURS, PERSON_MOTIONS, SIZE_NAMES, VIEWS
from vdot.data.sprites.shapes import OUTLINES, area, distance
from vdot.errors import InputError
from vdot.request import Defaults, Request, prepare

PLAIN = Background("plain", "white")


def thing(shape="ball", motion=None, radius=0.2, depth=0.5, x=0.0, y=0.0, pattern="plain", angle=0.0) -> Thing:
    second = "" if pattern == "plain" else "white"
    motion = motion or Motion("stay")
    return Thing(shape, "red", (220, 40, 40), pattern, second, "medium", radius, x, y, angle, depth, motion)


def scene_of(*things: Thing, size: int = 64, frames: int = 5, **options) -> Scene:
    return Scene(PLAIN, things, frames=frames, height=size, width=size, **options)


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_scene_and_a_scene_is_a_clip():
    np.random.seed(1)
    first = [draw_scene(seed) for seed in range(20)]
    np.random.seed(2)
    assert first == [draw_scene(seed) for seed in range(20)] == list(scenes(0, 20))
    assert len({json.dumps(scene.to_dict()) for scene in first}) == 20
    np.testing.assert_array_equal(render(first[3]).frames, render(first[3]).frames)
    one, two = draw_task(5, "swap_anything"), draw_task(5, "swap_anything")
    assert one.prompt == two.prompt and np.array_equal(one.src_video, two.src_video)


def test_a_scene_survives_json():
    for scene in scenes(0, 30):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_train_and_test_hold_no_combination_in_common():
    train = {key for scene in scenes(0, 550, "train") for key in scene.keys}
    test = {key for scene in scenes(0, 550, "test") for key in scene.keys}
    assert not train & test
    assert all(split_of(*key) == "train" for key in train) and all(split_of(*key) == "test" for key in test)
    assert len({caption(scene) for scene in scenes(0, 550, "test")}) > 500


def test_every_shape_can_move_in_every_way_in_both_splits():
    for shape in SHAPES:
        for kind in ALL_MOTIONS:
            if (kind in PERSON_MOTIONS) == (shape == "person"):
                held_out = [c for c in COLOURS if split_of(c, shape, kind) == "test"]
                assert len(held_out) == 2


@pytest.mark.parametrize("task", ["swap_anything", "try_on", "character_replacement"])
def test_what_a_task_changes_stays_in_its_split(task):
    for split in ("train", "test"):
        for seed in range(6):
            made = draw_task(seed, task, split)
            assert {split_of(*key) for key in made.scene.keys} == {split}


@pytest.mark.parametrize("view", VIEWS)
def test_everything_in_the_vocabulary_is_drawn(view):
    drawn = list(scenes(0, 700, view=view))
    things = [t for scene in drawn for t in scene.things]
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.colour for t in things} == set(COLOURS)
    assert {t.motion.kind for t in things} == set(ALL_MOTIONS)
    assert {scene.camera for scene in drawn} == {"", "left", "right", "up", "down"}
    assert {len(scene.things) for scene in drawn} == {1, 2, 3}
    assert {t.size for t in things} == set(SIZE_NAMES)


def test_near_things_are_larger_before_the_same_backgrounds():
    """Larger by a third size for size; less on the mean, since where there are several they are small ones."""
    far, near = (list(scenes(0, 300, view=view)) for view in ("far", "near"))
    assert all(a.background == b.background for a, b in zip(far, near, strict=True))
    reach = [
        np.mean([t.radius for scene in drawn for t in scene.things if t.shape != "person"]) for drawn in (far, near)
    ]
    assert 1.2 < reach[1] / reach[0] < 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 16}, "4k"),
        ({"height": 60}, "multiples of 16"),
        ({"things": 4}, "one to 3"),
        ({"split": "val"}, "train"),
        ({"view": "above"}, "far, near"),
    ],
)
def test_impossible_scenes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        draw_scene(0, **options)


# --- pixels and annotations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "person"])
def test_mask_areas_are_those_of_the_shapes(shape):
    clip = render(scene_of(thing(shape, radius=0.35), size=256, frames=1))
    assert (clip.masks == 1).sum() == pytest.approx(area(shape) * (0.35 * 256) ** 2, rel=0.02)


def test_a_ball_of_twelve_pixels_has_the_area_of_a_disc():
    clip = render(scene_of(thing(motion=Motion("slide", "right", 0.5), radius=0.19), frames=17))
    areas = (clip.masks == 1).sum((1, 2))
    assert areas.mean() == pytest.approx(np.pi * (0.19 * 64) ** 2, rel=0.02)


def test_distance_fields_agree_with_opencv():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.2, 1.2, (40, 2))
    for shape, outline in OUTLINES.items():
        contour = (outline * 1e4).astype(np.float32)[:, None]
        expected = [-cv2.pointPolygonTest(contour, tuple(p * 1e4), True) / 1e4 for p in points]
        np.testing.assert_allclose(distance(shape, *points.T), expected, atol=1e-3)


def warp_back(frames: np.ndarray, flow: np.ndarray, t: int) -> np.ndarray:
    """Frame t + 1 looked up where the flow of frame t says it went."""
    rows, cols = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)
    return cv2.remap(frames[t + 1], cols + flow[t, ..., 0], rows + flow[t, ..., 1], cv2.INTER_LINEAR)


@pytest.mark.parametrize(
    "moving",
    [
        thing("square", Motion("slide", "right", 0.4), pattern="checked"),
        thing("star", Motion("bounce", "left", 0.3, 2), pattern="spotted"),
        thing("heart", Motion("orbit", "clockwise", 0.2, 1.0), pattern="striped"),
        thing("flower", Motion("grow"), pattern="spotted"),
        thing("ball", Motion("spin", "counterclockwise", cycles=0.5), pattern="striped"),
        thing("person", Motion("walk", "left", 0.5, 2), radius=0.35),
        thing("person", Motion("jump", "", 0.2, 2), radius=0.35),
    ],
    ids=lambda t: f"{t.shape} {t.motion.kind}",
)
@pytest.mark.parametrize("camera", ["", "up"])
def test_flow_leads_to_the_same_point_in_the_next_frame(moving, camera):
    clip = render(scene_of(moving, size=128, frames=33, camera=camera))
    errors, rest = [], []
    for t in range(0, 32, 3):
        # Away from outlines: pixels there are mixed of two things that go different ways.
        inside = cv2.erode((clip.masks[t] == 1).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        landed = cv2.erode((clip.masks[t + 1] == 1).astype(np.uint8), np.ones((3, 3), np.uint8))
        inside &= warp_back(np.stack([landed] * (t + 2)), clip.flow, t) == 1
        difference = np.abs(warp_back(clip.frames, clip.flow, t).astype(int) - clip.frames[t])
        errors.append(difference[inside])
        rest.append(np.abs(clip.frames[t + 1].astype(int) - clip.frames[t])[inside])
    error, unmoved = np.concatenate(errors).mean(), np.concatenate(rest).mean()
    assert error < 5  # of 255: interpolation at pattern edges, and light that does not turn with a spinning thing
    assert error < 0.75 * unmoved or moving.motion.kind == "jump"  # plain cloth looks alike wherever it is


def test_masks_move_as_the_flow_says():
    clip = render(scene_of(thing(motion=Motion("slide", "right", 0.5)), frames=17))
    for t in range(16):
        centre, following = (np.argwhere(clip.masks[k] == 1).mean(0)[::-1] for k in (t, t + 1))
        flow = clip.flow[t][clip.masks[t] == 1]
        np.testing.assert_allclose(flow, np.broadcast_to([0.5 * 64 / 16, 0], flow.shape), atol=1e-4)
        np.testing.assert_allclose(following - centre, flow.mean(0), atol=0.3)


def test_a_pan_moves_the_background_the_other_way():
    scene = replace(scene_of(thing("star"), frames=17, camera="right"), background=Background("hills", seed=3))
    clip = render(scene)
    still = clip.masks[4] == 0
    np.testing.assert_allclose(clip.flow[4][still], np.broadcast_to([-1, 0], (still.sum(), 2)), atol=1e-5)
    unseen = clip.masks[4:6].max(0) == 0
    moved, before = clip.frames[5][:, :-1].astype(int), clip.frames[4][:, 1:].astype(int)
    both = unseen[:, 1:] & (clip.masks[5][:, :-1] == 0)
    assert np.abs(moved - before)[both].max() <= 1


def test_the_nearer_thing_hides_the_other():
    near, far = thing("square", radius=0.2, depth=0.8), thing("ball", radius=0.3, depth=0.5)
    for order in ((near, far), (far, near)):
        clip = render(scene_of(*order))
        number = order.index(near)
        both = (clip.coverage >= 128).all(0)
        assert both.any() and (clip.masks[both] == number + 1).all()
        assert clip.depth[both].min() >= 0.8 * 255 - 1
        seen_behind = clip.masks == 2 - number
        assert (clip.depth[seen_behind] < 0.6 * 255).all() and (clip.depth[clip.masks == 0] < 0.2 * 255).all()


def test_things_that_cross_do_so_in_the_order_of_the_caption():
    crossing = [scene for scene in scenes(0, 200) if scene.crossing]
    assert crossing
    for scene in crossing:
        front, back = scene.things[:2]
        assert front.depth > back.depth
        assert {front.motion.direction, back.motion.direction} == {"left", "right"}
        assert scene.camera not in ("left", "right")  # a pan along with one would hide its motion
    clip = render(crossing[0])
    covered = clip.coverage >= 128
    assert (covered[0] & covered[1]).any()


def test_boxes_are_tight():
    for seed in range(6):
        clip = render(draw_scene(seed, things=2))
        for i in range(2):
            for t in (0, 8, 16):
                rows, cols = np.nonzero(clip.coverage[i, t] >= 128)
                box = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
                assert clip.boxes[t, i].tolist() == box


@pytest.mark.parametrize("view", VIEWS)
def test_things_stay_in_the_frame(view):
    shares = []
    for scene in scenes(0, 30, view=view):
        clip = render(scene)
        whole = (clip.coverage >= 128).sum((2, 3))
        shares.append((whole.min(1) > 0).all())
    assert all(shares)


@pytest.mark.parametrize("view", VIEWS)
def test_motions_are_seen_as_they_are_named(view):
    """Measured on the masks alone, as an evaluator of generated clips would."""
    least = VIEWS[view].paths
    for scene in scenes(0, 60, view=view):
        if scene.camera:
            continue
        covered = render(scene).coverage >= 128
        for mask, moving in zip(covered, scene.things, strict=True):
            motion, areas = moving.motion, mask.sum((1, 2))
            centres = np.array([np.argwhere(frame).mean(0)[::-1] for frame in mask]) / 64
            shift, spread = centres[-1] - centres[0], np.ptp(centres, 0)
            if motion.kind in ("slide", "walk"):
                way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion.direction]
                assert shift @ way > 0.3 * least and abs(shift @ way[::-1]) < 0.1
            elif motion.kind in ("bounce", "jump"):
                assert spread[1] > 0.12 * least and (spread[0] > 0.25) == (motion.direction != "")
            elif motion.kind == "orbit":
                around = centres - (moving.x + 0.5, moving.y + 0.5)
                turned = np.cross(np.c_[around[:-1], np.zeros(16)], np.c_[around[1:], np.zeros(16)])[:, 2].sum()
                assert (turned > 0) == (motion.direction == "clockwise") and spread.min() > 0.2 * least
            elif motion.kind in ("grow", "shrink"):
                ratio = areas[-1] / areas[0]
                assert ratio > 2.5 if motion.kind == "grow" else ratio < 0.4
            else:
                # In place, but a shape may spin around a point that is not its centre of mass.
                assert np.abs(shift).max() < 0.12 and 0.8 < areas[-1] / areas[0] < 1.25


def test_a_scene_is_the_same_at_any_size():
    small, large = render(draw_scene(7)), render(draw_scene(7, height=128, width=128, frames=33))
    np.testing.assert_allclose(large.boxes[::2], 2 * small.boxes, atol=2.1)


def test_annotations_have_the_shape_of_the_frames():
    clip = render(draw_scene(2, frames=9, height=48, width=80, person=True))
    for picture in (clip.depth, clip.flow_picture, clip.gray, clip.scribble, clip.pose, clip.layout):
        assert picture.shape == clip.frames.shape == (9, 48, 80, 3) and picture.dtype == np.uint8
    assert clip.flow.shape == (9, 48, 80, 2) and clip.masks.shape == (9, 48, 80)
    assert clip.pose.any() and clip.scribble.any() and (clip.layout != 255).any()
    assert set(np.unique(clip.scribble)) == {0, 255}
    assert (clip.cutout(0)[0] > 240).all()  # a white margin


def test_pose_lies_on_the_person():
    clip = render(scene_of(thing("person", Motion("walk", "right", 0.5, 2), radius=0.35), size=128, frames=9))
    drawn = clip.pose.any(-1)
    assert (clip.masks[drawn] == 1).mean() > 0.97


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_say_what_is_there_and_nothing_else():
    shapes = set(SHAPES) - {"person"}
    for scene in scenes(0, 80):
        for variant in range(8):
            text = caption(scene, variant)
            assert text.isascii() and background_noun(scene.background) in text.lower()
            words = set(text.lower().replace(",", " ").replace(".", " ").split())
            assert words & shapes <= {t.shape for t in scene.things}
            for t in scene.things:
                wanted = f"{t.colour} shirt" if t.shape == "person" else f"{t.colour} {t.shape}"
                assert wanted in text.lower()
                if t.second:
                    assert f"with {t.second} {PATTERN_NOUNS[t.pattern]}" in text
                if t.motion.direction:
                    assert t.motion.direction in text
            sizes = {t.size for t in scene.things} - {"medium"}
            assert words & {"small", "large"} == sizes
            assert ("camera" in text) == bool(scene.camera)
            assert ("that" in words) == scene.crossing


def test_one_caption_in_five_is_chinese():
    assert len(PHRASINGS) == 10
    texts = list(corpus(200))
    chinese = [text for text in texts if not text.isascii()]
    assert len(chinese) == 40 and not any(c.isascii() and c.isalpha() for text in chinese for c in text)
    rng = np.random.default_rng(0)
    assert len({caption(draw_scene(0), rng) for _ in range(100)}) == len({caption(draw_scene(0), v) for v in range(10)})


# --- tasks -----------------------------------------------------------------------------------------------------------

CONTROLLED = (*CONTROLS, *(t for t in TASKS if t.startswith("reference_")), "animate_anything")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_request(task):
    for seed, split in ((0, "train"), (1, "test"), (2, "train")):
        made = draw_task(seed, task, split)
        prepared = prepare(Request(**made.request()), Defaults())
        c = prepared.condition
        assert (c.frames, c.height, c.width) == made.video.shape[:3] == (17, 64, 64)
        assert len(c.references) == len(made.references) == count_references(seed, task, split)
        assert (made.src_video is None) == (task in ("t2v", "r2v", "r2v_several"))
        assert (made.src_mask is None) == (made.src_video is None or task in CONTROLLED)
        if made.src_mask is None:
            continue
        assert set(np.unique(made.src_mask)) == {0, 255}
        kept = made.src_mask == 0
        np.testing.assert_array_equal(made.src_video[kept], made.video[kept])
        if not made.control:
            assert (made.src_video[~kept] == 127).all()


def test_masks_cover_what_they_are_about():
    for task in ("inpainting", "swap_anything", "character_replacement"):
        for seed in range(4):
            made = draw_task(seed, task)
            clip = render(made.scene)
            np.testing.assert_array_equal(clip.frames, made.video)
            assert (made.src_mask[clip.coverage[made.things[0]] >= 128] == 255).all()


def test_trying_on_changes_the_cloth_alone():
    for seed in range(8):
        made = draw_task(seed, "try_on", person=True)
        clip = render(made.scene)
        person = made.things[0]
        changed = made.src_mask == 255
        assert changed.any() and not (changed & (clip.masks == person + 1)).all()
        cloth = clip.garment(person) & (clip.masks == person + 1)
        assert changed[cloth].all() and cloth.sum() > 0.3 * changed.sum()


def test_references_show_the_thing_on_white():
    made = draw_task(3, "r2v_several")
    assert len(made.references) == len(made.scene.things)
    for picture, i in zip(made.references, made.things, strict=True):
        assert picture.shape == (64, 64, 3) and (picture[:2] == 255).all() and (picture[:, :2] == 255).all()
        body = picture[(picture < 235).any(-1)]
        assert len(body) > 300
        if made.scene.things[i].shape != "person":
            colour = np.array(made.scene.things[i].rgb)
            assert np.abs(body - colour).sum(-1).min() < 40


def test_extension_keeps_the_ends():
    kept = {
        task: (draw_task(0, task).src_mask == 0).all((1, 2)).nonzero()[0].tolist()
        for task in ("firstframe", "lastframe", "firstlastframe", "firstclip", "lastclip")
    }
    assert kept["firstframe"] == [0] and kept["lastframe"] == [16] and kept["firstlastframe"] == [0, 16]
    assert kept["firstclip"] == [0, 1, 2, 3, 4] and kept["lastclip"] == [12, 13, 14, 15, 16]


def test_tasks_that_a_scene_cannot_be_are_refused():
    rng = np.random.default_rng(0)
    ball = scene_of(thing())
    for task in ("pose", "r2v_several", "nothing"):
        with pytest.raises(InputError):
            build_task(ball, task, rng)
    with pytest.raises(InputError, match="unknown task"):
        draw_task(0, "nothing")
