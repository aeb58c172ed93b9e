"""XMP sidecars: captions and tags merged into what other programs wrote, byte for byte otherwise.

Source: Adobe's XMP Specification, part 1 (ISO 16684-1), sections 7 (serialization) and 8.3 (Dublin
Core).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape

__all__ = ["Merged", "XmpError", "is_captioners", "merge_xmp"]

_URIS = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "captioner": "urn:captioner:xmp:1.0/",
}
_RDF, _ABOUT, *_LISTS = (
    f"{_URIS['rdf']} {name}" for name in ("RDF", "Description", "Bag", "Seq", "Alt")
)
_CAPTION, _TAGS = "captioner:caption", "captioner:tags"
_DESCRIPTION, _SUBJECT = "dc:description", "dc:subject"
_PROPERTIES = {
    f"{_URIS[prefix]} {name}": f"{prefix}:{name}"
    for prefix, name in (p.split(":") for p in (_CAPTION, _TAGS, _DESCRIPTION, _SUBJECT))
}
_LANGUAGE = "http://www.w3.org/XML/1998/namespace lang"

_NEW = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="captioner">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()


class XmpError(ValueError):
    """A sidecar that nothing can be merged into; the message says why."""


class Merged(NamedTuple):
    """An XMP document with a caption and tags in it.

    Attributes:
        content: the document's bytes.
        kept: whether it has a default description that captioner did not write. That one stays,
            and the caption is in ``captioner:caption`` alone.
    """

    content: bytes
    kept: bool


def merge_xmp(content: bytes, caption: str | None, tags: Sequence[str] | None) -> Merged:
    """Put a caption and tags into an XMP document, and leave every other byte as it is.

    ``dc:description`` gets the caption as its default (``x-default``), ``dc:subject`` the tags that
    it does not have. ``captioner:caption`` and ``captioner:tags`` remember what of it is
    captioner's: the next merge replaces that, and never what a person or another program wrote. A
    tag that somebody took out of ``dc:subject`` stays out.

    Args:
        content: the document; empty bytes begin a new one.
        caption: the description to set; ``None`` leaves it as it is.
        tags: the tags to add; ``None`` leaves them as they are.

    Raises:
        XmpError: the content is not XMP, or has a form that nothing can be merged into.
    """
    words = None if caption is None else _clean(caption)
    names = None if tags is None else list(dict.fromkeys(map(_clean, tags)))
    text = _utf8(content or _NEW)
    merged = _Merging(text).merge(words, names)
    # A reader must find what was put there; a form that nobody thought of ends here.
    if _Merging(merged.content).merge(words, names) != merged:
        raise XmpError("its properties are written in a form that cannot be merged")
    return merged._replace(content=_encoded_like(content, merged.content))


def is_captioners(content: bytes) -> bool:
    """Return whether captioner has written into an XMP document before; raises ``XmpError``."""
    document = _Document(_utf8(content))
    return any(document.property(name) is not None for name in (_CAPTION, _TAGS))


def _clean(text: str) -> str:
    # XML has no way to write most control characters.
    return "".join(c for c in text if c.isprintable()).strip()


def _utf8(content: bytes) -> bytes:
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content
    try:
        return content.decode("utf-16").encode()
    except ValueError as error:
        raise XmpError(f"not UTF-16: {error}") from None


def _encoded_like(content: bytes, text: bytes) -> bytes:
    for mark, codec in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if content.startswith(mark):
            return mark + text.decode().encode(codec)
    return text


@dataclass(eq=False)
class _Element:
    """An element that may hold what captioner writes; places are byte offsets.

    ``inside`` is where its content begins, ``end`` where it ends; the two are one place in
    ``<an empty element/>``. ``first`` and ``last`` are where its first child begins and its last
    child ends, also of children that are not in ``children``.
    """

    name: str
    attributes: Mapping[str, str]
    outer: Mapping[str, str]  # prefixes that are declared around it
    prefixes: Mapping[str, str]  # and those that are declared inside it
    followed: bool
    start: int
    inside: int = -1
    end: int = -1
    first: int = -1
    last: int = -1
    parts: list[str] = field(default_factory=list)
    children: list[_Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The element's own text, without that of its children."""
        return "".join(self.parts).strip()


