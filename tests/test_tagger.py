"""Tags of grids: marginals, scores, and which tags are given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.data.calibration import TagScoring
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.generation.options import TagOptions
from captioner.generation.tags import Tagger, tag_evidence
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.model.model import TagHead
from captioner.settings import ConfigError
from conftest import TAGS

B, N, D = 5, 7, 11
T = len(TAGS)
SCORING = TagScoring((0.7, 0.4, 0.3, 0.1), 0.4, ((0.5, 0.3), (0.9, 0.6)))


def grids(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def scored(tiny: Checkpoint) -> Checkpoint:
    """Return a captioner whose tags have scores."""
    tags = TagSet(TAGS, [0.5, 0.4, 0.3, 0.2, 0.1])
    return replace(tiny, tags=tags, scoring=SCORING)


@torch.no_grad()
def marginals(checkpoint: Checkpoint, grid: torch.Tensor) -> np.ndarray:
    """Return 1 - Π (1 - p) along the list that is written, one photograph at a time."""
    decoder, rows = checkpoint.model.tag_decoder, []
    for one in torch.chunk(grid, len(grid)):
        state, token, closed = decoder.start(one), BOS, [PAD, BOS, UNK]
        missed = np.ones(4 + T)
        while token != EOS and len(closed) < 3 + 12:
            logits, _, state = decoder.step(torch.tensor([token]), state)
            logits[:, closed] = -torch.inf
            probabilities = logits[0].softmax(dim=-1)
            missed *= 1.0 - probabilities.numpy()
            token = int(probabilities.argmax())
            closed.append(token)
        rows.append(1.0 - missed[4:])
    return np.array(rows)


def test_the_evidence_is_marginals_head_and_frequency(scored: Checkpoint) -> None:
    evidence = tag_evidence(scored, grids())
    assert evidence.shape == (B, T, 3)
    expected = marginals(scored, grids())
    assert 0.0 < expected.min() < 0.5 < expected.max()
    np.testing.assert_allclose(torch.sigmoid(evidence[:, :, 0]), expected, atol=1e-5)
    assert scored.model.tag_head is not None
    head = scored.model.tag_head(grids()).detach()
    torch.testing.assert_close(evidence[:, :, 1], head[:, 4:])
    np.testing.assert_allclose(evidence[0, :, 2], np.log(scored.tags.frequencies), rtol=1e-6)


def test_neighbours_change_no_score(scored: Checkpoint) -> None:
    tagger = Tagger([scored])
    together = tagger.scores([grids()])
    alone = torch.cat([tagger.scores([grid]) for grid in torch.chunk(grids(), B)])
    torch.testing.assert_close(together, alone)
    assert tagger.scores([grids()[:0]]).shape == (0, T)


def test_scores_are_the_logistic_regression_of_the_evidence(scored: Checkpoint) -> None:
    logits = tag_evidence(scored, grids()) @ torch.tensor(SCORING.weights[:3]) + 0.1
    torch.testing.assert_close(Tagger([scored]).scores([grids()]), torch.sigmoid(logits))


def test_an_ensemble_has_the_mean_score(scored: Checkpoint) -> None:
    other = replace(scored, scoring=replace(SCORING, weights=(0.1, 0.2, 0.3, 0.4), threshold=0.2))
    seen = [grids(0), grids(1)]
    both, each = Tagger([scored, other]), [Tagger([scored]), Tagger([other])]
    expected = torch.stack([t.scores([g]) for t, g in zip(each, seen, strict=True)]).mean(dim=0)
    torch.testing.assert_close(both.scores(seen), expected)
    assert both.threshold(TagOptions()) == pytest.approx(0.3)


def test_the_best_tags_from_a_threshold_on_are_given(scored: Checkpoint) -> None:
    tagger, scores = Tagger([scored]), torch.tensor([[0.1, 0.9, 0.4, 0.0, 0.5], [0.3] * 5])

    def names(options: TagOptions) -> list[list[str]]:
        return [[tag.name for tag in tags] for tags in tagger.choose(scores, options)]

    assert names(TagOptions()) == [["run", "red", "grass"], []]
    # Of equal scores those of the rarer tags say more.
    assert names(TagOptions(threshold=0.3, max_tags=2)) == [["run", "red"], ["man", "red"]]
    assert names(TagOptions(min_precision=0.9)) == [["run"], []]
    assert names(TagOptions(only=("grass", "dog"))) == [["grass"], []]
    assert names(TagOptions(exclude=("run",))) == [["red", "grass"], []]
    assert names(TagOptions(threshold=0.0)) == [["run", "red", "grass", "dog"], TAGS]
    assert tagger.choose(scores, TagOptions())[0][0].score == pytest.approx(0.9)


def test_what_the_model_has_not_is_refused(scored: Checkpoint, tiny: Checkpoint) -> None:
    tagger = Tagger([scored])
    with pytest.raises(ConfigError, match=r"only has 'gras', which is no tag .* are 'grass'"):
        tagger.check(TagOptions(only=("dog", "gras")))
    with pytest.raises(ConfigError, match=r"exclude has 'xyz', which is no tag of the model$"):
        tagger.check(TagOptions(exclude=("xyz",)))
    with pytest.raises(ConfigError, match=r"min_precision is 0\.95; the model's tags never"):
        tagger.check(TagOptions(min_precision=0.95))
    with pytest.raises(ConfigError, match=r"no thresholds for min_precision"):
        Tagger([tiny]).check(TagOptions(min_precision=0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_precision": 1.5}, "min_precision is 1.5; it takes 0 to 1"),
        ({"min_precision": 0.9, "threshold": 0.5}, "take one"),
        ({"max_tags": -1}, "max_tags is -1"),
        ({"only": "dog"}, "only is 'dog'; it takes a list"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TagOptions(**values)  # type: ignore[arg-type]


def test_the_library_has_scores_of_all_tags(scored: Checkpoint) -> None:
    captioner = Captioner(scored)
    images = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "white")]
    scores = captioner.tag_scores(images)
    assert scores.shape == (3, T)
    assert scores.dtype == np.float32
    assert captioner.tag_names == tuple(TAGS)
    for row, tags in zip(scores, captioner.tags(images, threshold=0.0), strict=True):
        found = dict(tags)
        assert [found[name] for name in TAGS] == pytest.approx(row)
    assert all(len(tags) <= 1 for tags in captioner.tags(images, max_tags=1))
    assert captioner.threshold_for(0.9) == 0.6
    assert captioner.tag_scores([]).shape == (0, T)


def test_a_model_without_scoring_has_the_scores_of_what_it_writes(tiny: Checkpoint) -> None:
    captioner = Captioner(tiny)
    images = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    for row, tags in zip(captioner.tag_scores(images), captioner.tags(images), strict=True):
        written = dict(tags)
        assert written
        assert [written.get(name, 0.0) for name in TAGS] == pytest.approx(row)


def test_the_head_is_between_the_mean_of_the_cells_and_their_maximum(scored: Checkpoint) -> None:
    head = scored.model.tag_head
    assert head is not None
    with torch.no_grad():
        cells = head.output(grids())
        mean, smooth = cells.mean(dim=1), (4.0 * cells).exp().mean(dim=1).log() / 4.0
        torch.testing.assert_close(head(grids()), 0.7 * mean + 0.3 * smooth)
        plain = TagHead(replace(scored.config.model, tag_head="mean"), 4 + T)
        plain.load_state_dict(head.state_dict())
        torch.testing.assert_close(plain.eval()(grids()), mean)
