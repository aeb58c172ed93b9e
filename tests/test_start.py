"""Starting from a whole captioner: nothing it knows is lost, and new words have their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioner.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Preprocessing,
)
from captioner.data.example import Example
from captioner.data.tags import TagSet
from captioner.data.vocabulary import SPECIAL, UNK, Vocabulary
from captioner.model.checkpoint import Checkpoint, CheckpointError, build_model, save_checkpoint
from captioner.settings import ConfigError
from captioner.training.start import begin, extend_tags, extend_vocabulary
from conftest import TAGS, WORDS

EXAMPLES = [Example(Path("a.png"), ("a purple heron on grass", "a heron on grass"), ("heron",))]


def config_from(checkpoint: Checkpoint, folder: Path) -> Config:
    """Return the config of a run that starts from a checkpoint, and says nothing else."""
    save_checkpoint(checkpoint, folder / "source.safetensors")
    return Config(
        data=DataConfig(min_count=1, tag_min_count=1),
        model=ModelConfig(init=str(folder / "source.safetensors")),
    )


def test_old_words_keep_their_place_and_new_ones_follow(tiny: Checkpoint, tmp_path: Path) -> None:
    begun = begin(config_from(tiny, tmp_path), EXAMPLES)
    assert begun.vocabulary.words[: len(tiny.vocabulary)] == tiny.vocabulary.words
    assert begun.vocabulary.words[len(tiny.vocabulary) :] == ("heron", "purple")
    assert begun.tags.vocabulary.words[len(SPECIAL) :] == (*TAGS, "heron")
    assert begun.tags.frequencies == (1.0,) * 6
    assert UNK not in begun.vocabulary.encode(["purple", "heron", "dog"])


def test_what_it_knows_is_kept(tiny: Checkpoint, tmp_path: Path) -> None:
    begun = begin(config_from(tiny, tmp_path), EXAMPLES)
    old, new = tiny.model.state_dict(), begun.model.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)] if tensor.ndim else new[name], tensor), name
    decoder = begun.model.caption_decoder
    assert decoder.output.weight is decoder.embedding.weight  # this one is tied
    words = old["caption_decoder.embedding.weight"][len(SPECIAL) :]
    torch.testing.assert_close(decoder.embedding.weight[-1], words.mean(dim=0))


def test_old_words_are_as_likely_to_each_other_as_before(tiny: Checkpoint, tmp_path: Path) -> None:
    begun = begin(config_from(tiny, tmp_path), EXAMPLES)
    grid, tokens = torch.randn(2, 3, 11), torch.tensor([[1, 4, 7], [1, 9, 5]])
    before, _ = tiny.model.caption_decoder(grid, tokens)
    after, _ = begun.model.eval().caption_decoder(grid, tokens)
    torch.testing.assert_close(after[:, :, : len(tiny.vocabulary)], before)
    # A new word is as likely as a word is in the mean, so it pushes no other out.
    assert (after.argmax(dim=-1) == before.argmax(dim=-1)).all()


def test_sizes_are_inherited_and_may_not_differ(tiny: Checkpoint, tmp_path: Path) -> None:
    config = config_from(tiny, tmp_path)
    begun = begin(config, EXAMPLES).config
    assert begun.model == replace(tiny.config.model, init=config.model.init)
    assert begun.preprocessing == tiny.config.preprocessing
    assert begun.encoder.name == tiny.config.encoder.name
    assert begun.data == config.data
    other = DecoderConfig(hidden=99, dropout=0.1)
    with pytest.raises(ConfigError, match=r"model\.caption\.hidden is 99, but 17 in model\.init"):
        begin(replace(config, model=replace(config.model, caption=other)), EXAMPLES)
    dropped = replace(config, model=replace(config.model, caption=DecoderConfig(dropout=0.1)))
    assert begin(dropped, EXAMPLES).config.model.caption.dropout == 0.1
    assert begin(dropped, EXAMPLES).config.model.tags == tiny.config.model.tags
    larger = replace(config, preprocessing=Preprocessing(size=96))
    assert begin(larger, EXAMPLES).config.preprocessing == Preprocessing(size=96)
    cropped = replace(config, preprocessing=Preprocessing(fit="crop"))
    with pytest.raises(ConfigError, match=r"preprocessing\.fit is 'crop', but 'squash' in model"):
        begin(cropped, EXAMPLES)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(init=str(tmp_path / "none.safetensors")))
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        begin(config, EXAMPLES)


def test_frequencies_of_tags_are_the_new_datas() -> None:
    tags = extend_tags(TagSet(["dog", "man"], [0.5, 0.25]), TagSet(["man", "heron"], [0.75, 0.1]))
    assert tags.vocabulary.words[len(SPECIAL) :] == ("dog", "man", "heron")
    assert tags.frequencies == (0.5, 0.75, 0.1)


def test_another_spelling_of_a_tag_is_not_another_tag() -> None:
    tags = extend_tags(TagSet(["run", "dog"], [0.5, 0.25]), TagSet(["running", "cat"], [0.9, 0.1]))
    assert tags.vocabulary.words[len(SPECIAL) :] == ("run", "dog", "cat")
    assert tags.frequencies == (0.9, 0.25, 0.1)
    assert tags.most_frequent(2) == ["run", "dog"]


def test_a_source_without_tags_gets_some(tiny: Checkpoint, tmp_path: Path) -> None:
    bare = replace(tiny, tags=TagSet([]))
    bare.model = build_model(tiny.config, tiny.vocabulary, bare.tags)
    begun = begin(config_from(bare, tmp_path), EXAMPLES)
    assert begun.tags.vocabulary.words[len(SPECIAL) :] == ("heron",)
    assert all(tensor.isfinite().all() for tensor in begun.model.state_dict().values())


def test_what_cannot_be_meant_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    config = config_from(tiny, tmp_path)
    with pytest.raises(ConfigError, match=r"encoder\.weights is 'x\.pth', but the encoder is that"):
        begin(replace(config, encoder=EncoderConfig(weights="x.pth")), EXAMPLES)
    with pytest.raises(ConfigError, match="a folder; name a checkpoint"):
        begin(replace(config, model=ModelConfig(init=str(tmp_path))), EXAMPLES)
    with pytest.raises(ConfigError, match=r"data\.min_count is 9; no word stands so often"):
        begin(Config(data=DataConfig(min_count=9)), EXAMPLES)


def test_where_it_comes_from_is_kept(tiny: Checkpoint, tmp_path: Path) -> None:
    tiny.provenance = {"data": "drawn"}
    provenance = begin(config_from(tiny, tmp_path), EXAMPLES).provenance
    assert provenance["begun from"] == "source.safetensors"
    assert provenance["source"] == {"data": "drawn"}


def test_no_word_stands_twice() -> None:
    words = extend_vocabulary(Vocabulary(WORDS), Vocabulary(["hat", "cat", "a"]))
    assert words.words[len(SPECIAL) :] == (*WORDS, "cat")
