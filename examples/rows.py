"""Read images row by row with a two-layer RNN (docs/rnn.md): the many-to-one side of captions.

python examples/rows.py [--cell gru]                       # scikit-learn's digits, 8 rows of 8
python examples/rows.py --data mnist [--settings article]  # MNIST, downloaded into that folder
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from torchvision.datasets import MNIST

from captioner.model.recurrence import recur

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Settings(NamedTuple):
    """Sizes and training; dropout after the first layer, the second, and the dense one."""

    hidden: int
    dropout: tuple[float, float, float]
    dense: int
    lr: float
    epochs: int
    cycle: bool  # the learning rate rises to lr and falls, or stays there


ARTICLE = Settings(256, (0.2, 0.1, 0.2), 32, 1e-4, 4, cycle=False)
BETTER = Settings(128, (0.2, 0.2, 0.0), 128, 4e-3, 10, cycle=True)
SETTINGS = {"article": ARTICLE, "better": BETTER, "digits": BETTER._replace(epochs=40)}


class Layer(nn.Module):
    """One recurrent layer: rows ``(B, L, I)`` to hidden states ``(B, L, H)``."""

    def __init__(self, kind: str, width: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.weights = kind, CELLS[kind](width, hidden)

    def forward(self, rows: Tensor) -> Tensor:
        of, states = self.weights, []
        hidden = cell = rows.new_zeros(len(rows), of.hidden_size)
        # All rows are known beforehand, so that one product serves all L positions.
        for inner in nn.functional.linear(rows, of.weight_ih, of.bias_ih).unbind(dim=1):
            outer = nn.functional.linear(hidden, of.weight_hh, of.bias_hh)
            hidden, cell = recur(self.kind, inner, outer, hidden, cell)
            states.append(hidden)
        return torch.stack(states, dim=1)


class Reader(nn.Module):
    """Two layers, then the class from the last hidden state: ``(B, L, I)`` to ``(B, 10)``."""

    def __init__(self, kind: str, width: int, by: Settings) -> None:
        super().__init__()
        one, two, three = map(nn.Dropout, by.dropout)
        layers = Layer(kind, width, by.hidden), one, Layer(kind, by.hidden, by.hidden), two
        self.layers, dense = nn.Sequential(*layers), nn.Linear(by.hidden, by.dense)
        self.head = nn.Sequential(dense, nn.ReLU(), three, nn.Linear(by.dense, 10))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.layers(rows)[:, -1])  # type: ignore[no-any-return]


def load(data: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels 0…1 and labels to train on, and to test on: of digits a held-out quarter."""
    if data == "digits":
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows, labels = images[order].float().view(-1, 8, 8) / 16.0, labels[order]
        quarter = len(labels) // 4
        return rows[quarter:], labels[quarter:], rows[:quarter], labels[:quarter]
    of, test = (MNIST(data, train=train, download=True) for train in (True, False))
    return of.data / 255.0, of.targets, test.data / 255.0, test.targets


def train(reader: Reader, rows: Tensor, labels: Tensor, by: Settings) -> None:
    """Fit with Adam on cross-entropy; the norm of the gradient is clipped at 1."""
    adam = torch.optim.Adam(reader.parameters(), by.lr)
    steps = by.epochs * -(-len(rows) // 64)
    pace = OneCycleLR(adam, by.lr, steps) if by.cycle else ConstantLR(adam, 1.0)
    for _ in range(by.epochs):
        for batch in torch.split(torch.randperm(len(rows)), 64):
            adam.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(reader(rows[batch]), labels[batch]))
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            adam.step()
            pace.step()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, or the folder of MNIST")
    parser.add_argument("--cell", default="lstm", choices=CELLS)
    parser.add_argument("--settings", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    by = SETTINGS[args.settings or ("digits" if args.data == "digits" else "better")]
    rows, labels, test, answers = load(args.data, args.seed)
    torch.manual_seed(args.seed)
    reader = Reader(args.cell, rows.shape[2], by)
    train(reader, rows, labels, by)
    with torch.inference_mode():
        reader.eval()
        parts = [reader(part).argmax(dim=1) for part in torch.split(test, 500)]
    right = torch.cat(parts) == answers
    plain = LogisticRegression(max_iter=1000).fit(rows.flatten(1), labels)
    print(f"{args.cell}: {right.float().mean():.2%} of {len(right)} held-out images are read right")
    print(f"logistic regression: {plain.score(test.flatten(1), answers):.2%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
