"""Adapters of the Hub's models, with the real classes at random weights, from folders as they are downloaded.

The weights mean nothing, so what is tested is the way in and out: sizes, places and order; networks are replaced by
known answers where that shows it.
"""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.annotate import tiny_models
from vdot.annotate import control, track
from vdot.annotate.backends import BACKENDS, Tools, parse_backends
from vdot.data.sprites import draw_scene, render
from vdot.errors import CheckpointError, InputError, MissingDependencyError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``place(name)``: "name:folder" of a tiny model, made once."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str) -> str:
        if not (folder / name).is_dir():
            getattr(tiny_models, name)(folder / name)
        return f"{name}:{folder / name}"

    return make


@pytest.fixture(scope="module")
def clip():
    return render(draw_scene(5))


@pytest.mark.parametrize("name", ["depth_anything", "midas"])
def test_depth(place, clip, name, monkeypatch):
    spec = place(name)
    drawn = control("depth", clip.frames[:2], spec)
    assert drawn.shape == (2, 64, 64, 3) and drawn.dtype == np.uint8
    # A network that says "bright is near" must come out as the picture's own brightness, upright and in place.
    import transformers

    kind = {"depth_anything": transformers.DepthAnythingForDepthEstimation, "midas": transformers.DPTForDepthEstimation}

    def forward(self, pixel_values, **_):
        return SimpleNamespace(predicted_depth=pixel_values.mean(1))

    monkeypatch.setattr(kind[name], "forward", forward)
    frames = np.full((1, 48, 96, 3), 30, np.uint8)
    frames[0, 6:18, 60:84] = 240
    seen = control("depth", frames, spec)[0, ..., 0] > 127
    assert (seen & (frames[0, ..., 0] > 127)).sum() / (seen | (frames[0, ..., 0] > 127)).sum() > 0.8


@pytest.mark.parametrize("name", ["sam2", "sam3"])
def test_sam_tracks_and_fills(place, clip, name, monkeypatch):
    spec = place(name)
    mask = clip.masks[0] == 1
    found = track(clip.frames[:4], mask, spec)
    assert found.shape == (4, 64, 64) and found.dtype == bool and (found[0] == mask).all()
    filled = Tools(spec)("segment")(clip.frames[0], (5, 8, 40, 50))
    assert filled.shape == (64, 64) and filled.dtype == bool
    # Frames as the model's own processor makes them (compared once with it: within a grey level, equal logits).
    from vdot.annotate import sam as module

    sam = getattr(module, name)(spec.partition(":")[2])
    white = sam.frames(np.full((1, 20, 30, 3), 255, np.uint8))
    side, full = {
        "sam2": (64, [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]),
        "sam3": (56, [1, 1, 1]),
    }[name]
    assert white.shape == (1, 3, side, side)
    assert white[0, :, 5, 5].tolist() == pytest.approx(full, abs=1e-5)
    # A network that repeats the mask that it was given.
    given = {}

    def forward(self, session, frame_idx, **_):
        given.setdefault("mask", session.mask_inputs_per_obj[0][0])
        return SimpleNamespace(pred_masks=given["mask"] * 2 - 1, frame_idx=frame_idx)

    monkeypatch.setattr(type(sam.model), "forward", forward)
    wide = np.zeros((50, 90), bool)
    wide[10:30, 50:80] = True
    repeated = sam.track(np.zeros((3, 50, 90, 3), np.uint8), wide)
    assert (repeated[2] & wide).sum() / (repeated[2] | wide).sum() > 0.95


def test_grounding_dino_finds_the_surest_box_and_has_it_filled(place, clip, monkeypatch):
    from transformers import GroundingDinoForObjectDetection

    spec = place("grounding_dino")
    assert Tools(spec)("find")(clip.frames[0], "Cat", Tools(spec)).shape == (64, 64)

    def answers(*scored):
        def forward(self, input_ids, **_):
            logits = torch.full((1, len(scored), input_ids.shape[1]), -9.0)
            for i, (score, _) in enumerate(scored):
                logits[0, i, 1] = torch.logit(torch.tensor(score))
            return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[box for _, box in scored]]))

        monkeypatch.setattr(GroundingDinoForObjectDetection, "forward", forward)

    boxes = []
    tools = lambda kind: lambda image, box: boxes.append((kind, box)) or np.ones(image.shape[:2], bool)  # noqa: E731
    image = np.zeros((100, 200, 3), np.uint8)
    answers((0.3, (0.5, 0.5, 1.0, 1.0)), (0.8, (0.25, 0.5, 0.1, 0.4)))  # centre x, y, width, height
    assert Tools(spec)("find")(image, "cat", tools).all()
    assert boxes == [("segment", (40, 30, 60, 70))]
    answers((0.1, (0.5, 0.5, 1.0, 1.0)))
    assert not Tools(spec)("find")(image, "cat", tools).any()


