"""Texts that come from elsewhere: lists of paths from Windows, JSON of any shape."""

from __future__ import annotations

import pytest

from captioner.files import from_json, listed_paths

NAMES = ["a.jpg", "b c.jpg", "\u00e4.jpg"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "newline"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_any_system_are_read(newline: str, end: str, encoding: str) -> None:
    text = newline.join(NAMES) + (newline if end else "")
    assert listed_paths(text.encode(encoding), "\n") == NAMES


def test_names_that_only_look_like_windows_survive() -> None:
    assert listed_paths(b"a\r\nb\nc\r", "\n") == ["a\r", "b", "c\r"]
    assert listed_paths(b"a\n\nb\r", "\0") == ["a\n\nb\r"]
    assert listed_paths(b"\xff.jpg\0b\0", "\0") == ["\udcff.jpg", "b"]
    assert listed_paths(b"\xfe.jpg\n", "\n") == ["\udcfe.jpg"]


def test_utf16_without_its_mark_is_named() -> None:
    with pytest.raises(ValueError, match="UTF-16 without a byte order mark"):
        listed_paths("a.jpg\r\n".encode("utf-16-le"), "\n")


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff", b"", "nonsense"])
def test_what_is_no_json_is_a_value_error(content: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(content)
