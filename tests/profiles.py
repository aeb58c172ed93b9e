"""ICC profiles made from their published numbers: matrix profiles, grey, and ink on paper."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

# Chromaticities of red, green, blue and white, and the exponent of the curve.
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))

D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)

Chromaticities = tuple[tuple[float, float], ...]
Curve = Callable[[np.ndarray], np.ndarray]


def xyz(chromaticity: tuple[float, float]) -> np.ndarray:
    x, y = chromaticity
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_pcs(colours: Chromaticities) -> np.ndarray:
    """Return the matrix from linear RGB to XYZ under D50."""
    *primaries, white = map(xyz, colours)
    columns = np.stack(primaries, axis=1)
    matrix = columns * np.linalg.solve(columns, white)
    scale = (BRADFORD @ D50) / (BRADFORD @ white)
    adapted: np.ndarray = np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ matrix
    return adapted


def srgb_curve(encoded: np.ndarray) -> np.ndarray:
    """Return light of values in 0…1: IEC 61966-2-1."""
    low: np.ndarray = np.where(
        encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4
    )
    return low


def gamma(exponent: float) -> Curve:
    return lambda encoded: encoded**exponent


def decode(encoded: np.ndarray, colours: Chromaticities, curve: Curve) -> np.ndarray:
    """Return XYZ of colours ``(..., 3)`` in 0…1 by the profile's own numbers."""
    light: np.ndarray = curve(encoded) @ to_pcs(colours).T
    return light


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """Return XYZ as sRGB, 0…255, clipped to what there is."""
    linear = (light @ np.linalg.inv(to_pcs(SRGB)).T).clip(0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    rounded: np.ndarray = np.rint(encoded * 255)
    return rounded


def _fixed(values: np.ndarray) -> bytes:
    return struct.pack(f">{values.size}i", *np.rint(values.ravel() * 65536).astype(int).tolist())


def _xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve_tag(curve: Curve) -> bytes:
    table = np.rint(curve(np.linspace(0, 1, 1024)) * 65535).astype(int).tolist()
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *table)


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return a profile of ICC version 2: header, table of tags, tags."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz_tag(D50), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + table + body


def rgb_profile(colours: Chromaticities, curve: Curve) -> bytes:
    matrix = to_pcs(colours)
    columns = {name: _xyz_tag(matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curves = {name: _curve_tag(curve) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", columns | curves)


def grey_profile(curve: Curve) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve_tag(curve)})


def ink_profile(cyan: tuple[int, int, int]) -> bytes:
    """Return a CMYK profile: no ink is white, full cyan the Lab bytes ``cyan``, all else black."""
    colours = {0b0000: (255, 128, 128), 0b1000: cyan}  # two points an axis, C slowest, K fastest
    grid = [colours.get(point, (0, 128, 128)) for point in range(16)]
    lut = b"mft1\0\0\0\0" + struct.pack(">4B", 4, 3, 2, 0) + _fixed(np.eye(3))
    ramp = bytes(range(256))
    lut += ramp * 4 + bytes(value for point in grid for value in point) + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})
