"""Dermoscopy-like pictures drawn from numbers alone: no files, no downloads, no licence.

Each picture is a function of (seed, index, size) and is the same, bit for bit, on every machine.
That holds because the generator uses only operations that IEEE 754 rounds exactly (``+ - * /``,
square root, comparisons) one at a time and elementwise: no sine, exponential or power (their last
bit depends on the C library), no sums or matrix products (their order depends on the processor),
and the raw Philox stream, which NumPy keeps stable, rather than its distributions, which it does
not. ``tests/network/test_synthetic.py`` holds the hashes of some pictures.

What is drawn: a lesion with an irregular, partly fading border, one to three pigments, pigment
network, globules, regression and blue-white veil, on skin of six tones with texture, redness and
small moles; over it ink marks, colour patches, hair, rulers, gel bubbles, glare, uneven light,
vignettes, colour casts, defocus and sensor noise. One uniform draw per picture, its difficulty,
moves contrast, edge sharpness and clutter together, so that a set spans from easy to hard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eamnet.data.source import Picture, Record, Source

Field = npt.NDArray[np.float32]
Colour = tuple[float, float, float]

#: Classes of the multi-class masks, in order; ``num_classes=n`` keeps the first n.
CLASSES = ("background", "lesion", "ink", "hair")

#: Raised whenever the pictures change, so that cached ones are not mistaken for new ones.
VERSION = 1

# Colours are sRGB fractions. Skin runs from light to dark; pigments are what they let through.
_SKIN: tuple[Colour, ...] = (
    (0.93, 0.79, 0.73),
    (0.90, 0.73, 0.66),
    (0.85, 0.66, 0.57),
    (0.75, 0.56, 0.46),
    (0.60, 0.43, 0.34),
    (0.44, 0.31, 0.25),
)
_PIGMENTS: dict[str, Colour] = {
    "tan": (0.84, 0.70, 0.60),
    "brown": (0.66, 0.48, 0.38),
    "dark brown": (0.42, 0.29, 0.25),
    "black": (0.22, 0.17, 0.18),
    "blue grey": (0.48, 0.52, 0.60),
    "red": (0.86, 0.54, 0.52),
    "pink": (0.97, 0.78, 0.79),
}
_PALETTES: tuple[tuple[str, ...], ...] = (
    ("brown", "dark brown", "tan"),
    ("dark brown", "brown", "black"),
    ("tan", "brown", "tan"),
    ("brown", "tan", "dark brown"),
    ("dark brown", "black", "blue grey"),
    ("pink", "red", "tan"),
    ("red", "pink", "brown"),
    ("tan", "pink", "brown"),
)
_INKS: tuple[Colour, ...] = ((0.36, 0.30, 0.62), (0.26, 0.36, 0.70), (0.30, 0.22, 0.36))
_PATCHES: tuple[Colour, ...] = (
    (0.20, 0.42, 0.75),
    (0.25, 0.60, 0.35),
    (0.90, 0.78, 0.25),
    (0.82, 0.30, 0.28),
    (0.90, 0.55, 0.25),
)


class _Stream:
    """Numbers from the raw Philox stream of one (seed, index)."""

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def below(self, bound: int) -> int:
        return int(self.uniform() * bound)

    def pick(self, options: Sequence[Colour]) -> Colour:
        return options[self.below(len(options))]

    def field(self, *shape: int) -> Field:
        raw = self._bits.random_raw(int(np.prod(shape))).reshape(shape)
        return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

    def direction(self) -> tuple[float, float]:
        """A unit vector (cos, sin), from the rational form of the circle: no trigonometry."""
        t = self.uniform(-1.0, 1.0)
        cosine, sine = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
        return (cosine, sine) if self.chance(0.5) else (-sine, cosine)


def _ramp(values: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, smooth between (Hermite)."""
    t = np.clip((values - np.float32(low)) * np.float32(1.0 / (high - low)), 0.0, 1.0)
    return t * t * (np.float32(3.0) - np.float32(2.0) * t)