def test_clipseg(place, clip, monkeypatch):
    from transformers import CLIPSegForImageSegmentation

    spec = place("clipseg")
    assert Tools(spec)("find")(clip.frames[0], "cat", None).shape == (64, 64)

    def forward(self, pixel_values, **_):
        return SimpleNamespace(logits=20 * pixel_values.mean(1))  # bright is the thing

    monkeypatch.setattr(CLIPSegForImageSegmentation, "forward", forward)
    image = np.zeros((64, 128, 3), np.uint8)
    image[32:, 64:] = 255
    found = Tools(spec)("find")(image, "a cat", None)
    true = image[..., 0] > 0
    assert (found & true).sum() / (found | true).sum() > 0.9


def test_vitpose_points_land_where_the_heat_is(place, monkeypatch):
    from transformers import VitPoseForPoseEstimation

    spec = place("vitpose")
    frames = np.zeros((2, 128, 96, 3), np.uint8)
    people = Tools(spec)("pose")(frames)
    assert [len(present) for present in people] == [1, 1] and people[0][0].body.shape == (18, 3)

    def forward(self, pixel_values, **_):
        heat = torch.zeros(len(pixel_values), 17, 16, 12)  # a quarter of 64x48
        for point in range(17):
            heat[:, point, 8, 6] = 1
        heat[:, 5, 8, 6], heat[:, 5, 4, 9] = 0, 1  # the left shoulder, up and to the right
        return SimpleNamespace(heatmaps=heat)

    monkeypatch.setattr(VitPoseForPoseEstimation, "forward", forward)
    body = Tools(spec)("pose")(frames[:1])[0][0].body
    # The whole frame is the box, and the model sees it with a margin of a quarter: (9 - 6) of 12 cells are 0.25 x 1.25.
    assert body[5, 0] - body[2, 0] == pytest.approx(0.25 * 1.25 * 96, abs=6)
    assert body[5, 1] - body[2, 1] == pytest.approx(-0.25 * 1.25 * 128, abs=8)
    assert body[0, :2] == pytest.approx([48, 64], abs=8)
    assert (body[:, 2] > 0.3).all()
    assert (control("pose_body", frames[:1], spec) > 0).any()


def test_a_folder_that_holds_something_else(place, tmp_path):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(CheckpointError, match="does not hold what"):
        control("depth", frames, f"depth_anything:{tmp_path}")
    broken = tmp_path / "broken"
    shutil.copytree(place("depth_anything").partition(":")[2], broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    del weights["head.conv3.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of DepthAnything.*head\.conv3\.weight"):
        control("depth", frames, f"depth_anything:{broken}")


def test_the_best_that_is_there_is_chosen_and_nothing_is_fetched(place, clip, monkeypatch, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("VDOT_ANNOTATORS", str(shelf))
    tools = Tools()
    tools("track")
    assert tools.used == {"track": "template"}
    shutil.copytree(place("sam2").partition(":")[2], shelf / "sam2")
    tools = Tools()
    tools("track")
    assert tools.used == {"track": f"sam2 ({shelf / 'sam2'})"}
    tools = Tools("template")
    tools("track")
    assert tools.used == {"track": "template"}


def test_names_are_checked():
    assert parse_backends("auto") == {} and parse_backends("dis, sam2:/a b/c") == {"dis": None, "sam2": "/a b/c"}
    with pytest.raises(InputError, match="unknown backend 'sam'"):
        parse_backends("sam")
    with pytest.raises(InputError, match="tracking has no use for the backend dis: it can use sam3, sam2, template"):
        track(np.zeros((1, 8, 8, 3), np.uint8), np.ones((8, 8), bool), "template,dis")
    assert len({(b.kind, b.name) for b in BACKENDS}) == len(BACKENDS)


def test_raft_needs_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"flow by raft needs the package torchvision: run `pip install"):
        control("flow", np.zeros((2, 32, 32, 3), np.uint8), f"raft:{tmp_path}")


def test_packages_that_are_not_installed_are_named(monkeypatch, tmp_path):
    real = __import__("importlib").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mediapipe" else real(name))
    monkeypatch.setenv("VDOT_ANNOTATORS", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"--no-deps mediapipe==0\.10\.21.*vitpose-base-simple"):
        control("pose", np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(
        MissingDependencyError,
        match=r"needs the package mediapipe: run `pip install -e .*--no-deps mediapipe==0\.10\.21`",
    ):
        control("pose", np.zeros((2, 32, 32, 3), np.uint8), "mediapipe")


def test_mediapipe_draws_a_real_person():
    pytest.importorskip("mediapipe", reason="mediapipe is an extra of its own")
    data = pytest.importorskip("skimage.data", reason="its photograph of a person is used")
    from vdot.annotate import Material, annotate

    image = data.astronaut()  # 512x512, a face at about (225, 110)
    drawn = annotate("pose", Material(images=[image]), "mediapipe")
    points = np.argwhere((drawn.src_video[0] == 255).all(-1))  # face points
    assert len(points) > 50 and points.mean(0) == pytest.approx([120, 225], abs=25)
    for backend in ("mediapipe", "opencv"):
        box = Tools(backend)("face")(image)[0]
        assert box[0] < 225 < box[2] and box[1] < 110 < box[3]
    outline = Tools("mediapipe")("find")(image, "person", None)
    assert outline[110, 225] and outline[400, 200] and not outline[20, 20]
    assert Path(sys.modules["mediapipe"].__file__).exists()
