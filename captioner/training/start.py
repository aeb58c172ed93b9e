"""The first weights of a run: a backbone's, or a whole captioner's with rows for new words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.config import Config, EncoderConfig
from captioner.data.example import Example
from captioner.data.tags import TagSet
from captioner.data.tokenizer import stem, tokenize
from captioner.data.vocabulary import SPECIAL, Vocabulary
from captioner.model.checkpoint import Checkpoint, build_model, default_path, load_checkpoint
from captioner.model.encoder import Encoder, load_backbone_weights
from captioner.settings import ConfigError, from_dict, to_dict
from captioner.version import __version__

__all__ = ["begin", "extend_tags", "extend_vocabulary", "grow", "inherit"]

# A run that starts from a checkpoint may change these settings: no weight's shape depends on them.
_FREE = ("dropout", "preprocessing.size")


def begin(config: Config, examples: Sequence[Example]) -> Checkpoint:
    """Return the model with its first weights, the words and the tags of a run on the examples.

    Where ``model.init`` names a checkpoint, the config has the sizes of this checkpoint.
    Raises ``ConfigError`` and ``CheckpointError``.
    """
    data = config.data
    words = Vocabulary.build(
        (tokenize(c) for e in examples for c in e.captions), data.vocabulary_size, data.min_count
    )
    tags = TagSet.build(examples, data.tag_size, data.tag_min_count)
    origin: dict[str, Any] = {}
    if config.model.init:
        source = _load_source(config)
        origin = {"source": source.provenance}
        begun = grow(source, inherit(config, source.config), words, tags)
    elif len(words) == len(SPECIAL):
        raise ConfigError(f"data.min_count is {data.min_count}; no word stands so often")
    else:
        model = build_model(config, words, tags)
        _load_encoder(model.encoder, config.encoder)
        begun = Checkpoint(model, config, words, tags)
    begun.provenance = {
        "photographs": len(examples),
        "captions": sum(len(example.captions) for example in examples),
        "begun from": Path(config.model.init or config.encoder.weights).name,
        "versions": f"captioner {__version__}, torch {torch.__version__}",
        **origin,
    }
    return begun


def _load_source(config: Config) -> Checkpoint:
    init, weights = config.model.init, config.encoder.weights
    if weights != EncoderConfig().weights:
        raise ConfigError(
            f"encoder.weights is {weights!r}, but the encoder is that of model.init, {init!r}; "
            "leave one of them out"
        )
    path = default_path() if init == "default" else Path(init)
    if path.is_dir():
        raise ConfigError(f"model.init is {init!r}, a folder; name a checkpoint, a .safetensors")
    return load_checkpoint(path)


def _load_encoder(encoder: Encoder, config: EncoderConfig) -> None:
    if config.weights != "default":
        load_backbone_weights(encoder, config)
        return
    default = load_checkpoint(default_path()).model.encoder
    if default.name != config.name:
        raise ConfigError(
            f"encoder.weights is 'default', the encoder in the package, and encoder.name "
            f"{config.name!r}; set encoder.name to {default.name!r}"
        )
    encoder.load_state_dict(default.state_dict())


def inherit(config: Config, source: Config) -> Config:
    """Return a run's config with the sizes of the checkpoint that it starts from.

    A size that the run's config leaves at its default is taken from the checkpoint. The run may
    change dropout and the size of photographs. Raises ``ConfigError`` where the run sets another
    size than the checkpoint's.
    """
    ours, theirs, default = _sizes(config), _sizes(source), _sizes(Config())
    changes = {
        key: ours[key] if key.endswith(_FREE) and ours[key] != default[key] else theirs[key]
        for key in theirs
    }
    for key, value in changes.items():
        if ours[key] not in (value, default[key]):
            raise ConfigError(
                f"{key} is {ours[key]!r}, but {value!r} in model.init; leave it out of the config"
            )
    values = to_dict(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        reduce(dict.__getitem__, sections, values)[name] = value
    return from_dict(Config, values)


def _sizes(config: Config) -> dict[str, Any]:
    """Return, by key, the settings that a run must share with the checkpoint it starts from."""
    model = to_dict(config.model)
    del model["init"]
    decoders = {f"model.{d}.{k}": v for d in ("caption", "tags") for k, v in model.pop(d).items()}
    pixels = {f"preprocessing.{k}": v for k, v in to_dict(config.preprocessing).items()}
    grid = {f"model.{key}": value for key, value in model.items()}
    return {"encoder.name": config.encoder.name} | pixels | grid | decoders


def extend_vocabulary(old: Vocabulary, new: Vocabulary) -> Vocabulary:
    """Return the old words with their ids, then the new words that are not among the old ones."""
    return Vocabulary([*old.words[len(SPECIAL) :], *_added(old, new)])


def _added(old: Vocabulary, new: Vocabulary) -> list[str]:
    return [word for word in new.words[len(SPECIAL) :] if word not in old]


def extend_tags(old: TagSet, new: TagSet) -> TagSet:
    """Return the old tags, then the new ones.

    The frequency of a tag is that in the new data, where the new data has the tag. A new tag with
    the stem of an old tag is not added, because a photograph gets only one tag of each stem.
    """
    names = old.vocabulary.words[len(SPECIAL) :]
    stems = {stem(name): name for name in reversed(names)}
    shares = dict(zip(names, old.frequencies, strict=True))
    for name, share in zip(new.vocabulary.words[len(SPECIAL) :], new.frequencies, strict=True):
        shares[name if name in shares else stems.get(stem(name), name)] = share
    return TagSet(list(shares), list(shares.values()))


def grow(source: Checkpoint, config: Config, words: Vocabulary, tags: TagSet) -> Checkpoint:
    """Return the source's checkpoint, extended by the words and tags that the source lacks.

    The weights of a new word begin as the mean of the old words' weights. The new word is then
    never the likeliest before training. Source: Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models" (2021).

    Args:
        source: The checkpoint that the run starts from.
        config: The run's config, with the source's sizes.
        words: The words of the run's captions.
        tags: The tags of the run's examples.

    Returns:
        A checkpoint whose old words and tags have the ids of the source.
    """
    words, tags = extend_vocabulary(source.vocabulary, words), extend_tags(source.tags, tags)
    model = build_model(config, words, tags)
    grown = dict(source.model.state_dict())
    for decoder in ("caption_decoder", "tag_decoder"):
        for rows in ("embedding.weight", "output.weight", "output.bias"):
            name = f"{decoder}.{rows}"
            grown[name] = _with_rows(grown[name], model.get_parameter(name).detach())
    model.load_state_dict(grown)
    return Checkpoint(model, config, words, tags)


def _with_rows(rows: Tensor, fresh: Tensor) -> Tensor:
    """Return the rows, then as many rows of their mean as ``fresh`` has more.

    The mean is over the rows of words, without the special tokens.
    """
    old = rows[len(SPECIAL) :]
    more = fresh[len(rows) :]
    return torch.cat([rows, old.mean(dim=0, keepdim=True).expand_as(more) if len(old) else more])