class _Canvas:
    """One picture in the making: coordinates, random fields and compositing."""

    def __init__(self, stream: _Stream, size: int) -> None:
        self.stream = stream
        self.size = size
        centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        self.x, self.y = centres[None, :], centres[:, None]
        self.pixels: list[Field] = []

    def noise(self, cells: int) -> Field:
        """Smooth noise in [-1, 1]: a random lattice under a quadratic B-spline."""
        size, lattice = self.size, self.stream.field(cells + 3, cells + 3)
        lattice = lattice * np.float32(2.0) - np.float32(1.0)
        position = (np.arange(size) + 0.5) / size * cells + self.stream.uniform()
        start = position.astype(np.int64)
        f = (position - start).astype(np.float32)
        one = np.float32(1.0)
        weights = (
            np.float32(0.5) * (one - f) * (one - f),
            np.float32(0.5) + f - f * f,
            np.float32(0.5) * f * f,
        )
        for _ in range(2):
            rows = [w[:, None] * lattice[start + k] for k, w in enumerate(weights)]
            lattice = (rows[0] + rows[1] + rows[2]).T
        return lattice

    def clouds(self, cells: int, octaves: int) -> Field:
        """Noise over several octaves, each twice as fine and half as strong; about [-1, 1]."""
        total = self.noise(cells)
        for octave in range(1, octaves):
            total = total + np.float32(0.5**octave) * self.noise(cells << octave)
        return total

    def cells(self, count: int) -> tuple[Field, Field]:
        """Distances, in cells, to the nearest and second nearest of points on a jittered grid."""
        points_x = self.stream.field(count + 2, count + 2)
        points_y = self.stream.field(count + 2, count + 2)
        position = (np.arange(self.size) + 0.5) / self.size * count
        cell = position.astype(np.int64)
        inside = (position - cell).astype(np.float32)
        flat = cell[:, None] * (count + 2) + cell[None, :]
        nearest = np.full((self.size, self.size), 9.0, dtype=np.float32)
        second = nearest
        for row in (0, 1, 2):
            for column in (0, 1, 2):
                index = flat + (row * (count + 2) + column)
                dx = np.take(points_x, index) + (np.float32(column - 1) - inside)[None, :]
                dy = np.take(points_y, index) + (np.float32(row - 1) - inside)[:, None]
                distance = dx * dx + dy * dy
                second = np.minimum(second, np.maximum(nearest, distance))
                nearest = np.minimum(nearest, distance)
        return np.sqrt(nearest), np.sqrt(second)

    def stroke(
        self,
        at: tuple[float, float],
        along: tuple[float, float],
        bend: float,
        length: float,
        width: float,
        softness: float,
    ) -> Field:
        """Coverage of a bent line through ``at``: a parabola of the given width and length."""
        cosine, sine = along
        dx, dy = self.x - np.float32(at[0]), self.y - np.float32(at[1])
        u = dx * np.float32(cosine) + dy * np.float32(sine)
        v = dy * np.float32(cosine) - dx * np.float32(sine)
        slope = np.float32(2.0 * bend) * u
        distance = np.abs(v - np.float32(bend) * u * u) / np.sqrt(np.float32(1.0) + slope * slope)
        across = np.clip((np.float32(width / 2 + softness / 2) - distance) / softness, 0.0, 1.0)
        end = np.clip((np.float32(length / 2) - np.abs(u)) * np.float32(self.size / 2), 0.0, 1.0)
        return across * end

    def disc(self, at: tuple[float, float]) -> Field:
        """Distance from a point, in picture sides."""
        dx, dy = self.x - np.float32(at[0]), self.y - np.float32(at[1])
        return np.sqrt(dx * dx + dy * dy)

    def filter(self, amount: Field, transmitted: Colour) -> None:
        """Darken as a pigment does: multiply by what it transmits, where ``amount`` says."""
        self.pixels = [
            plane * (np.float32(1.0) - amount * np.float32(1.0 - t))
            for plane, t in zip(self.pixels, transmitted, strict=True)
        ]

    def cover(self, amount: Field, colour: Colour) -> None:
        """Paint over with an opaque colour, where ``amount`` says."""
        self.pixels = [
            plane + amount * (np.float32(c) - plane)
            for plane, c in zip(self.pixels, colour, strict=True)
        ]

    def scale(self, amount: Field) -> None:
        """Multiply all colours: light and shade."""
        self.pixels = [plane * amount for plane in self.pixels]


