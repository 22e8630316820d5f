"""A small network that names what is in a clip of the procedural world: features for distances, and a second opinion.

It shares nothing with :mod:`vdot.evaluate.truth` but the world, so where the two agree there is something to it. It
knows which colours and kinds of motion occur, not which belong together. Trained as by default (six minutes of one
core) it names, in held-out scenes of one thing, 97% of colours, 95% of motions, 86% of backgrounds and 99% of counts,
but 19% of shapes (chance is 7%): do not ask it about shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vdot.data.sprites import render
from vdot.data.sprites.draw import draw_scene
from vdot.data.sprites.scene import ALL_MOTIONS, BACKGROUNDS, COLOUR_NAMES, MAX_THINGS, SHAPES, Scene
from vdot.errors import CheckpointError
from vdot.runtime import log
from vdot.video import to_model
from vdot.video.output import atomic_path

SIDE, FRAMES = 64, 6  # what the network sees of a clip of any size
FEATURES = 64
HEADS: dict[str, tuple[str, ...]] = {
    "colour": COLOUR_NAMES,
    "shape": SHAPES,
    "motion": ALL_MOTIONS,
    "background": BACKGROUNDS,
    "count": tuple(str(n + 1) for n in range(MAX_THINGS)),
}
EXCLUSIVE = ("background", "count")  # one of each clip; of the others there may be several


class SpriteClassifier(nn.Module):
    """110k parameters. ``[B, 3, FRAMES, SIDE, SIDE]`` in [-1, 1] -> the logits of each head, ``[B, classes]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(3, 16, (1, 5, 5), (1, 2, 2)),  # 6 x 32 x 32
            *_stage(16, 24, (1, 3, 3), (1, 1, 1)),
            *_stage(24, 32, (3, 3, 3), (1, 2, 2)),  # 6 x 16 x 16
            *_stage(32, 48, (1, 3, 3), (1, 2, 2)),  # 6 x 8 x 8
            *_stage(48, 48, (3, 3, 3), (2, 1, 1)),  # 3 x 8 x 8
        )
        self.neck = nn.Linear(2 * 48, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(classes)) for name, classes in HEADS.items()})

    def features(self, clips: Tensor) -> Tensor:
        seen = self.body(clips).flatten(2)  # [B, 48, L]
        return F.silu(self.neck(torch.cat([seen.mean(-1), seen.amax(-1)], 1)))

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        features = self.features(clips)
        return {name: head(features) for name, head in self.heads.items()}


