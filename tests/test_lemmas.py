"""Which words say which tag: captions of one photograph decide what a dictionary cannot."""

from __future__ import annotations

import pytest

from captioner.data.lemmas import joined, learn_forms, singular


def photographs(*texts: str, times: int = 6) -> list[list[list[str]]]:
    """Return photographs with captions as words, "/" between them and "." for no tag."""
    one = [[w if w != "." else "" for w in caption.split()] for caption in texts]
    return [one] * times


def names(*groups: list[list[list[str]]], labels: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return learn_forms([photo for group in groups for photo in group], labels, min_count=3)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("dogs", "dog"),
        ("men", "man"),
        ("children", "child"),
        ("held", "hold"),
        ("frisbees", "frisbee"),
        ("skateboarders", "skateboarder"),
    ],
)
def test_a_form_has_the_name_of_its_lemma(word: str, name: str) -> None:
    found = names(photographs(f"{word} .", f". {name}"))
    assert name in found
    assert set(found[name]) == {word, name}


def test_a_participle_is_its_verb_where_captions_agree() -> None:
    found = names(
        photographs("dog . running", "dog . runs", "dog . run"),
        photographs("building . street", "street . building", "building"),
        photographs("people . build", "people . build"),
    )
    assert set(found["run"]) == {"running", "runs", "run"}
    assert found["building"] == ["building"]
    assert found["build"] == ["build"]


def test_an_adjective_says_the_thing_that_others_say_instead() -> None:
    found = names(
        photographs("snowy hill", "snow . hill", ". snow"),
        photographs("dirty dog", "dirty dog", "dog"),
        photographs("dirt road", "dirt road"),
    )
    assert set(found["snow"]) == {"snow", "snowy"}
    assert found["dirty"] == ["dirty"]


def test_what_is_only_said_in_the_plural_is_called_so() -> None:
    found = names(photographs("man . shorts", "shorts"), photographs("two trees", "tree"))
    assert found["shorts"] == ["shorts"]
    assert set(found["tree"]) == {"tree", "trees"}


def test_adverbs_are_no_tags() -> None:
    assert names(photographs("dog quickly", "dog")) == {"dog": ["dog"]}


def test_words_that_stand_together_are_one_tag() -> None:
    others = [photographs(f"{w} .", f". {w}") for w in ("cat", "tree", "house", "boat", "car")]
    fixed = photographs(*["red . fire hydrant", "fire hydrant . street"] * 2, "hydrant")
    free = [photographs(f"brown . {w}", f"brown {w}", times=3) for w in ("cat", "tree", "dog")]
    found = names(fixed, *others, *free)
    # Nearly all hydrants stand in the compound, so that the word alone says it too.
    assert set(found["fire hydrant"]) == {"fire hydrant", "hydrant"}
    assert "fire" not in found
    assert not any(name.startswith("brown ") for name in found)


def test_a_kind_of_thing_says_the_thing_too() -> None:
    others = [photographs(f"{w} .", f". {w}", times=30) for w in ("cat", "tree", "house", "boat")]
    found = names(
        photographs("soccer ball", "ball", "ball . grass"),
        photographs("hot dog", "food", "hot dog . plate"),
        photographs("dog . grass", "dog", times=20),
        *others,
        labels=("hot dog", "soccer ball"),
    )
    assert "soccer ball" in found["ball"]
    assert found["hot dog"] == ["hot dog"]
    assert "hot dog" not in found["dog"]


def test_the_longest_run_of_words_that_is_known_stands_as_one() -> None:
    known = {"double decker bus", "decker bus", "bus"}
    text = ["red", "double", "decker", "bus", "", "decker", "bus"]
    assert joined(text, known, 3) == ["red", "double decker bus", "", "decker bus"]
    assert joined([], known, 3) == []


def test_the_last_word_is_put_into_the_singular() -> None:
    assert singular("traffic lights") == "traffic light"
    assert singular("tennis") == "tennis"