def _skin(canvas: _Canvas) -> None:
    stream = canvas.stream
    # Squared, so that light skin is as frequent as it is in the public sets, and none is absent.
    depth = stream.uniform() * stream.uniform() * (len(_SKIN) - 1)
    lower = int(depth)
    blend = depth - lower
    warmth = stream.uniform(-0.04, 0.04)
    tone = [
        a + blend * (b - a) + shift
        for a, b, shift in zip(_SKIN[lower], _SKIN[lower + 1], (warmth, 0.0, -warmth), strict=True)
    ]
    texture = np.float32(1.0) + np.float32(stream.uniform(0.02, 0.06)) * canvas.clouds(12, 4)
    canvas.pixels = [texture * np.float32(c) for c in tone]
    redness = _ramp(canvas.clouds(3, 2), 0.0, 0.9) * np.float32(stream.uniform(0.0, 0.7))
    canvas.filter(redness, (0.98, 0.84, 0.83))
    if stream.chance(0.4):
        mottle = _ramp(canvas.clouds(8, 2), 0.15, 0.8) * np.float32(stream.uniform(0.1, 0.5))
        canvas.filter(mottle, _PIGMENTS["tan"])
    for _ in range(stream.below(4) if stream.chance(0.3) else 0):
        radius = stream.uniform(0.008, 0.03)
        spot = canvas.disc((stream.uniform(), stream.uniform()))
        amount = np.float32(1.0) - _ramp(spot, 0.5 * radius, 1.5 * radius)
        canvas.filter(amount * np.float32(stream.uniform(0.3, 0.9)), _PIGMENTS["brown"])


def _lesion_depth(canvas: _Canvas, difficulty: float) -> tuple[Field, float]:
    """How far inside the lesion each pixel lies, in lesion radii (negative outside)."""
    stream = canvas.stream
    spread = stream.uniform()
    radius = 0.08 + 0.38 * spread * (0.4 + 0.6 * stream.uniform())
    # Lesions lie near the middle, small ones less so: the sum of two draws leans to it.
    slack = 0.45 - 0.7 * radius
    at = (
        0.5 + slack * (stream.uniform() + stream.uniform() - 1.0),
        0.5 + slack * (stream.uniform() + stream.uniform() - 1.0),
    )
    row, column = int(at[1] * canvas.size), int(at[0] * canvas.size)
    # Bending the coordinates, instead of adding noise to the distance, keeps the lesion in one
    # piece; taking the bend at the centre off keeps it where it was put.
    bend = radius * stream.uniform(0.2, 0.5 + 0.4 * difficulty)
    cells = 3 + stream.below(5)
    bent = []
    for axis, centre in ((canvas.x, at[0]), (canvas.y, at[1])):
        field = canvas.clouds(cells, 4)
        offset = np.float32(centre) + np.float32(bend) * field[row, column]
        bent.append(axis + np.float32(bend) * field - offset)
    cosine, sine = stream.direction()
    u = bent[0] * np.float32(cosine) + bent[1] * np.float32(sine)
    v = bent[1] * np.float32(cosine) - bent[0] * np.float32(sine)
    wide, narrow = np.float32(1.0 / radius), np.float32(1.0 / (radius * stream.uniform(0.55, 1.0)))
    distance = np.sqrt((u * wide) * (u * wide) + (v * narrow) * (v * narrow))
    for _ in range(stream.below(3)):
        cosine, sine = stream.direction()
        reach = radius * stream.uniform(0.4, 0.9)
        lobe_wide = np.float32(1.0 / (radius * stream.uniform(0.35, 0.8)))
        du = (bent[0] - np.float32(reach * cosine)) * lobe_wide
        dv = (bent[1] - np.float32(reach * sine)) * lobe_wide
        lobe = np.sqrt(du * du + dv * dv)
        gap = np.clip(np.float32(0.5) - np.abs(distance - lobe), 0.0, None)
        distance = np.minimum(distance, lobe) - gap * gap * np.float32(0.5)
    ragged = np.float32(stream.uniform(0.0, 0.06 + 0.08 * difficulty))
    return np.float32(1.0) - distance + ragged * canvas.clouds(16, 2), radius


