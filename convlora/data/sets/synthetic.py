"""Camouflaged objects drawn from a seed, so that a first run needs no download.

A scene is a field of tone, coloured by one earthy palette. An object has finer texture than its ground,
turned against it, a slight shift in tone and colour, and a shaded edge. Distractors are shifted in tone and
colour only, so that neither finds the objects.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import fft

from convlora.data.module import SPLITS, Pair, SegmentationDataModule, Split

Array = NDArray[np.float32]

DIAMETERS = (0.02, 0.8)  # of a disc of the object's area, as a part of the image's side
OBJECTS = (0.05, 0.70, 0.17, 0.08)  # share of scenes with 0, 1, 2 and 3 objects
_SUBPIXEL = 4  # fractional bits of OpenCV's coordinates


@dataclass(kw_only=True, eq=False, repr=False)
class Synthetic(SegmentationDataModule):
    """Scenes drawn when they are read; scene i of a split depends on nothing but `scene_seed`, split and i.

    Attributes:
        train_size: number of scenes.
        val_size: number of scenes.
        test_size: number of scenes.
        size: side of a scene, px.
        scene_seed: of all scenes; `seed` does not change them.
    """

    name: str = "synthetic"
    root: Path = Path("synthetic")
    train_size: int
    val_size: int
    test_size: int
    size: int
    scene_seed: int = 0
    drawn = True

    def __post_init__(self) -> None:
        """Refuse to keep scenes in a folder, where those of other settings could be taken for them."""
        super().__post_init__()
        for key in ("train_size", "val_size", "test_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"dataset.{key}={getattr(self, key)} must be at least 1")
        if self.loading.cache not in (None, "ram"):
            raise ValueError(
                f"{self.name}: loading.cache={self.loading.cache} is for files, but scenes are drawn; "
                "set ram or null"
            )
        if self.loading.channels is not None:
            raise ValueError(
                f"{self.name}: loading.channels={list(self.loading.channels)} is for files, but scenes are "
                "drawn in RGB; leave it out"
            )

    def pairs(self, split: Split) -> list[Pair]:
        """Name the scenes of a split by paths at which no file lies."""
        folder = self.root / split
        sizes = {"train": self.train_size, "val": self.val_size, "test": self.test_size}
        return [
            Pair(folder / "images" / f"{i:05}.png", folder / "masks" / f"{i:05}.png")
            for i in range(sizes[split])
        ]

    def median_side(self) -> int:
        """Return the side of the scenes, px."""
        return self.size

    def files(self, pair: Pair) -> list[Path]:
        """Name none: a scene is drawn, not loaded."""
        return []

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        split, index = SPLITS.index(pair.image.parts[-3]), int(pair.image.stem)
        return draw_scene(np.random.default_rng([self.scene_seed, split, index]), self.size)

    def read_mask(self, pair: Pair) -> NDArray[np.uint8]:
        return self.read(pair)[1]


@dataclass(frozen=True)
class Texture:
    """Band-limited noise.

    Attributes:
        wavelength: of the middle of the band, as a part of the image's side.
        angle: of the direction in which the tone varies most, radians.
        focus: concentration on that direction; 0 is isotropic.
        contrast: standard deviation of the tone.
    """

    wavelength: float
    angle: float
    focus: float
    contrast: float

    def draw(self, rng: np.random.Generator, size: int) -> Array:
        """Return tones [size, size] of mean 0."""
        octave, cosine, sine = _frequencies(size)
        octave = octave + np.float32(np.log2(self.wavelength * size))
        turn = cosine * np.float32(np.cos(2 * self.angle)) + sine * np.float32(np.sin(2 * self.angle))
        band = np.exp(np.float32(self.focus) * (turn - 1) - np.float32(1.2) * octave**2)
        band[0, 0] = 0
        noise = rng.standard_normal((*band.shape, 2), np.float32).view(np.complex64)[..., 0]
        tones: Array = fft.irfft2(band * noise, (size, size))
        return tones * np.float32(self.contrast / tones.std())


def draw_scene(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw image [size, size, 3] and mask [size, size], 0 or 1."""
    ground = _ground_texture(rng)
    light = rng.uniform(0, 2 * np.pi)
    unevenness = _smooth(rng, size, 10, rng.uniform(0.2, 0.5))
    tone = ground.draw(rng, size) + unevenness
    tint = _smooth(rng, size, 5, 0.015)
    shade = _illumination(rng, size, light)
    _add_distractors(rng, tone, tint)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.choice(len(OBJECTS), p=OBJECTS)):
        diameter = _diameter(rng)
        cover = _cover(rng, size, diameter)
        # a small object shows little texture, so it differs more in tone
        shift = rng.choice([-1, 1]) * rng.uniform(0.2, 0.45) * (1 + 0.05 / diameter)
        skin = _object_texture(rng, ground, diameter).draw(rng, size) + unevenness + np.float32(shift)
        tone += cover * (skin - tone)
        tint += cover * np.float32(rng.normal(0, 0.02))
        shade *= _relief(cover, diameter * size, light)
        mask |= (cover >= 0.5).astype(np.uint8)
    tone += rng.standard_normal((size, size), np.float32) * np.float32(0.15)
    color = _color(rng, tone, tint) * shade[..., None]
    return np.clip(color, 0, 255).astype(np.uint8), mask


