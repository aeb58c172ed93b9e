"""Configs: every one loads and builds, and every mistake is named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from captioner.config import Config, DataSource, ExperimentalConfig, from_stored
from captioner.data.tags import TagSet
from captioner.data.vocabulary import Vocabulary
from captioner.generation.options import SearchOptions, meaning
from captioner.model.checkpoint import build_model
from captioner.settings import ConfigError, from_dict, load_config, to_dict

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    config = load_config(Config, path, ["encoder.weights=random"])
    assert from_dict(Config, to_dict(config)) == config
    build_model(config, Vocabulary(["a", "dog"]), TagSet(["dog"]))


def test_keys_of_earlier_versions_are_found_in_what_is_stored() -> None:
    stored = to_dict(Config())
    del stored["experimental"]
    stored["training"] |= {"own_words": 0.25, "attention_penalty": 1.0, "truncation": 5}
    stored["optimizer"] |= {"clip_value": 2.0, "plateau_patience": 3, "plateau_decay": 0.3}
    stored["self_critical"] |= {"bleu_weight": 0.5}
    before = json.loads(json.dumps(stored))
    expected = ExperimentalConfig(0.25, 1.0, 5, 2.0, 3, 0.3, 0.5)
    assert from_stored(stored) == replace(Config(), experimental=expected)
    assert json.loads(json.dumps(stored)) == before
    assert from_stored(to_dict(Config())) == Config()
    assert from_stored({"training": {"own_words": 0.0}}) == Config()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "expected a table of keys"),
        ({"training": 3}, "'training' is a table of keys, not 3"),
        ({"training": {"own_words": "x"}}, "'experimental.own_words' is 'x'"),
        ({"training": {"own_words": 1.0}, "experimental": 3}, "'experimental' is a table"),
        ({"training": {"epoch": 1}}, "unknown key 'training.epoch'"),
    ],
)
def test_what_is_stored_and_no_config_is_refused(stored: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_stored(stored)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[optimizer]\nlr = 0.5\n")
    overrides = ["data.images=a folder", "optimizer.lr=1e-4", "model.caption.attention=false"]
    config = load_config(Config, path, [*overrides, "data.split=2014", "data.captions='quoted'"])
    assert config.data.images == "a folder"
    assert (config.data.split, config.data.captions) == ("2014", "quoted")
    assert config.optimizer.lr == 1e-4
    assert config.model.caption.attention is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nlr = 1.0", "unknown key 'optimiser'; known here: data, "),
        ("[optimizer]\nrate = 1.0", "unknown key 'optimizer.rate'; known here: lr, "),
        ("[optimizer]\nlr = 'fast'", "'optimizer.lr' is 'fast'; it takes a value of type float"),
        (
            "experimental.attention_penalty = 1\nmodel.caption.attention = false",
            r"attention_penalty is 1\.0, but model\.caption\.attention is false",
        ),
        (
            "[optimizer]\nclip_value = 1.0",
            "unknown key 'optimizer.clip_value'; it is 'experimental.clip_value' now",
        ),
        ("[training]\nepochs = -1", r"training\.epochs is -1; it takes 0 to"),
        ("[model.tags]\nhidden = 0", r"model\.tags\.hidden is 0"),
        ("[preprocessing]\nstd = [0, 1, 1]", r"preprocessing\.std is \(0"),
        ("[training]\nepochs = true", "'training.epochs' is True"),
        ("[preprocessing]\nfit = 'stretch'", "it takes 'squash', 'crop'"),
        ("[preprocessing]\nmean = [1.0]", "it takes 3 values"),
        ("model = 3", "'model' is a table of keys, not 3"),
        ("[model", "cannot be read as TOML"),
        ("x = " + "[" * 200_000, "cannot be read as TOML: its brackets are nested too deeply"),
        ("training.epochs" + ".a" * 5_000 + " = 1", r"'training\.epochs' is {'a': {'a': .*\.\.\."),
        ("training.epochs = 0x" + "f" * 9_000, r"epochs is a number of 36,000 bits; it takes 0 to"),
        ("optimizer.lr = 1" + "0" * 400, r"'optimizer\.lr' is a number of .* bits; no float is so"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path)


def test_an_override_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"'training\.epochs' is '\[\["):
        load_config(Config, path, ["training.epochs=" + "[" * 200_000])


def test_a_config_saved_on_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf[optimizer]\r\nlr = 0.5\r\n")
    assert load_config(Config, path).optimizer.lr == 0.5


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[[data.sources]]\nimages = 'a'\nweight = 2\n[[data.sources]]\nsplit = 'x'\n")
    overrides = ["data.sources.1.images=b", "data.sources.0.captions=1", "data.val_images=c"]
    data = load_config(Config, path, overrides).data
    assert data.sources == (DataSource("a", "1", weight=2.0), DataSource("b", split="x"))
    assert data.val_images == "c"
    assert from_dict(Config, json.loads(json.dumps(to_dict(Config(data=data))))).data == data
    path.write_text("")
    data = load_config(Config, path, ["data.sources=[{images = 'a', weight = 0.5}]"]).data
    assert data.sources == (DataSource("a", weight=0.5),)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("[[data.sources]]\nweigth = 2", "", "unknown key 'data.sources.0.weigth'; known here: im"),
        ("[[data.sources]]\n[[data.sources]]\nweight = 0", "", r"data\.sources\.1\.weight is 0"),
        ("[[data.sources]]\nweight = nan", "", r"data\.sources\.0\.weight is nan"),
        ("[[data.sources]]\nsplit = 2", "", "'data.sources.0.split' is 2; it takes a value of"),
        ("[data]\nsources = 'a'", "", "'data.sources' is 'a'; it takes a list"),
        ("[data]\nsources = ['a']", "", "'data.sources.0' is a table of keys, not 'a'"),
        ("[data]\nimages = 'a'\n[[data.sources]]", "", "data.sources and images are both set"),
        ("[[data.sources]]", "data.split=a", "data.sources and split are both set; one source is"),
        ("[[data.sources]]", "data.sources.1.images=a", "'data.sources.1.images': the list has 1"),
        ("[[data.sources]]", "data.sources.first.images=a", "the list has 1 tables, from 0 on"),
        ("[[data.sources]]", "data.sources.0=a", "'0' is a table; set one of its keys"),
    ],
)
def test_mistakes_in_sources_are_named(
    tmp_path: Path, text: str, override: str, message: str
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Config, path, [override] if override else [])


def test_bad_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"section\.key=value, not 'lr'"):
        load_config(Config, path, ["lr"])
    with pytest.raises(ConfigError, match="unknown key 'nonsense'"):
        load_config(Config, path, ["nonsense.lr=1"])


def test_search_options_say_what_they_mean() -> None:
    for option in fields(SearchOptions):
        assert f"{option.name}: {meaning(option)}" in (SearchOptions.__doc__ or "")
    assert "beam_size: hypotheses kept at each step; 1 is greedy" in (SearchOptions.__doc__ or "")
    assert "length_penalty: power of the length" in (SearchOptions.__doc__ or "")