def _lesion(canvas: _Canvas, difficulty: float) -> npt.NDArray[np.bool_]:
    stream = canvas.stream
    depth, radius = _lesion_depth(canvas, difficulty)
    edge = 0.05 + stream.uniform(0.1, 0.9) * difficulty
    body = _ramp(depth, -edge / 2, edge / 2)
    # Parts of a border fade into the skin.
    fading = np.float32(1.0) - np.float32(stream.uniform(0.0, 0.75)) * _ramp(
        canvas.clouds(2, 2), -0.1, 0.8
    )
    strength = np.float32(stream.uniform(1.0 - 0.45 * difficulty, 1.1 - 0.6 * difficulty))
    body = body * fading * strength
    names = _PALETTES[stream.below(len(_PALETTES))]
    canvas.filter(body, _PIGMENTS[names[0]])
    core = _ramp(depth + np.float32(0.5) * canvas.clouds(4, 3), 0.15, 0.6)
    canvas.filter(body * core * np.float32(stream.uniform(0.2, 0.9)), _PIGMENTS[names[1]])
    blotch = _ramp(canvas.clouds(5, 3), 0.15, 0.5)
    canvas.filter(body * blotch * np.float32(stream.uniform(0.0, 0.8)), _PIGMENTS[names[2]])

    grain = np.float32(stream.uniform(0.05, 0.3)) * canvas.clouds(20, 2) + np.float32(0.1)
    canvas.filter(body * np.clip(grain, 0.0, 1.0), _PIGMENTS["brown"])

    count = 20 + stream.below(24)
    nearest, second = canvas.cells(count)
    patchy = _ramp(canvas.clouds(3, 2), -0.3, 0.4)
    if stream.chance(0.5):
        lines = np.float32(1.0) - _ramp(second - nearest, 0.05, 0.35)
        rim = np.float32(1.0) - np.float32(0.6) * _ramp(depth, 0.3, 0.8)
        network = lines * patchy * rim * np.float32(stream.uniform(0.3, 0.8))
        canvas.filter(body * network, _PIGMENTS["dark brown"])
    if stream.chance(0.3):
        dots = (np.float32(1.0) - _ramp(nearest, 0.15, 0.35)) * patchy
        canvas.filter(body * dots * np.float32(stream.uniform(0.3, 0.8)), _PIGMENTS["black"])
    if stream.chance(0.2):
        scar = _ramp(canvas.clouds(4, 2), 0.25, 0.5) * body * np.float32(stream.uniform(0.2, 0.6))
        canvas.cover(scar, (0.86, 0.74, 0.72))
    if stream.chance(0.15):
        veil = _ramp(canvas.clouds(3, 2), 0.1, 0.5) * _ramp(depth, 0.1, 0.5)
        canvas.cover(veil * np.float32(stream.uniform(0.2, 0.5)), (0.52, 0.56, 0.66))
    # Skin furrows run over lesion and skin alike.
    furrows = np.float32(1.0) - _ramp(second - nearest, 0.0, 0.3)
    canvas.scale(np.float32(1.0) - furrows * np.float32(stream.uniform(0.0, 0.05)))
    # A halo of inflamed skin, outside the border: red, and no part of the lesion.
    halo = _ramp(depth, -1.2, -0.1) * np.float32(stream.uniform(0.0, 0.5) * (radius < 0.3))
    canvas.filter(halo * (np.float32(1.0) - body), (0.97, 0.86, 0.85))
    return depth > 0


