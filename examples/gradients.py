"""How much of the gradient is left, row by row back from the last: a table and a figure.

python examples/gradients.py [--svg docs/gradients.svg]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rows import Layer

LINES = {"rnn": "#c62828", "gru": "#2e7d32", "lstm": "#1769aa", "lstm, forget bias 1": "#7b1fa2"}
LOWEST = -10  # powers of ten on the figure's axis


def gradient_norms(kind: str, rows: int, hidden: int = 64, forget_bias: float = 0.0) -> Tensor:
    """Return the norm of the loss's gradient at each row, the last row first and set to 1.

    All weights and biases are drawn from ±1/√H, as torch's cells and so the package's decoders
    are; ``forget_bias`` is added to the LSTM's forget gate. The loss reads the last hidden state.
    """
    torch.manual_seed(0)
    layer = Layer(kind, hidden, hidden)
    with torch.no_grad():
        layer.weights.bias_ih[hidden : 2 * hidden] += forget_bias
    given = torch.randn(32, rows, hidden, requires_grad=True)
    last = layer(given)[:, -1]
    (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), given)
    norms: Tensor = gradient.norm(dim=(0, 2)).flip(0)
    return norms / norms[0]


def draw(lines: Mapping[str, Sequence[float]]) -> str:
    """Return the figure as SVG: rows back to the right, powers of ten downwards."""
    width, height, left, top = 520, 300, 60, 20
    rows = max(map(len, lines.values())) - 1
    marks = []
    for power in range(0, LOWEST - 1, -2):
        y = top + height * power / LOWEST
        marks.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/>')
        marks.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">1e{power}</text>')
    for back in range(0, rows + 1, 10):
        x = left + width * back / rows
        marks.append(
            f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{back}</text>'
        )
    for number, (name, values) in enumerate(lines.items()):
        points = [
            f"{left + width * back / rows:.1f},{top + height * math.log10(value) / LOWEST:.1f}"
            for back, value in enumerate(values)
            if value >= 10**LOWEST
        ]
        marks.append(f'<polyline fill="none" stroke="{LINES[name]}" points="{" ".join(points)}"/>')
        place = f'x="{left + 12}" y="{top + height - 66 + 18 * number}"'
        marks.append(f'<text {place} fill="{LINES[name]}">{name}</text>')
    marks.append(f'<text x="{left + width / 2}" y="{top + height + 38}">rows back</text>')
    size = f'viewBox="0 0 {left + width + 20} {top + height + 48}"'
    style = 'font-family="sans-serif" font-size="13" stroke-width="2"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *marks, "</svg>", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--svg", type=Path, help="write the figure, too")
    parser.add_argument("--rows", type=int, default=41)
    args = parser.parse_args(argv)
    lines = {}
    for name in LINES:
        kind, _, forget_bias = name.partition(", forget bias ")
        lines[name] = gradient_norms(kind, args.rows, forget_bias=float(forget_bias or 0)).tolist()
    for name, values in lines.items():
        print(f"{name:<20}", *(f"{back}: {values[back]:.0e}" for back in range(0, args.rows, 10)))
    if args.svg:
        args.svg.write_text(draw(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
