"""How an upload is read: in the processes, and with the errors, of a folder run. No torch here."""

from __future__ import annotations

from captioner.config import Preprocessing
from captioner.folder.describe import read_photograph
from captioner.photos.images import TooLargeError, UnreadableError

__all__ = ["read_upload", "too_large"]

# No photograph that was read begins with it (``read_photograph``).
_TOO_LARGE = b"\2"


def read_upload(preprocessing: Preprocessing, path: str) -> bytes:
    """Return what ``read_photograph`` does, or the reason why a picture has too many pixels.

    An error comes out of a process as a text alone, and the status of an answer depends on the
    kind of the error. Raises ``UnreadableError`` for all other errors.
    """
    try:
        return read_photograph(preprocessing, path)
    except TooLargeError as error:
        return _TOO_LARGE + str(error).encode()
    except UnreadableError as error:
        # Where the upload lies is nothing that a client should know.
        raise UnreadableError(str(error).replace(path, "the file")) from error


def too_large(image: bytes | UnreadableError) -> TooLargeError | None:
    """Return the error whose reason :func:`read_upload` returned, if it did."""
    if isinstance(image, bytes) and image.startswith(_TOO_LARGE):
        return TooLargeError(image[len(_TOO_LARGE) :].decode())
    return None