def _ink(canvas: _Canvas) -> Field:
    """Skin-marker strokes: opaque in the middle, uneven, often beside the lesion."""
    stream = canvas.stream
    total = np.zeros((canvas.size, canvas.size), dtype=np.float32)
    if not stream.chance(0.3):
        return total
    colour = stream.pick(_INKS)
    worn = _ramp(canvas.clouds(24, 2), -0.7, 0.2)
    for _ in range(1 + stream.below(3)):
        stroke = canvas.stroke(
            at=(stream.uniform(0.05, 0.95), stream.uniform(0.05, 0.95)),
            along=stream.direction(),
            bend=stream.uniform(-1.5, 1.5),
            length=stream.uniform(0.12, 0.6),
            width=stream.uniform(0.02, 0.055),
            softness=0.02,
        )
        total = np.maximum(total, stroke * worn)
    canvas.cover(total * np.float32(stream.uniform(0.5, 0.9)), colour)
    return total


def _hair(canvas: _Canvas, difficulty: float) -> Field:
    stream = canvas.stream
    total = np.zeros((canvas.size, canvas.size), dtype=np.float32)
    if not stream.chance(0.35 + 0.3 * difficulty):
        return total
    count = 1 + stream.below(4 + int(20 * difficulty))
    shade = stream.uniform(0.08, 0.4) if stream.chance(0.85) else stream.uniform(0.65, 0.85)
    comb = stream.direction()
    for _ in range(count):
        along = comb if stream.chance(0.6) else stream.direction()
        tilt = stream.uniform(-0.3, 0.3)
        along = (along[0] - tilt * along[1], along[1] + tilt * along[0])
        norm = float(np.sqrt(along[0] * along[0] + along[1] * along[1]))
        hair = canvas.stroke(
            at=(stream.uniform(), stream.uniform()),
            along=(along[0] / norm, along[1] / norm),
            bend=stream.uniform(-0.8, 0.8),
            length=stream.uniform(0.3, 1.3),
            width=stream.uniform(0.002, 0.009),
            softness=0.008,
        )
        total = np.maximum(total, hair)
    canvas.cover(total * np.float32(stream.uniform(0.6, 0.95)), (shade * 1.15, shade, shade * 0.8))
    return total


def _ruler(canvas: _Canvas) -> None:
    """Tick marks, every fifth one longer: along a whole side, or a short scale bar off it."""
    stream = canvas.stream
    bar = stream.chance(0.5)
    pitch = stream.uniform(0.02, 0.035) if bar else stream.uniform(0.03, 0.07)
    long, width = pitch * stream.uniform(1.2, 1.6), stream.uniform(0.004, 0.009)
    tilt = np.float32(stream.uniform(-0.06, 0.06))
    along, across = (canvas.x, canvas.y) if stream.chance(0.5) else (canvas.y, canvas.x)
    if stream.chance(0.5):
        across = np.float32(1.0) - across
    inset = stream.uniform(0.05, 0.15) if bar else 0.01
    along, across = along + tilt * across, across - tilt * along - np.float32(inset)
    beat = along * np.float32(1.0 / pitch) + np.float32(8.0)
    number = np.floor(beat)
    offset = np.abs(beat - number - np.float32(0.5)) * np.float32(pitch)
    fifth = np.floor(number * np.float32(0.2)) * np.float32(5.0) == number
    length = np.where(fifth, np.float32(long), np.float32(long * 0.55))
    soft = np.float32(canvas.size)
    line = np.clip((np.float32(width / 2) - offset) * soft + np.float32(0.5), 0.0, 1.0)
    line = line * np.clip((length - across) * soft, 0.0, 1.0) * (across > 0)
    if bar:
        base = np.clip((np.float32(width / 2) - np.abs(across)) * soft + np.float32(0.5), 0.0, 1.0)
        middle, half = stream.uniform(0.3, 0.7), stream.uniform(0.12, 0.25)
        line = np.maximum(line, base) * (np.abs(along - np.float32(middle)) < np.float32(half))
    shade = stream.uniform(0.05, 0.25)
    canvas.cover(line * np.float32(stream.uniform(0.6, 1.0)), (shade, shade, shade))


