"""Every task without a model: what it takes, what it gives, and that white generates, black keeps, grey is unknown."""

import numpy as np
import pytest

from vdot.annotate import TASKS, UNKNOWN, Material, annotate
from vdot.annotate import tasks as module
from vdot.annotate.backends import BACKENDS
from vdot.annotate.skeleton import Person
from vdot.data.sprites import draw_scene, render
from vdot.data.sprites.layers import portrait
from vdot.errors import InputError, MissingDependencyError


@pytest.fixture(scope="module")
def clip():
    return render(draw_scene(102))


@pytest.fixture(scope="module")
def toy():
    return portrait(draw_scene(3).things[0], 96)


@pytest.fixture
def walker(monkeypatch):
    """A pose backend that sees one person, in the middle, in every frame."""

    def people(frames: np.ndarray) -> list[list[Person]]:
        x = np.linspace(0.3, 0.7, 18) * frames.shape[2]
        y = np.linspace(0.2, 0.8, 18) * frames.shape[1]
        return [[Person(np.stack([x, y, np.ones(18)], -1).astype(np.float32))] for _ in frames]

    backend = next(b for b in BACKENDS if b.kind == "pose" and b.name == "vitpose")
    monkeypatch.setattr(type(backend), "load", _load_instead(type(backend).load, backend, people))
    from vdot.annotate.backends import _loaded

    _loaded.cache_clear()
    yield "vitpose:anywhere"
    _loaded.cache_clear()


def _load_instead(load, backend, answer):
    return lambda self, place: answer if self == backend else load(self, place)


def check(made, frames=None, size=None):
    """What holds for every input with a mask."""
    assert made.src_video.dtype == np.uint8 and made.src_video.shape[-1] == 3
    if frames is not None:
        assert len(made.src_video) == frames and made.src_video.shape[1:3] == size
    if made.src_mask is not None:
        assert made.src_mask.shape == made.src_video.shape[:3] and set(np.unique(made.src_mask)) <= {0, 255}
        assert made.src_mask.any() and not made.src_mask.all()


@pytest.mark.parametrize("task", ["gray", "scribble", "flow", "plain"])
def test_controls_and_plain(clip, task):
    made = annotate(task, Material(video=clip.frames, fps=8))
    check(made, 17, (64, 64))
    assert made.src_mask is None and made.fps == 8 and made.references == ()
    still = annotate(f"image_{task}" if task in ("gray", "scribble") else task, Material(images=[clip.frames[0]]))
    assert still.src_video.shape == (1, 64, 64, 3)


def test_inpainting_modes(clip, toy):
    true = clip.masks == 1
    box = tuple(clip.boxes[0, 0])
    video = clip.frames
    static = annotate("inpainting", Material(video=video, mask=true[0], mode="mask"))
    check(static, 17, (64, 64))
    assert (static.src_mask == np.where(true[0], 255, 0)).all()
    moving = annotate("inpainting", Material(video=video, mask=true))  # a mask for each frame needs no tracking
    assert (moving.src_mask == np.where(true, 255, 0)).all() and "track" not in moving.backends
    assert (moving.src_video[true] == UNKNOWN).all() and (moving.src_video[~true] == video[~true]).all()
    tracked = annotate("inpainting", Material(video=video, mask=true[0], maskaug_mode="bbox_expand", maskaug_ratio=0.2))
    check(tracked, 17, (64, 64))
    assert tracked.backends == {"track": "template"} and not (true & (tracked.src_mask == 0)).sum() > 0.02 * true.sum()
    boxed = annotate("inpainting", Material(video=video, bbox=[box], mode="bbox"))
    assert (boxed.src_mask[5] == 255).sum() == (box[2] - box[0]) * (box[3] - box[1])
    filled = annotate("inpainting_bboxtrack", Material(video=video, bbox=[box]))
    assert ((filled.src_mask[0] > 0) & true[0]).sum() / ((filled.src_mask[0] > 0) | true[0]).sum() > 0.7
    other = clip.masks == 2
    several = [tuple(clip.boxes[0, 0]), tuple(clip.boxes[0, 1])] if len(clip.scene.things) > 1 else [box]
    both = annotate("inpainting", Material(video=video, bbox=several))
    seen = (both.src_mask[-1] > 0) & (true | other)[-1]
    assert seen.sum() > 0.7 * (true | other)[-1].sum()  # each box is tracked by itself
    for mode in ("salient", "salientmasktrack", "salientbboxtrack"):
        white = np.full((3, 96, 96, 3), 255, np.uint8)
        for t in range(3):
            white[t, :, 3 * t :] = toy[:, : 96 - 3 * t]
        made = annotate("inpainting", Material(video=white, mode=mode))
        check(made, 3, (96, 96))
        seen = (toy < 250).any(-1)
        assert ((made.src_mask[0] > 0) & seen).sum() / ((made.src_mask[0] > 0) | seen).sum() > 0.8
        moved = np.argwhere(made.src_mask[2])[:, 1].mean() - np.argwhere(made.src_mask[0])[:, 1].mean()
        assert moved == pytest.approx(0 if mode == "salient" else 6, abs=1.5)


