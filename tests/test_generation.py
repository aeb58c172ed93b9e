"""Words for tokens: controls in words, ensembles, and the pass that says where a model looked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, Vocabulary
from captioner.generation.captions import retrace, search_tokens, token_rules, write_captions
from captioner.generation.options import SearchOptions
from captioner.generation.tags import write_tags
from captioner.model.checkpoint import Checkpoint, build_model
from captioner.model.decoder import Decoder
from captioner.settings import ConfigError
from conftest import TAGS, WORDS, tiny_config

B, N, D = 5, 7, 11
FIVE = SearchOptions(beam_size=6, num_captions=5, max_words=6)


def grids(seed: int = 0, cells: int = N) -> torch.Tensor:
    return torch.randn(B, cells, D, generator=torch.Generator().manual_seed(seed))


def sister(tiny: Checkpoint, seed: int = 1) -> Checkpoint:
    """Return another model over the same words."""
    torch.manual_seed(seed)
    model = build_model(tiny.config, tiny.vocabulary, tiny.tags).eval()
    return replace(tiny, model=model)


def captions(tiny: Checkpoint, options: SearchOptions) -> list[str]:
    found = write_captions([tiny.model.caption_decoder], tiny.vocabulary, [grids()], options)
    assert all(caption.finished for image in found for caption in image)
    return [caption.text for image in found for caption in image]


def test_words_act_inside_the_search(tiny: Checkpoint) -> None:
    free = captions(tiny, FIVE)
    (most,) = {max(WORDS, key=lambda word: sum(word in text.split() for text in free))}
    for text in captions(tiny, replace(FIVE, forbidden=(most,))):
        assert most not in text.split()
    for text in captions(tiny, replace(FIVE, no_ending=(most, "on"))):
        assert text.split()[-1:] not in ([most], ["on"])
    for text in captions(tiny, replace(FIVE, required=("hat", "red"))):
        assert {"hat", "red"} <= set(text.split())
    for text in captions(tiny, replace(FIVE, min_words=4, no_repeat=1, forbidden=("'s",))):
        assert len(set(text.split())) == len(text.split()) >= 4


def test_rare_words_stay_unsaid_unless_asked(tiny: Checkpoint) -> None:
    with torch.no_grad():
        tiny.model.caption_decoder.output.bias[3] = 30.0
    assert not any("<unk>" in text for text in captions(tiny, FIVE))
    assert all("<unk>" in text for text in captions(tiny, replace(FIVE, unknown=True)))


@pytest.mark.parametrize("name", ["forbidden", "no_ending", "required"])
def test_unknown_words_are_refused_by_name(tiny: Checkpoint, name: str) -> None:
    for word in ("zebra", "<eos>", "<unk>"):
        words: dict[str, Any] = {name: ("dog", word)}
        options = SearchOptions(**words)
        with pytest.raises(ConfigError, match=f"{name} has '{word}': the model does not know"):
            token_rules(options, tiny.vocabulary)


def test_what_cannot_be_finished_is_marked(tiny: Checkpoint) -> None:
    options = SearchOptions(max_words=len(WORDS) + 1, min_words=len(WORDS) + 1, no_repeat=1)
    decoders = [tiny.model.caption_decoder]
    for (caption,) in write_captions(decoders, tiny.vocabulary, [grids()], options, attention=True):
        assert not caption.finished
        assert sorted(caption.words) == sorted(WORDS)
        assert caption.attention is not None
        assert caption.attention.shape == (len(WORDS), N)


@pytest.mark.parametrize("decoder", ["caption_decoder", "tag_decoder"])
@pytest.mark.parametrize("members", [1, 2])
def test_teacher_forcing_reproduces_the_search(
    tiny: Checkpoint, decoder: str, members: int
) -> None:
    decoders: list[Decoder] = [getattr(c.model, decoder) for c in (tiny, sister(tiny))[:members]]
    seen = [grids(seed) for seed in range(members)]

    found = search_tokens(decoders, seen, None, FIVE, token_rules(FIVE, tiny.vocabulary)[0])
    found[2] = found[2][:2]
    terms, looked = retrace(decoders, seen, found)
    longest = max(len(h.tokens) for image in found for h in image)
    assert terms.shape == (5 * B, longest + 1)
    assert [weights.shape for weights in looked] == [(5 * B, longest + 1, N)] * members
    for image, hypotheses in enumerate(found):
        for place, hypothesis in enumerate(hypotheses):
            row = terms[5 * image + place]
            length = len(hypothesis.token_log_probs)
            assert row[:length].tolist() == pytest.approx(hypothesis.token_log_probs, abs=1e-4)
            assert row[length:].abs().sum() == 0.0
            assert float(row.sum()) == pytest.approx(hypothesis.log_prob, abs=1e-4)


def test_attention_is_that_of_each_word(tiny: Checkpoint) -> None:
    decoder, grid = tiny.model.caption_decoder, grids()
    found = write_captions([decoder], tiny.vocabulary, [grid], FIVE, attention=True)
    for image, several in enumerate(found):
        for caption in several:
            assert caption.attention is not None
            assert caption.attention.shape == (len(caption.words), N)
            assert caption.attention.dtype == np.float32
            np.testing.assert_allclose(caption.attention.sum(axis=1), 1.0, atol=1e-5)
            tokens = [BOS, *tiny.vocabulary.encode(caption.words)[:-1]]
            _, weights = decoder(grid[image : image + 1], torch.tensor([tokens]))
            expected = weights[0, :-1].detach().numpy()
            np.testing.assert_allclose(caption.attention, expected, atol=1e-5)
    plain = write_captions([decoder], tiny.vocabulary, [grid], FIVE)
    assert plain == found
    assert all(caption.attention is None for several in plain for caption in several)


def test_no_attention_where_there_is_none(tiny: Checkpoint) -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary(WORDS)
    blind = build_model(tiny_config(attention=False), vocabulary, TagSet(TAGS)).eval()
    found = write_captions([blind.caption_decoder], vocabulary, [grids()], FIVE, attention=True)
    assert all(caption.attention is None for several in found for caption in several)
    both = [blind.caption_decoder, tiny.model.caption_decoder]
    found = write_captions(both, vocabulary, [grids(), grids()], FIVE, attention=True)
    assert all(caption.attention is not None for several in found for caption in several)
    with pytest.raises(ConfigError, match="grids of 7 and 9 cells, which have no common attention"):
        write_captions(both, vocabulary, [grids(), grids(0, 9)], FIVE, attention=True)


def test_an_ensemble_averages_log_probabilities(tiny: Checkpoint) -> None:
    decoders = [c.model.caption_decoder for c in (tiny, sister(tiny), sister(tiny, 2))]
    seen = [grids(seed) for seed in range(3)]
    found = write_captions(decoders, tiny.vocabulary, seen, FIVE)
    for image, several in enumerate(found):
        for caption in several:
            tokens = torch.tensor([[BOS, *tiny.vocabulary.encode(caption.words)]])
            each = [
                torch.log_softmax(decoder(grid[image : image + 1], tokens[:, :-1])[0], dim=-1)
                for decoder, grid in zip(decoders, seen, strict=True)
            ]
            mean = torch.stack(each).mean(dim=0).gather(2, tokens[:, 1:, None])
            assert float(mean.sum().detach()) == pytest.approx(caption.log_prob, abs=1e-4)


def test_a_model_with_itself_says_what_it_says_alone(tiny: Checkpoint) -> None:
    model, grid = tiny.model, grids()
    one, two = ([model.caption_decoder] * count for count in (1, 2))
    alone = write_captions(one, tiny.vocabulary, [grid], FIVE)
    together = write_captions(two, tiny.vocabulary, [grid, grid], FIVE)
    assert [[c.text for c in image] for image in alone] == [
        [c.text for c in image] for image in together
    ]
    tags = [
        write_tags([model.tag_decoder] * count, tiny.tags, tiny.calibration, [grid] * count)
        for count in (1, 2)
    ]
    assert tags[0] == tags[1]
    assert all(len({tag.name for tag in found}) == len(found) > 0 for found in tags[0])


def test_no_photographs_give_no_captions(tiny: Checkpoint) -> None:
    decoders, nothing = [tiny.model.caption_decoder], [grids()[:0]]
    assert write_captions(decoders, tiny.vocabulary, nothing, FIVE, attention=True) == []
    assert write_tags([tiny.model.tag_decoder], tiny.tags, tiny.calibration, nothing) == []