def _diameter(rng: np.random.Generator) -> float:
    low, high = np.log(DIAMETERS)
    return float(np.exp(rng.uniform(low, high)))


def _ground_texture(rng: np.random.Generator) -> Texture:
    return Texture(
        wavelength=float(np.exp(rng.uniform(np.log(0.03), np.log(0.08)))),
        angle=rng.uniform(0, np.pi),
        focus=rng.uniform(0, 4),
        contrast=rng.uniform(0.6, 0.9),
    )


def _object_texture(rng: np.random.Generator, ground: Texture, diameter: float) -> Texture:
    """Texture finer than the ground's, so that figure and ground can be told apart, and turned."""
    return Texture(
        wavelength=min(max(ground.wavelength / 2 ** rng.uniform(0.9, 1.6), 0.015), diameter / 2),
        angle=ground.angle + rng.uniform(np.pi / 4, 3 * np.pi / 4),
        focus=rng.uniform(0, 4),
        contrast=ground.contrast * rng.uniform(0.8, 1.3),
    )


@lru_cache(maxsize=2)
def _frequencies(size: int) -> tuple[Array, Array, Array]:
    """Return log2 of the frequency (cycles per pixel) and cosine and sine of twice its direction."""
    y = fft.fftfreq(size).astype(np.float32)[:, None]
    x = fft.rfftfreq(size).astype(np.float32)[None]
    square = np.maximum(x**2 + y**2, np.float32(1e-12))
    return np.log2(square) / 2, (x**2 - y**2) / square, 2 * x * y / square


def _outline(rng: np.random.Generator) -> NDArray[np.float64]:
    """Outline [points, 2] of a blob (radius by Fourier series) or of a bent, tapering animal, of area 1."""
    if rng.random() < 0.6:
        angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
        order = np.arange(2, 8)[:, None]
        wave = np.cos(order * angle + rng.uniform(0, 2 * np.pi, order.shape))
        radius = np.exp((rng.normal(0, 0.5, order.shape) / order * wave).sum(0))
        points = radius * np.exp(1j * angle)
    else:
        along = np.linspace(0, 1, 60)
        bend = rng.uniform(-2, 2) * along + rng.uniform(-1.2, 1.2) * np.sin(2 * np.pi * along)
        spine = np.cumsum(np.exp(1j * bend)) / 60
        width = along**0.5 * (1 - along) ** rng.uniform(0.5, 1.2) * rng.uniform(0.2, 0.45)
        width *= 1 + rng.uniform(0, 0.35) * np.sin(2 * np.pi * (rng.uniform(1.5, 3) * along + rng.random()))
        normal = 1j * np.exp(1j * bend)
        points = np.concatenate([spine + width * normal, (spine - width * normal)[::-1]])
        points = points - spine.mean()
    points = points * np.exp(1j * rng.uniform(0, 2 * np.pi))
    area = abs((points.conj() * np.roll(points, -1)).imag.sum()) / 2
    return np.asarray(np.stack([points.real, points.imag], -1) / np.sqrt(area))


