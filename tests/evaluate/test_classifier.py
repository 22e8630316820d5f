"""The classifier learns, is saved with what its outputs mean, and is the same when trained again."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vdot.data.sprites import draw_scene, render
from vdot.errors import CheckpointError
from vdot.evaluate.classifier import (
    FEATURES,
    HEADS,
    SpriteClassifier,
    classify,
    load_classifier,
    network_input,
    save_classifier,
    targets,
    train_classifier,
)


@pytest.fixture(scope="module")
def trained() -> SpriteClassifier:
    torch.set_num_threads(1)
    return train_classifier(clips=16, epochs=16, batch=4)


def test_it_is_small():
    assert sum(p.numel() for p in SpriteClassifier().parameters()) < 120_000


def test_it_learns_the_scenes_it_is_shown(trained):
    scenes = [draw_scene(seed, "train") for seed in range(16)]
    opinion = classify(trained, [render(scene).frames for scene in scenes])
    assert opinion.features.shape == (16, FEATURES)
    for name in HEADS:
        own = np.mean([opinion.asked(i, scene)[name] for i, scene in enumerate(scenes)])
        other = np.mean([opinion.asked(i - 1, scene)[name] for i, scene in enumerate(scenes)])
        assert own > 1.3 * other, name
    for name in ("background", "count"):
        np.testing.assert_allclose(opinion.probabilities[name].sum(1), 1, atol=1e-5)


def test_training_again_gives_the_same():
    first, again = (train_classifier(clips=16, epochs=1, batch=16) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_it_is_saved_with_its_meaning(trained, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(trained, path)
    loaded = load_classifier(path)
    clip = network_input(render(draw_scene(1)).frames)[None]
    for name, logits in trained(clip).items():
        assert torch.equal(logits, loaded(clip)[name])


def test_other_files_are_refused(trained, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(trained.state_dict(), path)
    with pytest.raises(CheckpointError, match="other classes"):
        load_classifier(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no classifier"):
        load_classifier(path)


def test_clips_of_any_size_are_seen():
    scene = draw_scene(2, height=96, width=160, frames=9)
    assert network_input(render(scene).frames).shape == (3, 6, 64, 64)


def test_targets_name_what_is_there():
    scene = draw_scene(3, things=3)
    labels = targets(scene)
    assert labels["count"].tolist() == [0, 0, 1]
    assert {HEADS["colour"][i] for i in np.flatnonzero(labels["colour"])} == {t.colour for t in scene.things}
    assert {HEADS["motion"][i] for i in np.flatnonzero(labels["motion"])} == {t.motion.kind for t in scene.things}
