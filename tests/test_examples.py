"""The examples: what they reach, and what their figures show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data_dir  # type: ignore[attr-defined]

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from an example's name to its names."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    sys.modules.pop("rows", None)


@pytest.mark.slow
def test_rows_of_digits_are_read(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("rows")["main"]([]) == 0
    shares = re.findall(r"^(lstm|logistic regression): ([\d.]+)%", capsys.readouterr().out, re.M)
    read = {name: float(share) for name, share in shares}
    assert read["lstm"] >= 97.0
    assert 90.0 < read["logistic regression"] < read["lstm"]


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_a_layer_of_rows_is_torchs(example: Any, kind: str) -> None:
    """``recur`` position by position gives what torch's own layer of the same weights gives."""
    import torch

    layer = example("rows")["Layer"](kind, 3, 5)
    theirs = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[kind](
        3, 5, batch_first=True
    )
    with torch.no_grad():
        for name, value in layer.weights.named_parameters():
            getattr(theirs, f"{name}_l0").copy_(value)
        rows = torch.randn(2, 7, 3)
        torch.testing.assert_close(layer(rows), theirs(rows)[0])


def test_gradients_of_the_plain_cell_vanish_first(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the same scale of all weights: a line falls faster the smaller each row's share is."""
    names = example("gradients")
    norms = {kind: names["gradient_norms"](kind, 21) for kind in ("rnn", "gru", "lstm")}
    for kind in ("gru", "lstm"):
        kept = norms[kind] / norms["rnn"]
        assert kept[5] > 2.0
        assert kept[20] > 10.0 * kept[10] > 10.0 * kept[5]
    open_gate = names["gradient_norms"]("lstm", 21, forget_bias=1.0)
    assert open_gate[20] > 100.0 * norms["lstm"][20]
    assert names["main"](["--svg", str(tmp_path / "figure.svg"), "--rows", "21"]) == 0
    assert "lstm, forget bias 1" in capsys.readouterr().out
    figure = (tmp_path / "figure.svg").read_text()
    assert figure.count("<polyline") == len(names["LINES"])


def test_a_sheet_shows_each_photograph(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = example("sheet")
    photographs = [str(Path(data_dir) / name) for name in ("camera.png", "chelsea.png")]
    sheet = tmp_path / "sheet.png"
    assert names["main"]([str(sheet), "--photographs", *photographs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["camera.png", "chelsea.png"]
    margin, side = names["MARGIN"], names["SIDE"]
    with Image.open(sheet) as drawn:
        assert drawn.width == 2 * (margin + side) + margin
        pixels = np.asarray(drawn)[margin : margin + side]
    grey, cat = pixels[:, margin : margin + side], pixels[:, 2 * margin + side : -margin]
    assert grey.min(axis=2).tolist() == grey.max(axis=2).tolist()  # a photograph without colours
    red, _, blue = cat.mean(axis=(0, 1))
    assert red > blue + 20
