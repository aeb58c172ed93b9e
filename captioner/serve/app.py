"""The application: its routes, who may use them, and what it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from importlib.resources import files
from math import ceil
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captioner.files import Record, as_json
from captioner.serve.batches import Answer, Asked, Batches
from captioner.serve.schema import BODY, Health, Problem, Records, asked
from captioner.serve.uploads import Folder, received, until_gone
from captioner.settings import ConfigError
from captioner.version import __version__

__all__ = ["Limits", "build_app"]

_BEARER = HTTPBearer(auto_error=False, description="the server's token")
_LOG = logging.getLogger(__name__)

_PAGE = {
    "/": ("serve.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/serve.css": ("serve.css", "text/css"),
    "/serve.js": ("serve.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# The page of the documentation is Swagger's, which has a script and styles inline.
_DOCS_POLICY = _POLICY.replace("-src 'self';", "-src 'self' 'unsafe-inline';", 2)
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_DESCRIPTION = """Says what is on photographs, in words and in tags.

`POST /v1/describe` takes files in the field `images`; the options of a search are parameters. A
photograph that cannot be read has a record with `error`, and costs no other."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
        queue: how many photographs are received or described at a time, at most.
        upload: the largest body of a request, in bytes.
        token: the token that a request must bring, if there is one.
        hosts: the names under which the server may be asked; all if there are none.

    """

    queue: int = 128
    upload: int = 50_000_000
    token: str | None = None
    hosts: Sequence[str] = ()


def build_app(batches: Batches, folder: Folder, limits: Limits) -> FastAPI:
    """Return the application over a model and a folder that are ready, and stay so."""
    app = FastAPIOffline(
        "/docs", None, title="captioner", version=__version__, description=_DESCRIPTION
    )
    service = _Service(batches, folder, limits)
    needs = [Depends(service.check_token)] if limits.token is not None else []
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": description}
        for status, description in {
            401: "no token, or a wrong one",
            413: "too many bytes, photographs or pixels",
            422: "an unknown option, or no photograph that can be read",
            503: "the queue is full; `Retry-After` says when to come again",
        }.items()
    }
    app.post(
        "/v1/describe",
        summary="Describe photographs",
        response_model=Records,
        responses=problems,
        openapi_extra={"requestBody": BODY},
        dependencies=[Depends(_check_origin), *needs],
    )(service.describe)
    app.get("/health", summary="Whether the server answers", response_model=Health)(service.health)
    for path, (name, kind) in _PAGE.items():
        content = files("captioner").joinpath("page", name).read_bytes()
        app.get(path, include_in_schema=False)(_constant(content, kind))
    app.exception_handler(RequestValidationError)(_invalid)
    if limits.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=limits.hosts, www_redirect=False)
    app.add_middleware(_Headers)
    return app


class _Service:
    """The answers to requests, and how many photographs there is room for."""

    def __init__(self, batches: Batches, folder: Folder, limits: Limits) -> None:
        self._batches, self._folder, self._limits = batches, folder, limits
        self._held = 0

    async def check_token(
        self,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        """Refuse a request without the token; how long that takes says nothing about the token."""
        token = (self._limits.token or "").encode()
        if given is None or not compare_digest(given.credentials.encode(), token):
            headers = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "a token is needed: Authorization: Bearer TOKEN", headers)

    async def health(self) -> Response:
        """Say that the server answers."""
        limits = self._limits
        return _json(
            {
                "status": "ok",
                "version": __version__,
                "waiting": self._held,
                "queue": limits.queue,
                "max_upload": limits.upload,
                "token": limits.token is not None,
            }
        )

    async def describe(self, request: Request, asked: Annotated[Asked, Depends(asked)]) -> Response:
        """Caption and tag photographs; those that arrive together are described together."""
        try:
            self._batches.check(asked)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from None
        # A place is taken before the body is received, or bodies without end would fill the disk.
        held = self._hold(1)
        try:
            async with received(request, self._limits.upload, self._limits.queue) as uploads:
                held += self._hold(len(uploads) - 1)
                answers = await self._answers(request, uploads, asked)
        except ClientDisconnect:
            answers = None
        except OSError as error:
            why = error.strerror or error
            raise HTTPException(507, f"an upload cannot be kept for now: {why}") from error
        finally:
            self._held -= held
        if answers is None:
            return Response(status_code=400)  # which nobody receives
        names = [upload.filename or "" for upload in uploads]
        return _response(
            [{"image": name} | answer.record for name, answer in zip(names, answers, strict=True)],
            all(answer.too_large for answer in answers),
        )

    def _hold(self, count: int) -> int:
        """Take places for photographs, or refuse them; return how many."""
        if self._held + count > self._limits.queue:
            wait = min(60, max(1, ceil(self._held * self._batches.seconds)))
            text = f"{self._held} photographs are waiting; come again in {wait} s"
            raise HTTPException(503, text, {"Retry-After": str(wait)})
        self._held += count
        return count

    async def _answers(
        self, request: Request, uploads: Sequence[UploadFile], asked: Asked
    ) -> Sequence[Answer] | None:
        """Have photographs described; ``None`` if the client goes before that."""
        answers: list[asyncio.Future[Answer]] = []
        try:
            for upload in uploads:
                path = await self._folder.keep(upload)
                answers.append(asyncio.wrap_future(self._batches.submit(path, asked)))
            try:
                return await until_gone(request.receive, asyncio.gather(*answers))
            except Exception as error:
                _LOG.exception("photographs could not be described")
                raise HTTPException(500, f"the model failed: {error}") from error
        finally:
            for answer in answers:
                answer.cancel()


def _response(records: list[Record], too_large: bool) -> Response:
    """Return the records; no photograph that can be read is an error."""
    errors = [record["error"] for record in records if "error" in record]
    if len(errors) < len(records):
        return _json({"records": records})
    first = f"none of {len(records)} photographs can be read; the first: " if errors[1:] else ""
    status = 413 if too_large else 422
    return _json({"detail": f"{first}{errors[0]}", "records": records}, status)


def _json(value: object, status: int = 200) -> Response:
    return Response(as_json(value) + b"\n", status, media_type="application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    """Say what is wrong with parameters in one line, as all other errors are said."""
    assert isinstance(error, RequestValidationError)
    said = "; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors())
    return _json({"detail": said}, 422)


async def _check_origin(
    sec_fetch_site: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> None:
    """Refuse what a page of another site sends from a visitor's browser."""
    if sec_fetch_site in ("cross-site", "same-site"):
        raise HTTPException(403, "a page of another site may not ask this server")


def _constant(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


class _Headers:
    """Gives every answer the headers that keep it to itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = _DOCS_POLICY if scope["path"] == "/docs" else _POLICY
                headers = MutableHeaders(scope=message)
                headers.update({**_HEADERS, "Content-Security-Policy": policy})
            await send(message)

        await self._app(scope, receive, sending)
