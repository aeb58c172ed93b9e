"""The first weights of a run: a backbone's, or a whole captioner's with rows for new words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.config import Config, DataConfig, EncoderConfig
from captioner.data.example import DataError, Example
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
    tags = _tags(data, examples)
    origin: dict[str, Any] = {}
    if config.model.init:
        source = _load_source(config)
        origin = {"source": source.provenance}
        if not (config.training.epochs or config.self_critical.epochs):
            words = source.vocabulary  # the captions' part learns nothing new
        if not data.tags:
            tags = extend_tags(source.tags, tags)
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


def _tags(data: DataConfig, examples: Sequence[Example]) -> TagSet:
    """Return the tags of a list, as far as an example has them, or those of the examples."""
    if not data.tags:
        return TagSet.build(examples, data.tag_size, data.tag_min_count)
    found = TagSet.read(Path(data.tags)).counted(examples)
    if not found.names:
        raise DataError(f"{data.tags}: no photograph of the training data has any of these tags")
    return found


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
    del model["init"], model["tag_head"]
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
    stems = {stem(name): name for name in reversed(old.names)}
    shares = dict(zip(old.names, old.frequencies, strict=True))
    forms = {name: [*((old.forms or {}).get(name) or [name])] for name in old.names}
    for name, share in zip(new.names, new.frequencies, strict=True):
        known = name if name in shares else stems.get(stem(name), name)
        shares[known] = share
        said = (new.forms or {}).get(name) or [name]
        forms[known] = list(dict.fromkeys([*forms.get(known, ()), *said]))
    return TagSet(list(shares), list(shares.values()), forms)


def grow(source: Checkpoint, config: Config, words: Vocabulary, tags: TagSet) -> Checkpoint:
    """Return a checkpoint with the source's weights, for words and tags that it may lack.

    The weights of a new word begin as the mean of the old words' weights. The new word is then
    never the likeliest before training. Source: Hewitt, "Initializing New Word Embeddings for
    Pretrained Language Models" (2021).

    Args:
        source: The checkpoint that the run starts from.
        config: The run's config, with the source's sizes.
        words: The words of the run's captions; those that the source lacks are added.
        tags: All tags of the result, also where the source has others.

    Returns:
        A checkpoint whose old words have the ids of the source.
    """
    words = extend_vocabulary(source.vocabulary, words)
    model = build_model(config, words, tags)
    # What the source has not, and it may have no tag head, begins at random weights.
    fresh = model.state_dict()
    grown = fresh | {n: t for n, t in source.model.state_dict().items() if n in fresh}
    vocabularies = {
        "caption_decoder": (source.vocabulary, words),
        "tag_decoder": (source.tags.vocabulary, tags.vocabulary),
        "tag_head": (source.tags.vocabulary, tags.vocabulary),
    }
    for part, (old, new) in vocabularies.items():
        for rows in ("embedding.weight", "output.weight", "output.bias"):
            name = f"{part}.{rows}"
            if name in source.model.state_dict() and name in grown:
                grown[name] = _moved(grown[name], old, new, model.get_parameter(name).detach())
    model.load_state_dict(grown)
    return Checkpoint(model, config, words, tags)


def _moved(rows: Tensor, old: Vocabulary, new: Vocabulary, fresh: Tensor) -> Tensor:
    """Return the rows of the new words: the old ones' where they are known, else their mean."""
    known = [word in old for word in new.words]
    moved = fresh.clone()
    if len(old) > len(SPECIAL):
        moved[:] = rows[len(SPECIAL) :].mean(dim=0)
    places = [old.encode([word])[0] for word in new.words if word in old]
    moved[torch.tensor(known)] = rows[torch.tensor(places)]
    return moved