def _patch(canvas: _Canvas) -> None:
    """A coloured calibration sticker that reaches into the picture from its border."""
    stream = canvas.stream
    end = stream.uniform(-0.08, 0.06) if stream.chance(0.5) else stream.uniform(0.94, 1.08)
    side = stream.uniform(0.1, 0.9)
    radius = stream.uniform(0.08, 0.18)
    distance = canvas.disc((end, side) if stream.chance(0.5) else (side, end))
    inside = np.float32(1.0) - _ramp(distance, radius - 0.006, radius + 0.006)
    canvas.cover(inside * np.float32(stream.uniform(0.85, 1.0)), stream.pick(_PATCHES))


def _bubbles(canvas: _Canvas) -> None:
    """Air in the contact gel: thin rings, dark outside and bright inside, with a glint."""
    stream = canvas.stream
    for _ in range(1 + stream.below(6)):
        at = (stream.uniform(), stream.uniform())
        radius = stream.uniform(0.01, 0.045)
        distance = canvas.disc(at)
        ring = np.clip(1.0 - np.abs(distance - np.float32(radius)) * np.float32(110.0), 0.0, 1.0)
        canvas.scale(np.float32(1.0) - ring * np.float32(0.3))
        inner = np.clip(
            1.0 - np.abs(distance - np.float32(0.75 * radius)) * np.float32(120.0), 0.0, 1.0
        )
        canvas.cover(inner * np.float32(0.35), (1.0, 0.98, 0.96))
        glint = canvas.disc((at[0] - 0.35 * radius, at[1] - 0.35 * radius))
        bright = np.float32(1.0) - _ramp(glint, 0.1 * radius, 0.4 * radius)
        canvas.cover(bright * np.float32(0.8), (1.0, 1.0, 1.0))


def _light(canvas: _Canvas) -> None:
    """Uneven lighting, lens fall-off and, in some pictures, the dark rim of the tube."""
    stream = canvas.stream
    cosine, sine = stream.direction()
    slope = np.float32(stream.uniform(0.0, 0.22))
    tilt = (canvas.x - np.float32(0.5)) * np.float32(cosine)
    tilt = tilt + (canvas.y - np.float32(0.5)) * np.float32(sine)
    canvas.scale(np.float32(1.0) + slope * tilt)
    distance = canvas.disc((stream.uniform(0.45, 0.55), stream.uniform(0.45, 0.55)))
    if stream.chance(0.6):
        fall = np.float32(stream.uniform(0.2, 0.9))
        canvas.scale(np.float32(1.0) - np.minimum(fall * distance * distance, np.float32(0.8)))
    if stream.chance(0.3):
        rim = stream.uniform(0.5, 0.66)
        soft = stream.uniform(0.01, 0.1)
        shade = stream.uniform(0.0, 0.08)
        canvas.cover(_ramp(distance, rim - soft / 2, rim + soft / 2), (shade, shade, shade))