class _Document:
    """The places of the properties that captioner writes.

    No entities are expanded and none are fetched: a document type declaration is refused. Raises
    ``XmpError``.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._stack: list[_Element] = []
        self._declared: dict[str, str] = {}
        self._rdf: _Element | None = None
        self._properties: dict[str, _Element] = {}  # the first of a name
        self._parser = expat.ParserCreate("utf-8", " ")
        self._parse()
        if self._rdf is None:
            raise XmpError("not XMP: there is no rdf:RDF in it")
        self.rdf: _Element = self._rdf
        self.abouts: list[_Element] = self.rdf.children
        self._properties |= {
            _PROPERTIES[p.name]: p
            for about in reversed(self.abouts)
            for p in reversed(about.children)
        }

    def _parse(self) -> None:
        parser = self._parser
        parser.XmlDeclHandler = self._xml_declaration
        parser.StartDoctypeDeclHandler = self._document_type
        parser.StartNamespaceDeclHandler = self._namespace
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.DefaultHandler = self._begin_inside
        try:
            parser.Parse(self._content, True)
        except expat.ExpatError as error:
            raise XmpError(f"not XML: {error}") from None

    def property(self, name: str) -> _Element | None:
        """Return a property, such as ``dc:subject``, if it is there."""
        return self._properties.get(name)

    def items(self, name: str) -> list[_Element]:
        """Return the items of a property that is a list."""
        found = self.property(name)
        return found.children[0].children if found and found.children else []

    def texts(self, name: str) -> list[str]:
        """Return the texts of the items."""
        return [item.text for item in self.items(name)]

    def plain(self, name: str) -> str:
        """Return the text of a property that is no list but a text, or an attribute."""
        found = self.property(name)
        attributes = (pair for about in self.abouts for pair in about.attributes.items())
        texts = [value.strip() for key, value in attributes if _PROPERTIES.get(key) == name]
        return "".join([found.text if found else "", *texts])

    def _xml_declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if (encoding or "utf-8").lower() not in {"utf-8", "utf8", "us-ascii", "utf-16"}:
            raise XmpError(f"its encoding is {encoding}, and XMP is UTF-8 or UTF-16")

    def _document_type(self, *_: object) -> None:
        raise XmpError("it has a document type declaration, which XMP never has")

    def _namespace(self, prefix: str | None, uri: str | None) -> None:
        self._begin_inside()
        self._declared[prefix or ""] = uri or ""

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._begin_inside()
        start, parent = self._parser.CurrentByteIndex, self._stack[-1] if self._stack else None
        outer = parent.prefixes if parent else {}
        inner, self._declared = ({**outer, **self._declared} if self._declared else outer), {}
        element = _Element(name, attributes, outer, inner, self._is_followed(name), start)
        if self._rdf is None and element.followed and name == _RDF:
            self._rdf, self._rdf_depth = element, len(self._stack)
        if parent is not None:
            parent.first = start if parent.first < 0 else parent.first
            if element.followed:
                parent.children.append(element)
        self._stack.append(element)

    def _is_followed(self, name: str) -> bool:
        """Return whether the next element is, or may have in it, what captioner writes."""
        depth = len(self._stack)
        if depth == 0 or not self._stack[-1].followed:
            return depth == 0
        if self._rdf is None:
            return depth == 1 and name == _RDF
        below = depth - self._rdf_depth
        if below <= 2:
            return (below == 1 and name == _ABOUT) or (below == 2 and name in _PROPERTIES)
        if below == 3 and (name not in _LISTS or self._stack[-1].children):
            raise XmpError(f"its {_PROPERTIES[self._stack[-1].name]} is no list of texts")
        return True

    def _end(self, _: str) -> None:
        place, element = self._parser.CurrentByteIndex, self._stack.pop()
        if element.inside < 0 and self._content[place - 2 : place] == b"/>":
            element.inside = element.end = place
        else:
            element.inside = place if element.inside < 0 else element.inside
            element.end = self._content.index(b">", place) + 1
        if self._stack:
            self._stack[-1].last = element.end

    def _characters(self, text: str) -> None:
        self._begin_inside()
        if self._stack[-1].followed:
            self._stack[-1].parts.append(text)

    def _begin_inside(self, _: str = "") -> None:
        """Note where an element's content begins: at whatever comes first after its start tag."""
        if self._stack and self._stack[-1].inside < 0:
            self._stack[-1].inside = self._parser.CurrentByteIndex