def _stage(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return [nn.Conv3d(inputs, outputs, kernel, stride, padding), nn.BatchNorm3d(outputs), nn.SiLU()]


@dataclass(frozen=True)
class Opinion:
    """On ``n`` clips: features ``[n, FEATURES]`` and, by head, the probability of each class ``[n, classes]``."""

    features: np.ndarray
    probabilities: dict[str, np.ndarray]

    def asked(self, index: int, scene: Scene) -> dict[str, float]:
        """Mean probability of what the scene asks for, by head, 0..1, higher is better."""
        labels = targets(scene)
        return {name: float(self.probabilities[name][index][labels[name] > 0].mean()) for name in HEADS}


def targets(scene: Scene) -> dict[str, np.ndarray]:
    """Which classes occur, float32 of 0 and 1 by head."""
    out = {name: np.zeros(len(classes), np.float32) for name, classes in HEADS.items()}
    for thing in scene.things:
        for name, value in (("colour", thing.colour), ("shape", thing.shape), ("motion", thing.motion.kind)):
            out[name][HEADS[name].index(value)] = 1
    out["background"][BACKGROUNDS.index(scene.background.kind)] = 1
    out["count"][len(scene.things) - 1] = 1
    return out


def network_input(frames: np.ndarray) -> Tensor:
    """uint8 ``[T, H, W, 3]`` of any size -> ``[3, FRAMES, SIDE, SIDE]`` in [-1, 1]."""
    picked = np.rint(np.linspace(0, len(frames) - 1, FRAMES)).astype(int)
    clip = to_model(np.ascontiguousarray(frames[picked]))
    if clip.shape[-2:] == (SIDE, SIDE):
        return clip
    return F.interpolate(clip.transpose(0, 1), (SIDE, SIDE), mode="bilinear", antialias=True).transpose(0, 1)


@torch.no_grad()
def classify(model: SpriteClassifier, clips: Sequence[np.ndarray], batch: int = 32) -> Opinion:
    """Of clips uint8 ``[T, H, W, 3]``, on the model's device."""
    device = next(model.parameters()).device
    features: list[Tensor] = []
    chances: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for start in range(0, len(clips), batch):
        found = model.features(torch.stack([network_input(c) for c in clips[start : start + batch]]).to(device))
        features.append(found.float().cpu())
        for name, head in model.heads.items():
            logits = head(found).float().cpu()
            chances[name].append(logits.softmax(-1) if name in EXCLUSIVE else logits.sigmoid())
    return Opinion(torch.cat(features).numpy(), {name: torch.cat(parts).numpy() for name, parts in chances.items()})


def train_classifier(
    clips: int = 6000, epochs: int = 8, batch: int = 32, rate: float = 3e-3, seed: int = 0, device: str = "cpu"
) -> SpriteClassifier:
    """Train on ``clips`` scenes of the training split from seed ``seed`` on, mirrored at random; minutes on a CPU.

    Deterministic on one device with one thread. The clips stay in memory: 74 kB each.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SpriteClassifier().to(device)
    inputs, labels = _training_set(clips, seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    steps = epochs * (clips // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    rng = np.random.default_rng(seed)
    model.train()
    for epoch in range(epochs):
        order = rng.permutation(clips)
        total = 0.0
        for start in range(0, clips - batch + 1, batch):
            rows = order[start : start + batch]
            pictures = _mirrored(inputs[rows], rng).to(device)
            wanted = {name: values[rows].to(device) for name, values in labels.items()}
            loss = _loss(model(pictures), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        log.info("classifier epoch %d of %d: loss %.3f", epoch + 1, epochs, total / max(clips // batch, 1))
    return model.eval()


def _training_set(clips: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """uint8 ``[n, FRAMES, SIDE, SIDE, 3]`` and the targets of each head."""
    picked = np.rint(np.linspace(0, 16, FRAMES)).astype(int)
    scenes = [draw_scene(seed + i, "train") for i in range(clips)]
    frames = np.stack([render(scene).frames[picked] for scene in scenes])
    rows = [targets(scene) for scene in scenes]
    return torch.from_numpy(frames), {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in HEADS}


def _mirrored(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """``[B, T, H, W, 3]`` -> ``[B, 3, T, H, W]`` in [-1, 1], half of them left for right: no kind of motion changes."""
    clips = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    flip = torch.from_numpy(rng.random(len(clips)) < 0.5)
    clips[flip] = clips[flip].flip(-1)
    return clips


def _loss(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    parts = []
    for name, values in logits.items():
        if name in EXCLUSIVE:
            parts.append(F.cross_entropy(values, wanted[name]))
        else:  # per class summed, so that a rare class weighs as much as in a choice of one
            parts.append(F.binary_cross_entropy_with_logits(values, wanted[name], reduction="none").sum(-1).mean())
    return torch.stack(parts).sum()


def save_classifier(model: SpriteClassifier, path: Path | str) -> None:
    """One safetensors file that says what its outputs mean."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"heads": json.dumps(HEADS)})


def load_classifier(path: Path | str, device: str = "cpu") -> SpriteClassifier:
    """``CheckpointError`` if the file is none of ours, or names other classes than the world has now."""
    try:
        with safe_open(str(path), "pt") as file:
            heads = json.loads((file.metadata() or {}).get("heads", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is no classifier: {error}; train one with train_classifier") from error
    if heads != {name: list(classes) for name, classes in HEADS.items()}:
        raise CheckpointError(f"{path} names other classes than the world has: train it again")
    model = SpriteClassifier()
    model.load_state_dict(tensors)
    return model.to(device).eval()