def _cover(rng: np.random.Generator, size: int, diameter: float) -> Array:
    """Return the part of each pixel [size, size] that an object of `diameter` covers."""
    margin = min(0.3 * diameter + 0.02, 0.5)
    outline = _outline(rng) * diameter * np.sqrt(np.pi) / 2 + rng.uniform(margin, 1 - margin, 2)
    # OpenCV widens what it fills by half a pixel; at twice the size that is a quarter
    canvas = np.zeros((2 * size, 2 * size), np.uint8)
    corners = np.rint((outline * 2 * size - 0.5) * 2**_SUBPIXEL).astype(np.int32)
    cv2.fillPoly(canvas, [corners], 255, cv2.LINE_AA, _SUBPIXEL)
    cover = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(cover, np.float32) / np.float32(255)


def _add_distractors(rng: np.random.Generator, tone: Array, tint: Array) -> None:
    """Add patches that keep the ground's texture, and twigs."""
    size = len(tone)
    for _ in range(rng.integers(2, 5)):
        diameter = _diameter(rng)
        patch = cv2.blur(_cover(rng, size, diameter), (2 * round(0.06 * diameter * size) + 1,) * 2)
        tone += patch * np.float32(rng.normal(0, 0.6))
        tint += patch * np.float32(rng.normal(0, 0.025))
    twigs = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(0, 8)):
        steps = np.concatenate([rng.uniform(0, size, (1, 2)), rng.normal(0, 0.08 * size, (3, 2))])
        corners = np.rint(steps.cumsum(0) * 2**_SUBPIXEL).astype(np.int32)
        width = max(1, round(rng.uniform(0.004, 0.012) * size))
        cv2.polylines(twigs, [corners], False, 255, width, cv2.LINE_AA, _SUBPIXEL)
    tone += twigs * np.float32(rng.choice([-1, 1]) * rng.uniform(0.6, 1.3) / 255)


def _smooth(rng: np.random.Generator, size: int, cells: int, contrast: float) -> Array:
    """Return a slowly varying field [size, size] with `cells` bumps along each side."""
    grid = rng.normal(0, contrast, (cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)


def _illumination(rng: np.random.Generator, size: int, light: float) -> Array:
    """Return brightness that rises towards the light, with soft shadows."""
    slope = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(rng.uniform(0, 0.25))
    gradient = slope * np.float32(np.cos(light)) + slope[:, None] * np.float32(np.sin(light))
    return 1 + gradient + _smooth(rng, size, 4, 0.1)


def _relief(cover: Array, diameter: float, light: float) -> Array:
    """Return the brightness of a rounded object: lit and shaded sides, and a shadow on the ground."""
    soft = cv2.blur(cover, (2 * max(1, round(0.07 * diameter)) + 1,) * 2)
    reach = max(1.0, 0.05 * diameter)
    x, y = reach * np.cos(light), reach * np.sin(light)
    move = np.array([[1, 0, -x], [0, 1, -y]])
    away = cv2.warpAffine(soft, move, soft.shape, borderMode=cv2.BORDER_REPLICATE)
    relief: Array = 1 + cover * np.float32(0.25) * (soft - 1) + np.float32(0.3) * (soft - away)
    return relief


def _color(rng: np.random.Generator, tone: Array, tint: Array) -> Array:
    """Colour tones by an earthy ramp from dark (-2) to light (2), shifted in chroma by `tint`; 0..255."""
    hue = rng.uniform(20, 110) + rng.uniform(-15, 15, 3)  # degrees, from brown to green
    saturation = rng.uniform(0.1, 0.45) * rng.uniform(0.7, 1.3, 3)
    value = [rng.uniform(0.1, 0.25), rng.uniform(0.35, 0.5), rng.uniform(0.65, 0.9)]
    hsv = np.stack([hue, saturation, value], -1)[None].astype(np.float32)
    palette = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    ramp = np.linspace(-2, 2, 256)
    table = np.stack([np.interp(ramp, (-2, 0, 2), channel) for channel in palette.T], -1).astype(np.float32)
    color: Array = table.take(np.clip(tone * 64 + 128, 0, 255).astype(np.uint8), 0)
    chroma = np.array([[255, rng.uniform(-255, 255), -255]], np.float32)  # red or orange against blue or teal
    color += tint[..., None] * chroma
    return color