class _Merging:
    """The changes that a document needs: bytes that are replaced, and properties that are new."""

    def __init__(self, content: bytes) -> None:
        self._content, self._document = content, _Document(content)
        self._edits: list[tuple[int, int, str]] = []  # from, to, and what stands there then
        self._new: list[tuple[str, Sequence[str]]] = []

    def merge(self, caption: str | None, tags: Sequence[str] | None) -> Merged:
        """Return the document with a caption and tags."""
        kept = False
        if caption is not None:
            kept = not self._set_description(caption)
            self._set(_CAPTION, [caption])
        if tags is not None:
            self._set(_TAGS, self._add_subjects(tags))
        self._add_properties()
        content = self._content
        for start, end, text in sorted(self._edits, reverse=True):
            content = content[:start] + text.encode() + content[end:]
        return Merged(content, kept)

    def _set_description(self, caption: str) -> bool:
        """Set the default description, unless it is another's; return whether it is the caption."""
        document = self._document
        if document.plain(_DESCRIPTION):
            return False
        items = document.items(_DESCRIPTION)
        defaults = [i for i in items if i.attributes.get(_LANGUAGE, "").lower() == "x-default"]
        if not items:
            self._set(_DESCRIPTION, [caption])
        elif not defaults:
            # The default is the first of the alternatives.
            text = _item(caption, _DESCRIPTION, items[0].outer)
            self._edits.append((items[0].start, items[0].start, text))
        elif defaults[0].text not in {"", caption, *document.texts(_CAPTION)}:
            return False
        elif defaults[0].text != caption:
            text = _item(caption, _DESCRIPTION, defaults[0].outer)
            self._edits.append((defaults[0].start, defaults[0].end, text))
        return True

    def _add_subjects(self, tags: Sequence[str]) -> list[str]:
        """Add tags to the subjects, take out those of an earlier run; return captioner's own."""
        if self._document.plain(_SUBJECT):
            raise XmpError("its dc:subject is no list of texts")
        there, earlier = self._document.texts(_SUBJECT), self._document.texts(_TAGS)
        items = self._document.items(_SUBJECT)
        added = [tag for tag in tags if tag not in there and tag not in earlier]
        if not items:
            self._set(_SUBJECT, added)
        for item in items:
            if item.text in earlier and item.text not in tags:
                self._edits.append((item.start - len(self._space_before(item)), item.end, ""))
        if items and added:
            space = self._space_before(items[0])
            text = "".join(space + _item(tag, _SUBJECT, items[0].outer) for tag in added)
            self._edits.append((items[-1].end, items[-1].end, text))
        return [tag for tag in tags if tag in earlier or tag not in there]

    def _set(self, name: str, texts: Sequence[str]) -> None:
        """Have a property hold a list of texts, and nothing else."""
        found = self._document.property(name)
        if found is None and (texts or name == _TAGS):
            self._new.append((name, texts))
        elif found is not None and self._document.texts(name) != texts:
            self._edits.append((found.start, found.end, _list(name, texts, found.outer)))

    def _add_properties(self) -> None:
        """Put the new properties into the description of the photograph."""
        if not self._new:
            return
        abouts = self._document.abouts
        with_dc = (about for about in abouts if about.prefixes.get("dc") == _URIS["dc"])
        parent = next(with_dc, abouts[0] if abouts else self._document.rdf)
        space = self._content[parent.inside : max(parent.first, parent.inside)].decode()
        space = space if space.isspace() else "\n   "
        text = "".join(space + _list(*property, parent.prefixes) for property in self._new)
        if parent is self._document.rdf:
            start = f'<rdf:Description{_declarations(parent.prefixes, "rdf")} rdf:about="">'
            text = f"\n  {start}{text}\n  </rdf:Description>"
        if parent.inside == parent.end:  # an empty element is opened
            tag = self._content[parent.start + 1 : parent.end].split(None, 1)[0].rstrip(b"/>")
            self._edits.append((parent.end - 2, parent.end, f">{text}\n  </{tag.decode()}>"))
        else:
            place = parent.last if parent.last >= 0 else parent.inside
            self._edits.append((place, place, text))

    def _space_before(self, element: _Element) -> str:
        before = self._content[: element.start]
        return before[len(before.rstrip(b" \t\r\n")) :].decode()


def _list(name: str, texts: Sequence[str], prefixes: Mapping[str, str]) -> str:
    """Return the element of a property that is a list."""
    declarations = _declarations(prefixes, name.split(":")[0], "rdf")
    kind = "Bag" if name in {_SUBJECT, _TAGS} else "Alt"
    items = "".join(_item(text, name, _URIS) for text in texts)
    return f"<{name}{declarations}><rdf:{kind}>{items}</rdf:{kind}></{name}>"


def _item(text: str, name: str, prefixes: Mapping[str, str]) -> str:
    """Return an item of a property's list."""
    language = "" if name in {_SUBJECT, _TAGS} else ' xml:lang="x-default"'
    return f"<rdf:li{_declarations(prefixes, 'rdf')}{language}>{escape(text)}</rdf:li>"


def _declarations(prefixes: Mapping[str, str], *needed: str) -> str:
    """Return the namespace declarations that an element needs where it comes to stand."""
    missing = (prefix for prefix in needed if prefixes.get(prefix) != _URIS[prefix])
    return "".join(f' xmlns:{prefix}="{_URIS[prefix]}"' for prefix in missing)
