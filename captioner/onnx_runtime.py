"""A captioner in an ONNX file: photographs to words by ONNX Runtime. No torch here.

>>> from captioner.onnx_runtime import load
>>> captioner = load("default.onnx")  # doctest: +SKIP
>>> captioner.caption(["dog.jpg"])[0].text  # doctest: +SKIP
'a dog runs along the beach'

``scripts/export.py`` makes such files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from captioner.config import Preprocessing
from captioner.data.calibration import TagScoring
from captioner.data.tokenizer import detokenize
from captioner.data.vocabulary import SPECIAL
from captioner.files import from_json
from captioner.generation.describer import Describer
from captioner.generation.description import Caption, NotFiniteError, Tag
from captioner.generation.options import SearchOptions, TagOptions
from captioner.generation.tag_choice import TagChoice
from captioner.photos.given import Pixels, pixels_of
from captioner.settings import ConfigError, from_dict

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["ImageLike", "OnnxCaptioner", "OnnxError", "load"]

Outputs = Mapping[str, np.ndarray[Any, Any]]
ImageLike = str | os.PathLike[str] | Image.Image | Pixels | bytes | BinaryIO

_FORMAT = "captioner onnx 1"
# The place in ONNX Runtime's own code that its errors begin with.
_CODE = re.compile(r"\S+\.(?:h|cc):\d+ .*?\) (?=[A-Z])")
_NEEDED = frozenset({"tokens", "lengths", "log_probs", "finished", "word_log_probs", "tag_scores"})


class OnnxError(ValueError):
    """A file that is no captioner in ONNX; the message names the file and what is wrong."""


@dataclass(frozen=True)
class _About:
    """What the metadata of a file say."""

    preprocessing: Preprocessing
    options: SearchOptions
    vocabulary: Sequence[str]
    tags: Sequence[str]
    choice: TagChoice
    encoder: str
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, text: str) -> _About:
        """Read them; any of the errors of :func:`load` for what makes no sense."""
        values = from_json(text)
        tags, scoring = _strings(values["tags"]), TagScoring.of(values["tag_scoring"])
        shares = [float(share) for share in values["tag_frequencies"]]
        if len(shares) != len(tags):
            raise ValueError(f"it has {len(shares)} frequencies of {len(tags)} tags")
        return cls(
            from_dict(Preprocessing, values["preprocessing"]),
            from_dict(SearchOptions, values["options"]),
            _strings(values["vocabulary"]),
            tags,
            TagChoice(tags, shares, [scoring] if scoring else []),
            str(values["encoder"]),
            dict(values["provenance"]),
        )


def _strings(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("its vocabulary is not a list of words")
    return values


def load(path: str | os.PathLike[str]) -> OnnxCaptioner:
    """Load a captioner from an ONNX file.

    Raises ``OnnxError`` for a file that is none, or that this ONNX Runtime cannot run, and
    ``ConfigError`` where ONNX Runtime is not installed.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read()
    except OSError as error:
        raise OnnxError(f"{name}: {error.strerror}") from None
    session = _session(name, content)
    stored = session.get_modelmeta().custom_metadata_map
    if stored.get("format") != _FORMAT:
        raise OnnxError(f"{name}: an ONNX file, but not one of captioner's")
    try:
        about = _About.of(stored["captioner"])
        _check_ends(session, about)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OnnxError(f"{name}: its metadata make no sense: {reason}") from error
    return OnnxCaptioner(session, about, name, content)


def _session(name: str, content: bytes) -> InferenceSession:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ConfigError("an ONNX file takes ONNX Runtime: pip install onnxruntime") from None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it warns of, nobody can change
    # The int8 weights become floats once, here, and not at every call.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no type in common
        reason = _CODE.sub("", " ".join(str(error).split()))[:300]
        version = onnxruntime.__version__
        raise OnnxError(f"{name}: ONNX Runtime {version} cannot run it: {reason}") from None


def _check_ends(session: InferenceSession, about: _About) -> None:
    """Raise ``ValueError`` where the graph does not take and give what it should."""
    size, tags = about.preprocessing.size, len(about.tags)
    inputs = {value.name: (value.type, value.shape[1:]) for value in session.get_inputs()}
    if inputs != {"pixels": ("tensor(uint8)", [3, size, size])}:
        raise ValueError(f"its inputs are {inputs}")
    outputs = {value.name: value.shape for value in session.get_outputs()}
    if missing := sorted(_NEEDED - outputs.keys()):
        raise ValueError(f"it gives no {missing[0]}")
    if outputs["tag_scores"][1:] != [tags]:
        raise ValueError(f"it scores {outputs['tag_scores'][1:]} tags, not {tags}")


