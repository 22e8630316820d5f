"""Which thing of a scene a pixel belongs to, by the colours that the renderer would use: no weights, no training.

Every class has a density over colours: the background's (from renderings of it), each thing's (from its sprite, shaded
and patterned), and a uniform one for whatever is neither. Smoothed, so that blur, mild noise and compression stay
within. It does not see place, size or outline: those are measured afterwards, on what it has labelled.
"""

from dataclasses import replace

import cv2
import numpy as np

from vdot.data.sprites.backgrounds import PICTURES, paint_background
from vdot.data.sprites.layers import make_layer
from vdot.data.sprites.render import Clip
from vdot.data.sprites.scene import COLOURS, STILL, Scene, Thing
from vdot.data.sprites.sprite import Track

BINS = 32  # per channel: eight levels a bin
SPREAD = 1.0  # bins, standard deviation: what an autoencoder or a codec shifts a colour by
SEEDS = 4  # instances of a painted landscape, since a caption fixes only its kind
PRIOR = {"background": 0.75, "thing": 0.1, "other": 0.01}
AGREEMENT, REACH, ROUNDS = 2.0, 1 / 40, 2  # of neighbouring labels: nats, short sides, rounds of mean field
BACKGROUND, OTHER = 0, -1  # labels; things count from 1


def colour_bins(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[..., 3]`` -> the index of each colour's bin, ``[...]``."""
    red, green, blue = np.moveaxis(pixels >> 3, -1, 0).astype(np.int32)
    return (red * BINS + green) * BINS + blue


def density(pixels: np.ndarray) -> np.ndarray:
    """Smoothed share of every colour bin among uint8 ``pixels [n, 3]``, ``[BINS ** 3]``; sums to 1."""
    counts = np.bincount(colour_bins(pixels), minlength=BINS**3).reshape(BINS, BINS, BINS).astype(np.float32)
    for _ in range(3):  # along one axis after the other; three moves bring them back into order
        lines = np.ascontiguousarray(np.moveaxis(counts, 0, -1)).reshape(-1, BINS)
        smooth = cv2.GaussianBlur(lines, (0, 0), sigmaX=SPREAD, sigmaY=1e-3, borderType=cv2.BORDER_REFLECT)
        counts = np.asarray(smooth, np.float32).reshape(BINS, BINS, BINS)
    return counts.ravel() / counts.sum()


class Palette:
    """Log densities of the classes of one scene: ``[1 + things + 1, BINS ** 3]``, background first, other last."""

    def __init__(self, clip: Clip) -> None:
        scene = clip.scene
        pixels = [
            _background_pixels(scene),
            *(_layer_pixels(layer.rgba[:: max(1, scene.frames // 4)]) for layer in clip.layers),
        ]
        known = np.stack([density(p) for p in pixels])
        uniform = np.full((1, BINS**3), 1 / BINS**3, np.float32)
        prior = [PRIOR["background"], *[PRIOR["thing"]] * len(scene.things), PRIOR["other"]]
        shares = np.concatenate([known, uniform]) * np.array(prior, np.float32)[:, None]
        # A colour that is only rare in one class must not outweigh its neighbours in the picture.
        self.log = np.log(shares + 1e-3 / BINS**3).astype(np.float32)

    def label(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[T, H, W, 3]`` -> int8 ``[T, H, W]``: 0 background, things from 1, -1 none of them.

        Neighbours agree (mean field of a Potts model): the white of a spotted ball belongs to the ball, the same white
        in a cloud does not.
        """
        reach = REACH * min(frames.shape[1:3])
        bins = colour_bins(frames)
        likely = _blurred(np.stack([table[bins] for table in self.log]), 0.6)  # [K, T, H, W]
        field = likely
        for _ in range(ROUNDS):
            share = np.exp(field - field.max(0))
            share /= share.sum(0)
            field = likely + AGREEMENT * _blurred(share, reach)
        labels = field.argmax(0)
        return np.where(labels == len(self.log) - 1, OTHER, labels).astype(np.int8)


def _blurred(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Each picture of a contiguous ``[K, T, H, W]``, in place."""
    for plane in planes.reshape(-1, *planes.shape[2:]):
        cv2.GaussianBlur(plane, (0, 0), sigma, dst=plane)
    return planes


def _with_blur(picture: np.ndarray) -> np.ndarray:
    """Its pixels as they are and as they are after a slight blur, uint8 ``[n, 3]``."""
    soft = cv2.GaussianBlur(picture, (0, 0), 1.0)
    return _bytes(np.concatenate([picture.reshape(-1, 3), soft.reshape(-1, 3)]))


def _background_pixels(scene: Scene) -> np.ndarray:
    seeds = range(SEEDS) if scene.background.kind in PICTURES or scene.background.kind == "striped" else range(1)
    instances = (replace(scene.background, seed=scene.background.seed + k) for k in seeds)
    pictures = (paint_background(b, scene.height, scene.width, scene.unit)[0] for b in instances)
    return np.concatenate([_with_blur(picture) for picture in pictures])


def _layer_pixels(patches: np.ndarray) -> np.ndarray:
    """Colours of a sprite's ``patches [n, h, w, 4]``, premultiplied, without the background behind it, ``[m, 3]``."""
    out = []
    for rgba in patches:
        soft = cv2.GaussianBlur(rgba, (0, 0), 0.8)  # colours and alpha alike: the background does not bleed in
        out += [(p[..., :3][p[..., 3] > 0.7] / p[..., 3:][p[..., 3] > 0.7]) for p in (rgba, soft)]
    return _bytes(np.concatenate(out))


def recoloured(thing: Thing, unit: int) -> np.ndarray:
    """Densities of a thing, its pattern included, in each of the ten named colours, ``[10, BINS ** 3]``."""
    size = 4 * unit // 3  # room for a large person
    out = []
    for rgb in COLOURS.values():
        layer = make_layer(replace(thing, rgb=rgb, motion=STILL), Track.still(size, thing.angle), unit)
        out.append(density(_layer_pixels(layer.rgba)))
    return np.stack(out)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)
