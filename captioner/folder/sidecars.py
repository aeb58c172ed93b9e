"""Files beside the photographs: captions for trainers, XMP for photo managers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from xml.sax.saxutils import escape

from captioner.files import Record
from captioner.folder.outputs import tag_list

__all__ = ["SIDECARS", "Sidecars", "sidecar_path"]

SIDECARS = ("txt", "caption", "xmp")
"""The kinds of sidecars."""

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="captioner">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
{}  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def sidecar_path(image: str, kind: str) -> str:
    """Return where a photograph's sidecar lies.

    Trainers look for ``dog.txt`` and ``dog.caption``, photo managers for ``dog.jpg.xmp``.
    """
    return f"{image if kind == 'xmp' else os.path.splitext(image)[0]}.{kind}"


class Sidecars:
    """A file beside each photograph, of a kind in ``SIDECARS``.

    "txt" and "caption" hold the caption, or the tags with commas between where there is no
    caption; "xmp" holds both as Dublin Core. A file that exists is left alone, and counted in
    ``left_alone``, unless ``overwrite``.
    """

    def __init__(self, kind: str, overwrite: bool) -> None:
        """Choose the kind."""
        self._kind, self._overwrite = kind, overwrite
        self.left_alone = 0

    def exists(self, image: str) -> bool:
        """Whether a photograph has its sidecar, and not an empty one."""
        try:
            return os.stat(sidecar_path(image, self._kind)).st_size > 0
        except OSError:
            return False

    def write(self, record: Record) -> Record:
        """Write a record's sidecar; return the record, or an error record if that failed.

        A full disk is an ``OSError``.
        """
        if "error" in record:
            return record
        path = sidecar_path(record["image"], self._kind)
        try:
            self._write(path, self._content(record).encode("utf-8", "backslashreplace"))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise
            why = f"cannot write {os.path.basename(path)}: {error.strerror}"
            return {"image": record["image"], "error": why}
        return record

    def _write(self, path: str, content: bytes) -> None:
        if os.path.lexists(path) and not self._overwrite:
            with open(path, "rb") as file:
                if (there := file.read(len(content) + 1)) != content:
                    self.left_alone += there != b""
                if there:
                    return
        temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}.captioner.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _content(self, record: Record) -> str:
        if self._kind == "xmp":
            return _xmp(record)
        return f"{record['caption'] if 'caption' in record else tag_list(record)}\n"


def _xmp(record: Record) -> str:
    parts = ""
    if "caption" in record:
        item = f'<rdf:li xml:lang="x-default">{_xml(record["caption"])}</rdf:li>'
        parts += f"   <dc:description><rdf:Alt>{item}</rdf:Alt></dc:description>\n"
    if names := [tag["name"] for tag in record.get("tags", ())]:
        items = "".join(f"<rdf:li>{_xml(name)}</rdf:li>" for name in names)
        parts += f"   <dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>\n"
    return _XMP.format(parts)


def _xml(text: str) -> str:
    # XML has no way to write most control characters.
    return escape("".join(c for c in text if c.isprintable()))
