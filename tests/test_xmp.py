"""XMP: what others wrote stays, byte for byte; captioner's own is known again."""

from __future__ import annotations

from random import Random
from xml.etree import ElementTree

import pytest

from captioner.folder.xmp import XmpError, is_captioners, merge_xmp

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
NAMES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "rdf": RDF,
    "captioner": "urn:captioner:xmp:1.0/",
}
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"

# As darktable writes it: one tag in two forms, edits in attributes, a line break in one of them.
DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:exif="http://ns.adobe.com/exif/1.0/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:darktable="http://darktable.sf.net/"
   exif:GPSLatitude="52,31.2N"
   xmp:Rating="4"
   darktable:xmp_version="5">
   <!-- what I did with it -->
   <darktable:history>
    <rdf:Seq>
     <rdf:li darktable:num="0" darktable:operation="exposure" darktable:params="00&#10;&gt;/>"/>
    </rdf:Seq>
   </darktable:history>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Oma</rdf:li>
     <rdf:li>dog</rdf:li>
    </rdf:Bag>
   </dc:subject>
   <lr:hierarchicalSubject><rdf:Bag><rdf:li>Familie|Oma</rdf:li></rdf:Bag></lr:hierarchicalSubject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""

# As Lightroom does: a packet, and a description in two languages, none of them the default.
LIGHTROOM = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0-c000 1.000000">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
   crs:Exposure2012="+0.35"/>
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="de">Omas Hund</rdf:li>
     <rdf:li xml:lang="fr"><![CDATA[le chien <de> mamie]]></rdf:li>
    </rdf:Alt>
   </dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
   \n<?xpacket end="w"?>"""

# Other prefixes, and no xmpmeta around it.
PREFIXES = (
    f'<r:RDF xmlns:r="{RDF}"><r:Description r:about="" xmlns:d="{NAMES["dc"]}" '
    'xmlns:dc="urn:else" dc:x="/>"><d:subject><r:Seq><r:li>Oma</r:li></r:Seq></d:subject>'
    "</r:Description></r:RDF>"
)
EMPTY = f'<rdf:RDF xmlns:rdf="{RDF}"/>'
EMPTY_ABOUT = f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description q=">" rdf:about="" /></rdf:RDF>'
EMPTY_LISTS = (
    f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:dc="{NAMES["dc"]}">'
    "<dc:description><rdf:Alt/></dc:description><dc:subject/></rdf:Description></rdf:RDF>"
)
DOCUMENTS = [DARKTABLE, LIGHTROOM, PREFIXES, EMPTY, EMPTY_ABOUT, EMPTY_LISTS]


def texts(content: bytes, name: str) -> list[str | None]:
    """Return the items of a property, as another reader of XML finds them."""
    tree = ElementTree.fromstring(content)
    return [item.text for item in tree.findall(f".//rdf:Description/{name}/*/rdf:li", NAMES)]


def default(content: bytes) -> list[str | None]:
    tree = ElementTree.fromstring(content)
    items = tree.findall(".//dc:description/rdf:Alt/rdf:li", NAMES)
    return [item.text for item in items if item.get(LANGUAGE) == "x-default"]


def remains_of(before: bytes, after: bytes) -> bytes:
    """Return what is left of a text when as much of another as possible is taken out in order."""
    place = 0
    for byte in after:
        place += place < len(before) and before[place] == byte
    return before[place:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_others_wrote_stays_byte_for_byte(document: str) -> None:
    before = document.encode()
    merged, kept = merge_xmp(before, "a dog & <cat> ]]>", ["dog", "run", "grass"])
    assert default(merged) == ["a dog & <cat> ]]>"]
    assert not kept
    own = [tag for tag in ("dog", "run", "grass") if f">{tag}<" not in document]
    others = [tag for tag in ("Oma", "dog") if f">{tag}<" in document]
    assert texts(merged, "dc:subject") == [*others, *own]
    assert texts(merged, "captioner:tags") == own
    if document in (DARKTABLE, LIGHTROOM, PREFIXES):
        assert remains_of(before, merged) == b""
    # And again is no change at all.
    assert merge_xmp(merged, "a dog & <cat> ]]>", ["dog", "run", "grass"]).content == merged
    assert is_captioners(merged)
    assert not is_captioners(before)


def test_other_languages_stay() -> None:
    merged = merge_xmp(LIGHTROOM.encode(), "a dog", None).content
    assert texts(merged, "dc:description") == ["a dog", "Omas Hund", "le chien <de> mamie"]
    assert merged.decode().endswith('</x:xmpmeta>\n   \n<?xpacket end="w"?>')
    assert b"<![CDATA[le chien <de> mamie]]>" in merged


def test_a_description_by_another_is_kept() -> None:
    line = '<rdf:li xml:lang="x-default">Oma wird 80</rdf:li>'
    by_another = LIGHTROOM.replace('<rdf:li xml:lang="de">Omas Hund</rdf:li>', line).encode()
    merged, kept = merge_xmp(by_another, "a woman", ["woman"])
    assert kept
    assert default(merged) == ["Oma wird 80"]
    assert texts(merged, "captioner:caption") == ["a woman"]
    assert texts(merged, "dc:subject") == ["woman"]
    for plain in ("<dc:description>Oma wird 80</dc:description>", ""):
        attribute = "" if plain else f'xmlns:dc="{NAMES["dc"]}" dc:description="Oma wird 80"'
        document = EMPTY_LISTS.replace("<dc:description><rdf:Alt/></dc:description>", plain)
        document = (
            document.replace(f'xmlns:dc="{NAMES["dc"]}"', attribute) if attribute else document
        )
        merged, kept = merge_xmp(document.encode(), "a woman", None)
        assert kept
        assert b"Oma wird 80" in merged
        assert texts(merged, "captioner:caption") == ["a woman"]


def test_a_later_run_replaces_what_captioner_wrote_and_nothing_else() -> None:
    first = merge_xmp(DARKTABLE.encode(), "a dog", ["dog", "run", "grass"]).content
    # A person takes one tag out, and adds one.
    edited = first.replace(b"<rdf:li>run</rdf:li>", b"<rdf:li>Berlin</rdf:li>", 1)
    again = merge_xmp(edited, "a dog", ["dog", "run", "grass"]).content
    assert again == edited
    second, kept = merge_xmp(edited, "a cat", ["cat", "run", "dog"])
    assert not kept
    assert default(second) == ["a cat"]
    assert texts(second, "dc:subject") == ["Oma", "dog", "Berlin", "cat"]
    assert remains_of(DARKTABLE.encode(), second) == b""
    # Or writes a better caption.
    better = second.replace(b">a cat</rdf:li></rdf:Alt></dc:", b">Minka</rdf:li></rdf:Alt></dc:")
    third, kept = merge_xmp(better, "a dog", ["dog"])
    assert kept
    assert default(third) == ["Minka"]
    assert texts(third, "dc:subject") == ["Oma", "dog", "Berlin"]
    assert texts(third, "captioner:tags") == []
    # What is not asked for stays.
    assert merge_xmp(third, None, None).content == third


def test_a_new_document() -> None:
    merged, kept = merge_xmp(b"", "a dog\x00\x1b", ["dog", "dog", "run"])
    assert (default(merged), texts(merged, "dc:subject"), kept) == (
        ["a dog"],
        ["dog", "run"],
        False,
    )
    assert merged.startswith('<?xpacket begin="\ufeff"'.encode())
    tags = merge_xmp(b"", None, ["dog"]).content
    assert (default(tags), texts(tags, "dc:subject")) == ([], ["dog"])
    assert is_captioners(tags)
    assert is_captioners(merge_xmp(b"", None, []).content)


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_the_encoding_stays(codec: str) -> None:
    mark = "" if codec == "utf-8-sig" else "\ufeff"
    declared = DARKTABLE.replace("UTF-8", "UTF-16") if mark else DARKTABLE
    before = f"{mark}{declared}".encode(codec)
    merged = merge_xmp(before, "ein schöner Hund 🐕", ["Straße"]).content
    assert merged.startswith(before[:60])
    assert texts(merged, "dc:subject") == ["Oma", "dog", "Straße"]
    assert default(merged) == ["ein schöner Hund 🐕"]


LAUGHS = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>
"""
STRUCTURE = "<dc:subject><rdf:Description><dc:x>1</dc:x></rdf:Description></dc:subject>"


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("mine", "not XML: "),
        (DARKTABLE[:-20], "not XML: "),
        (f"{DARKTABLE}<x/>", "not XML: "),
        ("<html/>", "no rdf:RDF"),
        (DARKTABLE.replace("UTF-8", "ISO-8859-1"), "its encoding is ISO-8859-1"),
        (LAUGHS + EMPTY.replace("/>", ">&b;</rdf:RDF>"), "document type declaration"),
        (OUTSIDE + EMPTY.replace("/>", ">&a;</rdf:RDF>"), "document type declaration"),
        (EMPTY_LISTS.replace("<dc:subject/>", "<dc:subject>Oma</dc:subject>"), "dc:subject is no"),
        (EMPTY_LISTS.replace("<dc:subject/>", STRUCTURE), "dc:subject is no list"),
        (EMPTY.replace("/>", ">" + "<a>" * 20_000), "not XML: "),
    ],
)
def test_what_cannot_be_merged_into(document: str, why: str) -> None:
    with pytest.raises(XmpError, match=why):
        merge_xmp(document.encode(), "a dog", ["dog"])


def test_elements_may_be_nested_deeply() -> None:
    deep = EMPTY.replace("/>", ">" + "<a>" * 10_000 + "</a>" * 10_000 + "</rdf:RDF>")
    assert default(merge_xmp(deep.encode(), "a dog", []).content) == ["a dog"]


def test_damage_is_an_error_or_is_kept() -> None:
    random, outcomes = Random(0), set()
    for document in (DARKTABLE, LIGHTROOM, PREFIXES):
        before = document.encode()
        for _ in range(700):
            place = random.randrange(len(before))
            flipped = before[place] ^ (1 << random.randrange(8))
            damaged = before[:place] + bytes([flipped]) + before[place + 1 :]
            try:
                merged, _ = merge_xmp(damaged, "a dog", ["grass"])
            except XmpError:
                outcomes.add("refused")
            else:
                outcomes.add("merged")
                assert remains_of(damaged, merged) == b""
                assert b">grass</" in merged
    assert outcomes == {"refused", "merged"}