def test_extension_tasks(clip):
    video, image = clip.frames, clip.frames[3]
    made = annotate("frameref", Material(images=[image]))
    assert len(made.src_video) == 81 and (made.src_video[0] == image).all() and (made.src_video[1:] == UNKNOWN).all()
    assert not made.src_mask[0].any() and (made.src_mask[1:] == 255).all()
    made = annotate("firstlastframe", Material(images=[image, video[9]]))
    assert len(made.src_video) == 81 and (made.src_video[-1] == video[9]).all() and not made.src_mask[[0, -1]].any()
    made = annotate("lastframe", Material(images=[image], expand_num=7))
    assert made.src_mask.all((1, 2)).tolist() == [True] * 7 + [False]
    made = annotate("firstlastframe", Material(video=video))  # of a clip: its own ends, its own length
    assert len(made.src_video) == 17 and made.src_mask.any((1, 2)).tolist() == [False] + [True] * 15 + [False]
    made = annotate("clipref", Material(video=video[:5], mode="lastclip", expand_num=8))
    assert made.src_mask.any((1, 2)).tolist() == [True] * 8 + [False] * 5 and (made.src_video[8:] == video[:5]).all()
    made = annotate("firstlastclip", Material(video=video[:5], end_video=video[12:], expand_num=7))
    assert len(made.src_video) == 17 and (made.src_video[12:] == video[12:]).all()
    with pytest.raises(InputError, match="firstlastclip takes two clips"):
        annotate("clipref", Material(video=video, mode="firstlastclip"))


def test_painting_outwards_and_layouts(clip):
    made = annotate("outpainting", Material(video=clip.frames, direction="left,right", expand_ratio=0.25))
    check(made, 17, (64, 96))
    assert (made.src_video[:, :, 16:80] == clip.frames).all()
    made = annotate("outpainting_inner", Material(video=clip.frames, direction=["up"], expand_ratio=0.25))
    check(made, 17, (64, 64))
    assert (made.src_mask[:, :16] == 255).all() and not made.src_mask[:, 16:].any()
    made = annotate("layout_bbox", Material(bbox=[(10, 10, 50, 50), (100, 100, 200, 200)], label="cat"))
    assert made.src_video.shape == (81, 720, 1280, 3) and "no colour of its own" in made.notes[0]
    made = annotate("layout_bbox", Material(video=clip.frames, bbox=[(1, 1, 9, 9)]))
    check(made, 17, (64, 64))
    made = annotate("layout_track", Material(video=clip.frames, mask=clip.masks[0] == 1, maskaug_mode="bbox"))
    check(made, 17, (64, 64))
    assert set(np.unique(made.src_video)) == {0, 255}
    image = clip.frames[0]
    made = annotate("move_anything", Material(images=[image], bbox=[(2, 2, 20, 20), (30, 30, 60, 60)], expand_num=4))
    check(made, 5, (64, 64))
    assert (made.src_video[0] == image).all() and not made.src_mask[0].any() and (made.src_mask[1:] == 255).all()