def _camera(canvas: _Canvas) -> npt.NDArray[np.uint8]:
    """Exposure, colour cast, defocus, noise and the rounding to 8 bits."""
    stream, size = canvas.stream, canvas.size
    exposure = stream.uniform(0.85, 1.15)
    gains = [exposure * stream.uniform(0.93, 1.07) for _ in range(3)]
    blur = stream.chance(0.3)
    noise = np.float32(stream.uniform(0.004, 0.03))
    image = np.empty((size, size, 3), dtype=np.uint8)
    grain = stream.field(size, size) + stream.field(size, size) - np.float32(1.0)
    for channel, (plane, gain) in enumerate(zip(canvas.pixels, gains, strict=True)):
        if blur:
            for _ in range(2):
                padded = np.concatenate([plane[:1], plane, plane[-1:]])
                plane = (padded[:-2] + padded[1:-1] * np.float32(2.0) + padded[2:]).T * np.float32(
                    0.25
                )
        grain_here = grain + np.float32(0.5) * (stream.field(size, size) - np.float32(0.5))
        values = plane * np.float32(gain) + noise * grain_here
        image[..., channel] = np.floor(
            np.clip(values, 0.0, 1.0) * np.float32(255.0) + np.float32(0.5)
        )
    return image


def draw(
    seed: int, index: int, size: int = 256, num_classes: int = 1
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw one picture and its truth.

    Args:
        seed: of the set; 0 to 2**64 - 1.
        index: of the picture in the set; 0 to 2**64 - 1.
        size: side of the square picture in pixels, at least 16.
        num_classes: how many of :data:`CLASSES` the truth tells apart. It changes the truth alone,
            never the picture; 1 and 2 mean lesion against background.

    Returns:
        The picture, uint8 ``(size, size, 3)`` RGB, and the class of each pixel, uint8
        ``(size, size)``. Where ink or hair that is told apart lies over the lesion, it wins.
    """
    stream = _Stream(seed, index)
    canvas = _Canvas(stream, size)
    difficulty = stream.uniform()
    _skin(canvas)
    lesion = _lesion(canvas, difficulty)
    ink = _ink(canvas)
    if stream.chance(0.08):
        _patch(canvas)
    if stream.chance(0.2):
        _ruler(canvas)
    hair = _hair(canvas, difficulty)
    if stream.chance(0.2):
        _bubbles(canvas)
    _light(canvas)
    image = _camera(canvas)
    classes = lesion.astype(np.uint8)
    if num_classes > 2:
        classes[ink > 0.5] = 2
    if num_classes > 3:
        classes[hair > 0.5] = 3
    return image, classes


class SyntheticSource(Source):
    """A set of drawn pictures, ``synthetic_000000`` onwards.

    Args:
        count: how many.
        seed: of the set; another seed gives other pictures.
        size: side of the square pictures in pixels.
        num_classes: 1 for a binary truth (lesion or not), 2 to 4 for the first classes of
            :data:`CLASSES`.
    """

    name = "synthetic"

    def __init__(
        self, count: int = 400, seed: int = 0, size: int = 256, num_classes: int = 1
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if size < 16:
            raise ValueError(f"size must be at least 16 pixels, got {size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
        if not 1 <= num_classes <= len(CLASSES):
            raise ValueError(
                f"num_classes must lie in 1 .. {len(CLASSES)} for synthetic pictures "
                f"({', '.join(CLASSES)}), got {num_classes}"
            )
        super().__init__([Record(id=f"synthetic_{index:06d}") for index in range(count)])
        self.seed = seed
        self.size = size
        self.num_classes = num_classes

    def read(self, record: Record) -> Picture:
        """Draw one picture; see :func:`draw`."""
        index = int(record.id.rsplit("_", 1)[1])
        return Picture(*draw(self.seed, index, self.size, self.num_classes))

    def fingerprint(self, record: Record) -> str:
        """Everything a picture is drawn from."""
        return f"{record.id}/{VERSION}/{self.seed}/{self.size}/{self.num_classes}"
