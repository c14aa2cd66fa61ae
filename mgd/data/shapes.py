"""Generated images for the quickstart and the tests: textured objects on textured backgrounds.

Every image is a pure function of (seed, index). Shape tells the classes apart; colour and texture
are hints that often mislead. A handful of labels is too few to learn which hint to trust.
"""

import colorsys

import numpy as np

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross", "star")


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        seed: seed of the data set.
        index: number of the image.
        size: side, pixels.

    Returns:
        image `[size, size, 3]` uint8 and label `[size, size]` uint8 with values below 7.
    """
    rng = np.random.default_rng((seed, index))
    y, x = np.mgrid[0:size, 0:size] / size
    image = _texture(rng, x, y, int(rng.integers(4)), rng.uniform(), saturation=0.25)
    label = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        kind = int(rng.integers(1, len(CLASSES)))
        radius = rng.uniform(0.15, 0.32)
        center_x, center_y = rng.uniform(0.05, 0.95, size=2)
        angle = rng.uniform(0, 2 * np.pi)
        u = ((x - center_x) * np.cos(angle) + (y - center_y) * np.sin(angle)) / radius
        v = ((y - center_y) * np.cos(angle) - (x - center_x) * np.sin(angle)) / radius
        inside = _inside(kind, u, v)
        texture = kind % 4 if rng.random() < 0.7 else int(rng.integers(4))
        hue = (kind - 1) / 6 + rng.normal(0, 0.04)
        image[inside] = _texture(rng, u, v, texture, hue, saturation=rng.uniform(0.4, 1))[inside]
        label[inside] = kind
    light = 1 + rng.uniform(-0.35, 0.35) * (x - 0.5) + rng.uniform(-0.35, 0.35) * (y - 0.5)
    image = image * light[..., None] + rng.normal(0, 0.04, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), label


def _inside(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Membership of the points (u, v), in units of the object's radius."""
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    if kind == 1:
        return distance < 0.9
    if kind == 2:
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == 3:
        return (v > -0.5) & (1.732 * abs(u) + v < 1.0)
    if kind == 4:
        return (distance < 1.0) & (distance > 0.5)
    if kind == 5:
        return (np.minimum(abs(u), abs(v)) < 0.28) & (np.maximum(abs(u), abs(v)) < 1.0)
    return distance < 0.72 + 0.38 * np.cos(5 * angle)


def _texture(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, kind: int, hue: float, saturation: float
) -> np.ndarray:
    """A two-colour pattern `[H, W, 3]` in 0..1 around one hue: plain, stripes, checks or blobs."""
    bright, dark = rng.uniform(0.6, 1), rng.uniform(0.1, 0.5)
    first = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, bright))
    second = np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.05)) % 1, saturation, dark))
    frequency, phase = rng.uniform(4, 9), rng.uniform(0, 6)
    angle = rng.uniform(0, np.pi)
    a, b = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    if kind == 0:
        weight = 0.5 + 0.25 * np.sin(2 * a + phase)
    elif kind == 1:
        weight = (np.sin(2 * frequency * a + phase) > 0).astype(float)
    elif kind == 2:
        weight = (np.sin(frequency * a + phase) * np.sin(frequency * b) > 0).astype(float)
    else:
        weight = 0.5 + 0.5 * np.sin(frequency * a + 2 * np.sin(frequency * b + phase))
    return weight[..., None] * first + (1 - weight[..., None]) * second