def test_references_are_cut_out_on_white(toy):
    wide = np.full((120, 200, 3), (90, 140, 90), np.uint8)
    seen = (toy < 250).any(-1)
    wide[10:106, 60:156][seen] = toy[seen]
    made = annotate("subject", Material(images=[wide]))
    (reference,) = made.references
    rows, cols = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
    size = max(rows[-1] - rows[0], cols[-1] - cols[0])
    assert (
        abs(max(reference.shape[:2]) - 1.08 * size) < 8
        and (reference[0] == 255).all()
        and (reference[:, -1] == 255).all()
    )
    assert made.src_video is None and made.src_mask is None
    mask = np.zeros((120, 200), bool)
    mask[10:106, 60:156] = seen
    (exact,) = annotate("object", Material(images=[wide], mask=mask)).references
    assert (exact == 255).all(-1).sum() == exact.shape[0] * exact.shape[1] - (seen & (toy < 255).any(-1)).sum()
    (plain,) = annotate("reference_anything", Material(images=[wide], mode="plain")).references
    assert (plain == wide).all()
    assert len(annotate("reference_anything", Material(images=[wide, toy])).references) == 2


def test_compositions(clip, toy, walker):
    video, true = clip.frames, clip.masks == 1
    made = annotate("swap_anything", Material(video=video, mask=true[0], images=[toy]))
    check(made, 17, (64, 64))
    assert len(made.references) == 1 and (made.references[0][0] == 255).all()
    made = annotate("swap_anything", Material(video=video, mask=true[0], images=[toy], mode="mask,plain"))
    assert (made.src_mask == np.where(true[0], 255, 0)).all() and (made.references[0] == toy).all()
    made = annotate("expand_anything", Material(images=[toy, toy], direction="left", expand_ratio=0.5, expand_num=4))
    check(made, 5, (96, 144))
    assert made.src_mask.all((1, 2)).tolist() == [False] + [True] * 4 and len(made.references) == 1
    assert (made.src_video[0, :, 48:] == toy).all() and (made.src_mask[0, :, :48] == 255).all()
    made = annotate("animate_anything", Material(video=video, images=[toy]), walker)
    assert made.src_mask is None and (made.src_video > 0).any() and made.backends["pose"].startswith("vitpose")
    made = annotate("firstframe_gray", Material(video=video))
    check(made, 17, (64, 64))
    assert (made.src_video[0] == video[0]).all() and (made.src_video[1:, ..., 0] == made.src_video[1:, ..., 1]).all()
    made = annotate("firstframe_control", Material(video=video, images=[toy], control="scribble"))
    assert made.task == "firstframe_scribble" and made.src_video.shape == (17, 64, 64, 3)
    made = annotate("reference_control", Material(video=video, images=[toy], control="flow"))
    assert made.src_mask is None and made.task == "reference_flow" and len(made.references) == 1


@pytest.mark.parametrize("task", ["character_replacement", "try_on"])
def test_replacement_shows_only_the_pose_inside_the_mask(clip, toy, walker, task, monkeypatch, tmp_path):
    video, true = clip.frames, clip.masks == 1
    made = annotate(task, Material(video=video, mask=true[0], images=[toy]), walker)
    check(made, 17, (64, 64))
    white = made.src_mask > 0
    pose = annotate("pose", Material(video=video), walker).src_video
    assert (made.src_video[white] == pose[white]).all() and (made.src_video[~white] == video[~white]).all()
    assert white.sum() > true.sum()  # room around the old shape
    assert (made.references[0][0] == 255).all()
    grey = annotate(task, Material(video=video, mask=true[0], images=[toy], control="none"))
    assert (grey.src_video[grey.src_mask > 0] == UNKNOWN).all() and (grey.src_mask == made.src_mask).all()
    monkeypatch.setenv("VDOT_ANNOTATORS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pose cannot be had without a trained model"):
        annotate(task, Material(video=video, mask=true[0], images=[toy]))


