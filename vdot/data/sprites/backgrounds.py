"""What is behind the sprites: painted walls and small landscapes, each a still wider than the frame by the pan."""

from collections.abc import Callable

import cv2
import numpy as np

from vdot.data.sprites.scene import BACKDROP_COLOURS, Background

Rng = np.random.Generator
Painter = Callable[[Rng, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]
FAR = 0.06  # depth of a wall and of the sky, where 1 is nearest


def noise(rng: Rng, like: np.ndarray, cells_y: int, cells_x: int, octaves: int = 3) -> np.ndarray:
    """Smooth noise of the shape of ``like``, about -1..1, with so many cells along each side in the first octave."""
    rows, cols = like.shape
    total = np.zeros((rows, cols), np.float32)
    for octave in range(octaves):
        grid = (cells_y * 2**octave + 2, cells_x * 2**octave + 2)
        cells = rng.random(grid, np.float32) * 2 - 1
        total += cv2.resize(cells, (cols, rows), interpolation=cv2.INTER_CUBIC) / 2**octave
    return total


def mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """``a`` and ``b`` broadcast over ``share [H, W]`` -> ``[H, W, 3]``."""
    return a + (b - a) * share[..., None]


def rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _soft(field: np.ndarray, pixel: float) -> np.ndarray:
    """1 where the field (in short sides) is positive, with an edge one pixel wide."""
    return np.clip(0.5 + field / pixel, 0, 1)


def _ridge(rng: Rng, x: np.ndarray, level: float, swing: float, waves: float) -> np.ndarray:
    """The height of hills over ``x``, as a y."""
    phase = rng.uniform(0, 2 * np.pi, 3)
    return level - swing * (
        np.sin(waves * x + phase[0])
        + 0.5 * np.sin(2.1 * waves * x + phase[1])
        + 0.25 * np.sin(4.3 * waves * x + phase[2])
    )


def _ground(y: np.ndarray, horizon: float) -> np.ndarray:
    """Depth of a plane seen from above: far at the horizon, near at the bottom."""
    return FAR + 0.5 * np.clip((y - horizon) / (0.5 - horizon), 0, 1) ** 1.5


def _hills(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    image = mix(rgb(96, 160, 232), rgb(206, 230, 248), np.clip(y + 0.5, 0, 0.5) * 2)
    clouds = np.clip(noise(rng, x, 4, 3) - 0.25, 0, 1) * np.clip(0.1 - y, 0, 0.4) * 2.4
    image = mix(image, rgb(255, 255, 255), np.clip(clouds, 0, 0.9))
    depth = np.full(x.shape, FAR, np.float32)
    grass = noise(rng, x, 14, 10, 2)
    for i, (level, colour) in enumerate(
        [(0.02, rgb(122, 176, 128)), (0.14, rgb(98, 168, 84)), (0.27, rgb(84, 152, 58))]
    ):
        inside = _soft(y - _ridge(rng, x, level, 0.04, 3.2 - 0.6 * i), pixel)
        shade = 1 + (0.05 + 0.05 * i) * grass - 0.3 * np.clip(y - level - 0.05, 0, 1)
        image = mix(image, colour * shade[..., None], inside)
        depth = depth + (0.12 + 0.14 * i - depth) * inside
    return image, depth


def _sea(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    horizon, sun_x = 0.08, rng.uniform(-0.3, 0.3)
    image = mix(rgb(104, 84, 156), rgb(255, 176, 104), np.clip((y + 0.5) / 0.58, 0, 1) ** 1.3)
    streaks = np.clip(noise(rng, x, 9, 2) - 0.3, 0, 1) * 0.6
    image = mix(image, rgb(255, 206, 170), streaks)
    sun = np.hypot(x - sun_x, y - horizon + 0.1)
    image = mix(image, rgb(255, 236, 180), np.exp(-((sun / 0.2) ** 2)) * 0.7)
    image = mix(image, rgb(255, 248, 214), _soft(0.09 - sun, pixel))
    depth = (y - horizon).clip(0, 1)
    water = mix(rgb(226, 140, 110), rgb(40, 50, 104), np.clip(depth / 0.42, 0, 1) ** 0.7)
    waves = noise(rng, x, 26, 4, 2)
    glitter = np.clip(waves + 0.15, 0, 1) * np.exp(-(((x - sun_x) / (0.06 + 0.35 * depth)) ** 2))
    water = mix(water * (1 + 0.1 * waves)[..., None], rgb(255, 218, 160), np.clip(glitter, 0, 1) * 0.85)
    return mix(image, water, _soft(y - horizon, pixel)), _ground(y, horizon)


def _desert(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    image = mix(rgb(120, 176, 222), rgb(250, 232, 200), np.clip((y + 0.5) / 0.55, 0, 1))
    depth = np.full(x.shape, FAR, np.float32)
    ripples = noise(rng, x, 30, 5, 1)
    for i, (level, colour) in enumerate(
        [(0.03, rgb(226, 182, 124)), (0.16, rgb(236, 190, 120)), (0.31, rgb(226, 172, 98))]
    ):
        ridge = _ridge(rng, x, level, 0.045, 2.4)
        inside = _soft(y - ridge, pixel)
        lee = np.clip(np.gradient(ridge, axis=1) / pixel * 1.2 + 0.1, -0.25, 0.3)  # the side away from the light
        shade = 1 - lee * np.clip(1 - (y - ridge) / 0.2, 0, 1) + 0.03 * i * ripples
        image = mix(image, colour * shade[..., None], inside)
        depth = depth + (0.12 + 0.14 * i - depth) * inside
    return image, depth


def _mountains(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    image = mix(rgb(70, 128, 206), rgb(214, 232, 246), np.clip((y + 0.5) / 0.6, 0, 1))
    depth = np.full(x.shape, FAR, np.float32)
    rough = noise(rng, x, 10, 10, 3)
    for i, (level, swing) in enumerate([(0.0, 0.2), (0.14, 0.13)]):
        peaks = np.abs((x * (1.7 + 0.7 * i) + rng.uniform(0, 1)) % 1 - 0.5) * 2  # 1 at a peak
        ridge = level - swing * (peaks - 0.3) + 0.025 * rough
        slope = np.gradient(peaks, axis=1)
        rock = mix(rgb(128, 140, 166), rgb(88, 98, 128), (slope < 0) * 0.8) * (1 + 0.08 * rough[..., None])
        snow = _soft(ridge + 0.4 * swing + 0.05 * rough - y, 3 * pixel)
        rock = mix(rock, mix(rgb(250, 252, 255), rgb(196, 208, 232), (slope < 0) * 0.9), snow)
        inside = _soft(y - ridge, pixel)
        image, depth = mix(image, rock, inside), depth + (0.1 + 0.08 * i - depth) * inside
    field = _soft(y - _ridge(rng, x, 0.26, 0.02, 3), pixel)
    image = mix(image, rgb(236, 241, 248) - 40 * np.clip(y[..., None] - 0.26, 0, 1) + 4 * rough[..., None], field)
    return image, depth + (_ground(y, 0.2) - depth) * field


def _night(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    image = mix(rgb(10, 14, 44), rgb(52, 60, 116), np.clip(y + 0.5, 0, 1))
    image = image + rgb(26, 14, 40) * np.clip(noise(rng, x, 3, 3), 0, 1)[..., None]
    left, right, top = float(x.min()), float(x.max()), float(y.min())
    count = int(60 * (right - left) * (0.3 - top))
    for sx, sy, bright in rng.uniform((left, top, 0.3), (right, 0.3, 1), (count, 3)):
        # A star is a small blur around its place; far from it there is nothing to add.
        col, row = int((sx - left) / pixel), int((sy - top) / pixel)
        reach = max(1, round(0.016 / pixel))
        here = (slice(max(row - reach, 0), row + reach + 1), slice(max(col - reach, 0), col + reach + 1))
        spread = 0.0045 + 0.004 * bright
        glow = bright * np.exp(-(((x[here] - sx) ** 2 + (y[here] - sy) ** 2) / spread**2))
        image[here] += rgb(220, 222, 200) * glow[..., None]
    ground = _soft(y - _ridge(rng, x, 0.34, 0.03, 3), pixel)
    depth = np.full(x.shape, FAR, np.float32)
    return mix(image, rgb(14, 20, 34), ground), depth + (0.3 - depth) * ground


def _forest(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    leaves = noise(rng, x, 9, 9, 3)
    image = mix(rgb(204, 226, 150), rgb(92, 150, 84), np.clip(0.5 + 0.5 * leaves + 0.6 * np.abs(y), 0, 1))
    depth = np.full(x.shape, FAR, np.float32)
    left, right = float(x.min()), float(x.max())
    for i in range(3):  # rows of trunks, the nearer the darker and wider
        for place in np.arange(left - 0.2, right + 0.2, 0.22 + 0.1 * i):
            trunk_x, wide = place + rng.uniform(0, 0.16), (0.012 + 0.012 * i) * rng.uniform(0.8, 1.2)
            side = (x - trunk_x - 0.02 * np.sin(4 * y + place)) / wide
            inside = _soft((1 - np.abs(side)) * wide, pixel) * _soft(0.18 + 0.08 * i - y, pixel)
            bark = rgb(112 - 26 * i, 100 - 26 * i, 72 - 20 * i) * (1 - 0.25 * np.clip(side, -1, 1))[..., None]
            image, depth = mix(image, bark, inside), depth + (0.1 + 0.06 * i - depth) * inside
    canopy = _soft(-0.32 + 0.07 * leaves - y, 6 * pixel)
    image = mix(image, rgb(44, 96, 48) * (1 + 0.3 * leaves[..., None]), canopy)
    floor = _soft(y - 0.2 + 0.02 * leaves, 3 * pixel)
    image = mix(image, rgb(94, 112, 54) * (1 + 0.22 * leaves[..., None]), floor)
    return image, depth + (_ground(y, 0.16) - depth) * floor


def _bricks(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    tall, wide = 0.125, 0.27
    row = np.floor(y / tall)
    along = x / wide + 0.5 * (row % 2)
    edge = np.minimum((0.5 - np.abs(y / tall - row - 0.5)) * tall, (0.5 - np.abs(along % 1 - 0.5)) * wide)
    tones = rng.uniform(0.8, 1.12, (32, 64)).astype(np.float32)
    tone = tones[row.astype(int) % 32, np.floor(along).astype(int) % 64]
    brick = rgb(172, 82, 62) * (tone + 0.1 * noise(rng, x, 22, 22, 2))[..., None]
    image = mix(rgb(206, 196, 182), brick, _soft(edge - 0.009, 1.5 * pixel))
    return image, np.full(x.shape, FAR, np.float32)


def _wood(rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    plank = x / 0.25 + rng.uniform(0, 1)
    index = np.floor(plank)
    tone = rng.uniform(0.86, 1.1, 64).astype(np.float32)[index.astype(int) % 64]
    warp = noise(rng, x, 2, 6, 2)
    grain = np.sin(60 * x + 5 * warp + 3 * index) * 0.05 + 0.07 * noise(rng, x, 3, 26, 2)
    image = rgb(190, 140, 88) * (tone + grain)[..., None]
    gap = _soft(0.009 - (0.5 - np.abs(plank - index - 0.5)) * 0.25, 1.5 * pixel)
    return mix(image, rgb(96, 62, 34), gap), np.full(x.shape, FAR, np.float32)


PICTURES: dict[str, Painter] = {
    "hills": _hills,
    "sea": _sea,
    "desert": _desert,
    "mountains": _mountains,
    "night": _night,
    "forest": _forest,
    "bricks": _bricks,
    "wood": _wood,
}


def _painted(background: Background, rng: Rng, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    first, second = (rgb(*BACKDROP_COLOURS[name]) for name in (background.first, background.second or "white"))
    if background.kind == "plain":
        # A plain wall is a little brighter towards the light.
        return first * (1 - 0.05 * (x + y))[..., None]
    if background.kind == "gradient":
        return mix(first, second, np.clip(y + 0.5, 0, 1))
    if background.kind == "checked":
        wave = np.sin(x * np.pi / 0.16 + 0.4) * np.sin(y * np.pi / 0.16 + 0.4) * 0.05
    elif background.kind == "striped":
        slant = pick_slant(rng)
        wave = np.sin((slant[0] * x + slant[1] * y) * np.pi / 0.14) * 0.045
    else:
        cx, cy = x / 0.2 + 0.5 * (np.floor(y / 0.2) % 2), y / 0.2
        wave = (0.28 - np.hypot(cx % 1 - 0.5, cy % 1 - 0.5)) * 0.2
    return mix(first, second, _soft(wave, pixel))


def pick_slant(rng: Rng) -> tuple[float, float]:
    """Across stripes: upright, level or diagonal."""
    return ((1.0, 0.0), (0.0, 1.0), (0.7, 0.7))[int(rng.integers(3))]


def paint_background(background: Background, rows: int, cols: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture float32 ``[rows, cols, 3]`` in 0..255 and depth ``[rows, cols]`` in 0..1; ``unit`` pixels are 1."""
    rng = np.random.default_rng(background.seed)
    across = ((np.arange(cols) + 0.5 - cols / 2) / unit).astype(np.float32)
    down = ((np.arange(rows) + 0.5 - rows / 2) / unit).astype(np.float32)
    x, y = np.meshgrid(across, down)
    if background.kind in PICTURES:
        image, depth = PICTURES[background.kind](rng, x, y, 1 / unit)
    else:
        image, depth = _painted(background, rng, x, y, 1 / unit), np.full((rows, cols), FAR, np.float32)
    return np.clip(image, 0, 255).astype(np.float32), depth.astype(np.float32)
