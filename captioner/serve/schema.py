"""What requests and answers look like: query parameters from ``SearchOptions``, and models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field as Option
from dataclasses import fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

from fastapi import HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from captioner.flags import flag_of
from captioner.generation.options import SearchOptions, TagOptions, meaning
from captioner.serve.batches import Asked
from captioner.serve.uploads import FIELD
from captioner.settings import ConfigError

__all__ = ["BODY", "Health", "Problem", "Records", "asked", "parameter_of"]

BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "photographs; a name is only repeated in its record",
                    }
                },
            }
        }
    },
}
"""The body of a request, for the documentation."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OneCaption(_Model):
    """One caption, and the natural logarithm of its probability."""

    text: str
    log_prob: float
    confidence: float | None = Field(None, description="the probability that it is right")
    finished: bool = Field(True, description="false where nothing satisfies the options")


class OneTag(_Model):
    """One tag, and the probability that a person's caption uses it."""

    name: str
    score: float


class OneRecord(_Model):
    """What is said of a photograph, or the error that says why it could not be read."""

    image: str = Field(description="the name that came with the photograph")
    error: str | None = None
    caption: str | None = Field(None, description="null where it is below min_confidence")
    log_prob: float | None = None
    confidence: float | None = None
    captions: list[OneCaption] | None = Field(None, description="best first")
    tags: list[OneTag] | None = Field(None, description="best first")
    truncated: bool = Field(False, description="the file breaks off; up to a tenth is missing")


class Records(_Model):
    """One record for each photograph, in the order in which they came."""

    records: list[OneRecord]


class Problem(_Model):
    """Why a request was refused; the records are there if its photographs were the reason."""

    detail: str
    records: list[OneRecord] | None = None


class Health(_Model):
    """That the server answers, and how full its queue is."""

    status: str
    version: str
    waiting: int = Field(description="photographs that are being received or described")
    queue: int = Field(description="how many may be, at most")
    max_upload: int = Field(description="the largest request, in bytes")
    token: bool = Field(description="whether a token is needed")


def asked(
    request: Request, captions: bool, tags: bool, min_confidence: float, **options: Any
) -> Asked:
    """Return what a request's query asks for; FastAPI gives the parameters (``_parameters``)."""
    known = {"captions", "tags", "min_confidence", *options}
    unknown = sorted(request.query_params.keys() - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise HTTPException(422, f"unknown option {unknown[0]!r}; there are {names}")
    if not (captions or tags):
        raise HTTPException(422, "neither captions nor tags are asked for")
    search, chosen = (
        {field.name: options[parameter_of(field)] for field in fields(kind)}
        for kind in (SearchOptions, TagOptions)
    )
    try:
        return Asked(
            SearchOptions(**search) if captions else None,
            TagOptions(**chosen) if tags else None,
            min_confidence,
        )
    except ConfigError as error:
        raise HTTPException(422, str(error)) from None


def parameter_of(option: Option[Any]) -> str:
    """Return the parameter of an option: its flag on the command line, spelled with ``_``."""
    return flag_of(option).removeprefix("--").replace("-", "_")


def _parameters() -> Iterator[Parameter]:
    def parameter(name: str, default: Any, annotation: Any) -> Parameter:
        kind = Parameter.KEYWORD_ONLY
        return Parameter(name, kind, default=default, annotation=annotation)

    yield parameter("request", Parameter.empty, Request)
    yield parameter("captions", True, Annotated[bool, Query(description="write captions")])
    yield parameter("tags", True, Annotated[bool, Query(description="write tags")])
    share = Query(description="leave out captions less probably right than this", ge=0, le=1)
    yield parameter("min_confidence", 0.0, Annotated[float, share])
    for kind in (SearchOptions, TagOptions):
        hints = get_type_hints(kind)
        for option in fields(kind):
            several = isinstance(option.default, tuple)
            query = Query(
                description=meaning(option),
                ge=option.metadata.get("low"),
                le=option.metadata.get("high"),
            )
            hint = list[str] if several else hints[option.name]
            default = [] if several else option.default
            yield parameter(parameter_of(option), default, Annotated[hint, query])


# FastAPI reads the parameters of a request, and what it says of them, from here.
asked.__signature__ = Signature(list(_parameters()))  # type: ignore[attr-defined]