@pytest.mark.parametrize(
    ("task", "material", "message"),
    [
        ("inpaint", {}, "unknown task 'inpaint'"),
        ("layout_bbox", {}, "the task layout_bbox needs --bbox"),
        ("gray", {}, "give one --video"),
        ("gray", {"video": "v", "label": "cat"}, "the task gray has no use for --label: it takes --video, --image"),
        ("clipref", {"video": "v", "images": "i"}, "the task clipref has no use for --image"),
        ("frameref", {"images": "ii"}, "1 --image wanted, got 2"),
        ("frameref", {"images": "i", "mode": "middle"}, "unknown mode 'middle': use firstframe"),
        ("firstframe", {"images": "i", "mode": "lastframe"}, "the task firstframe is frameref with --mode firstframe"),
        ("inpainting", {"video": "v", "mode": "masktrack"}, "mode masktrack needs --mask"),
        ("inpainting", {"video": "v", "mode": "mask", "mask": np.ones((5, 5))}, "the mask is"),
        ("inpainting", {"video": "v", "bbox": [(70, 70, 90, 90)]}, "lies outside the picture"),
        ("inpainting", {"video": "v", "mode": "tracking"}, "unknown mode 'tracking'"),
        ("outpainting", {"video": "v", "expand_ratio": 0}, "expand_ratio must be a number above 0"),
        ("outpainting", {"video": "v", "direction": "north"}, "unknown direction 'north'"),
        ("move_anything", {"images": "i", "bbox": [(1, 1, 5, 5)]}, "needs two boxes"),
        ("firstframe_control", {"video": "v"}, "needs --control"),
        ("reference_control", {"video": "v", "images": "i", "control": "deep"}, "unknown control 'deep'"),
        ("pose", {"video": "v", "mode": "body,feet"}, "unknown mode 'feet' of pose"),
        ("subject", {"images": "i", "mode": "tail"}, "unknown mode 'tail' of a reference"),
        (
            "swap_anything",
            {"video": "v", "images": "i", "bbox": [(1, 1, 9, 9)], "mode": "bbox,mask"},
            "unknown mode 'mask' of the references beside a clip",
        ),
    ],
)
def test_bad_input_is_one_sentence(clip, task, material, message):
    pictures = {"v": clip.frames, "i": [clip.frames[0]], "ii": list(clip.frames[:2])}
    values = {k: pictures[v] if isinstance(v, str) and v in pictures else v for k, v in material.items()}
    with pytest.raises(InputError, match=message) as caught:
        annotate(task, Material(**values))
    assert "\n" not in str(caught.value)


def test_without_a_model_only_some_words_are_known(clip, monkeypatch, tmp_path):
    monkeypatch.setenv("VDOT_ANNOTATORS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"opencv finds only person, people.* not 'zebra': use --backend grounding_dino"
    ):
        annotate("inpainting", Material(video=clip.frames, label="zebra"))
    with pytest.raises(InputError, match="nothing like 'person' was found in the first frame"):
        annotate("inpainting", Material(video=np.zeros((2, 200, 200, 3), np.uint8), label="person"))


def test_the_table_is_whole():
    """VACE's names, and each task says what it takes, needs and who could do it."""
    names = """depth depthv2 flow gray pose pose_body scribble layout_bbox layout_track frameref clipref inpainting
        outpainting outpainting_inner face object subject reference_anything animate_anything swap_anything
        expand_anything move_anything character_replacement try_on firstframe_control reference_control""".split()
    assert set(names) <= set(TASKS)
    fields = set(Material.__dataclass_fields__)
    for name, task in TASKS.items():
        assert task.about and set(task.needs) <= set(task.takes) <= fields, name
        assert set(task.kinds) <= {backend.kind for backend in BACKENDS}, name
    for alias, (name, mode) in module.ALIASES.items():
        assert module.resolve(alias)[0] == name and (mode is None or module.resolve(alias)[2] == mode)