class OnnxCaptioner(Describer[ImageLike]):
    """A model in an ONNX file that captions and tags images, as ``captioner.Captioner`` does.

    An image is a path, a ``PIL.Image.Image``, an ``(h, w, 3)`` uint8 array in RGB, the bytes of a
    file, or a file that is open in binary. Methods take a list of them and return a list, one entry
    an image, in order. They raise ``TypeError`` for a bare string or image, and ``ImageError``
    (with ``index`` and ``path``) for an image that cannot be read.

    The graph has the search inside, so its options are those of the file (:attr:`options`).
    """

    precision = "float32"

    def __init__(self, session: InferenceSession, about: _About, path: str, content: bytes) -> None:
        """Put a loaded file to use; :func:`load` is the way in."""
        self._session, self._about, self._path = session, about, path
        self._size, self._digest = len(content), hashlib.sha256(content).hexdigest()[:16]
        self._names = [output.name for output in session.get_outputs()]

    @property
    def options(self) -> SearchOptions:
        """How the graph searches."""
        return self._about.options

    @property
    def preprocessing(self) -> Preprocessing:
        """How photographs become pixels."""
        return self._about.preprocessing

    def about(self) -> dict[str, object]:
        """Return what ``captioner info`` shows."""
        size = self.preprocessing.size
        others = {
            f.name: getattr(self.options, f.name)
            for f in fields(self.options)
            if getattr(self.options, f.name) != f.default or f.name in {"beam_size", "max_words"}
        }
        return {
            "model": self._path,
            "size": f"{self._size:,} bytes",
            "encoder": self._about.encoder,
            "pixels": f"{size} x {size}, {self.preprocessing.fit}",
            "words": f"{len(self._about.vocabulary) - len(SPECIAL):,}",
            "tags": f"{len(self._about.tags):,}",
            "search": others,
            "device": "cpu",
            "precision": self.precision,
            **self._about.provenance,
        }

    def digest(self) -> str:
        """Return the start of the file's hash."""
        return self._digest

    def check(self, options: SearchOptions) -> None:
        """Raise ``ConfigError`` for an option that is neither the file's nor the default."""
        for option in fields(options):
            asked, fixed = getattr(options, option.name), getattr(self.options, option.name)
            if asked not in (fixed, option.default):
                raise ConfigError(
                    f"{option.name} is {asked!r}, but {self._path} searches with {fixed!r}; a file "
                    "cannot change that: export another with --set"
                )

    @property
    def tag_names(self) -> tuple[str, ...]:
        """The names of all T tags that the model knows."""
        return tuple(self._about.tags)

    def tag_scores(self, images: Iterable[ImageLike]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the probability of each of :attr:`tag_names` for each image: ``(B, T)``."""
        rows = [outputs["tag_scores"] for outputs in self._grids(images)]
        return np.concatenate([np.zeros((0, len(self.tag_names)), np.float32), *rows])

    def threshold_for(self, precision: float) -> float:
        """Return the lowest score whose tags had a precision, 0…1, on the validation photographs.

        Raises ``ConfigError`` where the model never reached it.
        """
        return self._about.choice.threshold(TagOptions(min_precision=precision))

    def pixels(self, image: ImageLike) -> Pixels:
        """Return an image as the pixels ``(3, h, w)`` that the graph takes.

        Raises ``UnreadableError`` for a file that cannot be read, ``TypeError`` or ``ValueError``
        for what is no image.
        """
        return pixels_of(image, self.preprocessing)

    def encode(self, pixels: Sequence[Pixels]) -> Outputs:
        """Return all that the graph gives for prepared pixels.

        Raises ``NotFiniteError`` where the weights are damaged.
        """
        found = self._session.run(self._names, {"pixels": np.stack(pixels)})
        outputs = dict(zip(self._names, found, strict=True))
        if not (np.isfinite(outputs["log_probs"][:, 0]) & _finite(outputs["tag_scores"])).all():
            raise NotFiniteError
        return outputs

    def captions_of(
        self,
        outputs: Outputs,
        options: SearchOptions | None = None,
        attention: bool = False,
        tag_scores: object = None,
    ) -> list[list[Caption]]:
        """Return the captions of each image of the outputs, best first, without a confidence."""
        if options is not None:
            self.check(options)
        there = outputs["log_probs"] > -np.inf
        return [
            [
                self._caption(outputs, (image, place), attention)
                for place in np.flatnonzero(there[image]).tolist()
            ]
            for image in range(len(there))
        ]

    def _caption(self, outputs: Outputs, at: tuple[int, int], attention: bool) -> Caption:
        length = int(outputs["lengths"][at])
        words = tuple(self._about.vocabulary[t] for t in outputs["tokens"][at][:length].tolist())
        looked = outputs.get("attention") if attention else None
        return Caption(
            detokenize(words),
            float(outputs["log_probs"][at]),
            words,
            tuple(outputs["word_log_probs"][at][:length].tolist()),
            bool(outputs["finished"][at]),
            attention=None if looked is None else looked[at][:length],
        )

    def check_tags(self, options: TagOptions) -> None:
        """Raise ``ConfigError`` if the options have tags or a precision that the model has not."""
        self._about.choice.check(options)

    def check_confidence(self, least: float) -> None:
        """Raise ``ConfigError`` for more than 0: a file gives captions no confidence yet."""
        if least > 0.0:
            raise ConfigError(
                f"min_confidence is {least}, but an ONNX file gives captions no confidence: take "
                "its checkpoint"
            )

    def scores_of(self, outputs: Outputs) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the scores ``(B, T)`` of all tags of each image of the outputs."""
        return outputs["tag_scores"]

    def tags_of(
        self, outputs: Outputs, options: TagOptions | None = None, tag_scores: object = None
    ) -> list[list[Tag]]:
        """Return the tags of each image of the outputs, best first."""
        return self._about.choice.choose(outputs["tag_scores"], options or TagOptions())


def _finite(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    finite: np.ndarray[Any, np.dtype[np.bool_]] = np.isfinite(scores).all(axis=1)
    return finite
