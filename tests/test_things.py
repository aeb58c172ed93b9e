"""Whether what a caption names is what people said."""

import pytest

from captioner.data.things import names_right, things


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A man riding two horses on the beach .", {"person", "horse", "beach"}),
        ("Women and children are running through snow", {"person", "snow"}),
        ("a very large one", set()),
        ("", set()),
    ],
)
def test_things_are_nouns_in_the_singular(caption: str, named: set[str]) -> None:
    assert things(caption) == named


REFERENCES = [
    "a boy with a dog",
    "a child and his dog near a fence",
    "the dogs play",
    "grass",
    "a kid outside",
]


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a girl and a dog", True),  # persons are not told apart: three say one
        ("a dog at a fence", False),  # only one says fence
        ("a dog and a horse", False),
        ("running", False),  # names nothing
    ],
)
def test_a_caption_is_right_if_two_people_name_each_of_its_things(
    caption: str, right: bool
) -> None:
    assert names_right(caption, REFERENCES) is right


def test_of_one_reference_one_is_enough() -> None:
    assert names_right("a dog", REFERENCES[:1])
    assert not names_right("grass", REFERENCES[:1])


def test_without_references_nothing_can_be_said() -> None:
    with pytest.raises(ValueError, match="no references"):
        names_right("a dog", [])
