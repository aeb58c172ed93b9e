"""The server and its page: what is answered, refused, cancelled, and finished at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from processes import captioner as run_captioner
from processes import end, start
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from captioner.cli import main
from captioner.files import Record
from captioner.flags import parse
from captioner.folder import describe_folder
from captioner.generation.options import SearchOptions, TagOptions
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint
from captioner.photos.images import UnreadableError
from captioner.serve import batches as batches_module
from captioner.serve import uploads
from captioner.serve.app import Limits, build_app
from captioner.serve.batches import Asked, Batches
from captioner.serve.reading import read_upload
from captioner.serve.schema import Records, parameter_of
from captioner.serve.server import listen
from captioner.serve.uploads import private_folder
from conftest import COLOURS, draw_picture

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "../../../../etc/passwd",
    "C:\\secret\\a.png",
    "{{ 7 * 7 }}.png",
    "\u202egnp.exe",
    "café ☃.png",
    "a" * 300 + ".png",
]
COMMANDS = ("caption", "tag", "find", "info", "serve")
OPTIONS = {"beam_size": 2, "num_captions": 2, "no_repeat": 1}


@pytest.fixture(scope="module")
def model_in_use(small: Checkpoint) -> Captioner:
    return Captioner(small)


class Live(NamedTuple):
    """A server that is asked over a socket."""

    url: str
    port: int
    folder: Path
    client: httpx.Client


@contextmanager
def alive(captioner: Captioner, **limits: Any) -> Iterator[Live]:
    with (
        listen("127.0.0.1", 0) as listening,
        private_folder() as folder,
        Batches(captioner) as batches,
    ):
        port = listening.getsockname()[1]
        app = build_app(batches, folder, Limits(**limits))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, timeout=60.0) as client:
                yield Live(url, port, Path(folder.path), client)
        finally:
            server.should_exit = True
            thread.join(60.0)
        assert not thread.is_alive()


@pytest.fixture
def served(model_in_use: Captioner) -> Iterator[Callable[..., httpx.Client]]:
    """Return a function that makes a client of a server with limits."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(alive(model_in_use, **limits)).client


@pytest.fixture
def client(served: Callable[..., httpx.Client]) -> httpx.Client:
    return served()


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    return draw_picture(tmp_path / "dog.png", "red").read_bytes()


Form = list[tuple[str, tuple[str, bytes]]]


def form(*photographs: tuple[str, bytes]) -> Form:
    return [("images", photograph) for photograph in photographs]


def as_shown(name: str) -> str:
    """Return the name in a record: of a path of Windows, which browsers once sent, the end."""
    return name.rpartition("\\")[2]


class Model:
    """Stands for the model: waits until it may answer, and keeps what it was given."""

    def __init__(self, record: Record) -> None:
        self.may, self.begun = threading.Event(), threading.Semaphore(0)
        self.sizes: list[int] = []
        self._record = record

    def __call__(self, captioner: Captioner, images: Sequence[bytes], *_: Any, **__: Any) -> Any:
        self.sizes.append(len(images))
        self.begun.release()
        assert self.may.wait(60.0)
        return [dict(self._record) for _ in images]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """Put a model in place that waits until the test lets it go on."""
    model = Model(
        {"caption": "a dog", "log_prob": -1.0, "confidence": 0.7, "captions": [], "tags": []}
    )
    monkeypatch.setattr(batches_module, "describe_read", model)
    yield model
    model.may.set()


def eventually(holds: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def waiting(client: httpx.Client) -> int:
    return int(client.get("/health").json()["waiting"])


def test_answers_are_the_records_of_a_folder_run(
    client: httpx.Client, model_in_use: Captioner, photographs: Path
) -> None:
    names = sorted(p.name for p in photographs.iterdir() if p.is_file() and p.suffix != ".txt")
    options = SearchOptions(**OPTIONS)  # type: ignore[arg-type]
    tag_options = TagOptions(threshold=0.0, max_tags=2)
    paths = [str(photographs / name) for name in names]
    expected = [
        {**record, "image": os.path.basename(record["image"])}
        for record in describe_folder(model_in_use, paths, options=options, tag_options=tag_options)
    ]
    assert len(expected) == 7
    assert sum("error" in record for record in expected) == 3
    answer = client.post(
        "/v1/describe",
        params=OPTIONS | {"threshold": 0, "max_tags": 2},
        files=form(*((name, (photographs / name).read_bytes()) for name in names)),
    )
    assert answer.status_code == 200
    assert answer.json() == {"records": expected}
    Records.model_validate(answer.json())


def test_captions_or_tags_alone(client: httpx.Client, picture: bytes) -> None:
    for query, keys in (
        ({"captions": "false"}, {"image", "tags"}),
        ({"tags": "false"}, {"image", "caption", "log_prob", "captions"}),
    ):
        answer = client.post("/v1/describe", params=query, files=form(("a.png", picture)))
        assert answer.json()["records"][0].keys() == keys


def test_options_that_make_no_sense_are_refused(client: httpx.Client, picture: bytes) -> None:
    for query, said in (
        ({"beam": "2"}, "unknown option 'beam'; there are beam_size, "),
        ({"beam_size": "101"}, "beam_size: Input should be less than or equal to 100"),
        ({"beam_size": "two"}, "beam_size: Input should be a valid integer"),
        ({"num_captions": "9"}, "num_captions is 9; it takes at most beam_size, 3"),
        ({"required": "xyzzy"}, "required has 'xyzzy'"),
        ({"only_tags": "xyzzy"}, "only has 'xyzzy'"),
        ({"min_confidence": "2"}, "min_confidence: Input should be less than or equal to 1"),
        ({"threshold": "0.5", "min_precision": "0.5"}, "threshold and min_precision"),
        ({"captions": "false", "tags": "0"}, "neither captions nor tags"),
    ):
        answer = client.post("/v1/describe", params=query, files=form(("a.png", picture)))
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(said)


def test_words_may_be_given_more_than_once(client: httpx.Client, picture: bytes) -> None:
    query: dict[str, Any] = {"forbidden": ["a", "dog", "runs", "on", "grass"], "max_words": 3}
    answer = client.post("/v1/describe", params=query, files=form(("a.png", picture)))
    caption = answer.json()["records"][0]["caption"]
    assert caption
    assert not {"a", "dog", "runs", "on", "grass"} & set(caption.split())


def test_what_is_no_picture_is_422_with_the_reason(client: httpx.Client, picture: bytes) -> None:
    for content, reason in (
        (b"", "an empty file (0 bytes)"),
        (b"root:x:0:0", "not a picture that Pillow can read"),
        (picture[:60], ""),
    ):
        answer = client.post("/v1/describe", files=form(("a.png", content)))
        assert answer.status_code == 422
        detail = answer.json()["detail"]
        assert detail
        assert detail == reason or not reason
        assert answer.json()["records"] == [{"image": "a.png", "error": detail}]
    answer = client.post("/v1/describe", files=form(("a", b""), ("b", b"x")))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("none of 2 photographs can be read; the first: ")


def too_many_pixels() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_too_many_pixels_are_413(client: httpx.Client, picture: bytes) -> None:
    answer = client.post("/v1/describe", files=form(("a.png", too_many_pixels())))
    assert answer.status_code == 413
    assert answer.json()["detail"].startswith("too large to open safely")
    both = form(("a.png", too_many_pixels()), ("b.png", picture))
    answer = client.post("/v1/describe", files=both)
    assert answer.status_code == 200
    assert "error" in answer.json()["records"][0]
    assert "caption" in answer.json()["records"][1]


def test_too_many_bytes_are_413_whether_their_number_is_said_or_not(
    served: Callable[..., httpx.Client], picture: bytes
) -> None:
    client = served(upload=len(picture) + 500)
    assert client.post("/v1/describe", files=form(("a.png", picture))).status_code == 200
    large = client.build_request("POST", "/v1/describe", files=form(("a", picture + 500 * b"\0")))
    content, headers = large.read(), {"Content-Type": large.headers["Content-Type"]}

    def pieces() -> Iterator[bytes]:
        for place in range(0, len(content), 100):
            yield content[place : place + 100]

    for body in (content, pieces()):
        answer = client.post("/v1/describe", content=body, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith(f"more than {len(picture) + 500} bytes")
    assert waiting(client) == 0


def test_bodies_that_are_no_photographs_are_refused(client: httpx.Client) -> None:
    for arguments, status, said in (
        ({"data": {"path": "/etc/passwd"}}, 415, "multipart/form-data"),
        ({"files": {"other": ("a.png", b"x")}}, 422, "there is 'other'"),
        ({"files": {"images": (None, b"/etc/passwd")}}, 422, "send photographs as files"),
        ({"json": {"images": ["/etc/passwd"]}}, 415, "multipart/form-data"),
        (
            {"content": b"xyz", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            400,
            "multipart",
        ),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    ):
        answer = client.post("/v1/describe", **arguments)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    assert waiting(client) == 0


def test_a_name_is_a_text_and_never_a_path(
    client: httpx.Client, picture: bytes, tmp_path: Path
) -> None:
    real = str(tmp_path / "dog.png")
    for name in (*HOSTILE, real):
        good, bad = (
            client.post("/v1/describe", files=form((name, content)))
            for content in (picture, b"no picture")
        )
        shown = as_shown(name)
        assert [r["image"] for r in good.json()["records"]] == [shown]
        assert bad.status_code == 422
        assert bad.json()["records"][0]["image"] == shown
        assert "captioner-serve" not in bad.text
        assert good.text.strip().isprintable()


def test_no_error_says_where_an_upload_lies(
    monkeypatch: pytest.MonkeyPatch, model_in_use: Captioner
) -> None:
    def broken(_: object, path: str) -> bytes:
        raise UnreadableError(f"damaged: cannot open {path!r}")

    monkeypatch.setattr("captioner.serve.reading.read_photograph", broken)
    with pytest.raises(UnreadableError, match=r"^damaged: cannot open 'the file'$"):
        read_upload(model_in_use.checkpoint.config.preprocessing, "/tmp/captioner-serve-x/7")


def test_a_token_is_needed_where_there_is_one(
    served: Callable[..., httpx.Client], picture: bytes
) -> None:
    client = served(token="s3cret!")
    for token, status in (
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer s3cret", 401),
        ("Bearer \xe9", 401),
        ("Basic s3cret!", 401),
        ("Bearer s3cret!", 200),
    ):
        headers = {} if token is None else {b"Authorization": token.encode("latin-1")}
        answer = client.post("/v1/describe", files=form(("a.png", picture)), headers=headers)
        assert answer.status_code == status
    assert client.post("/v1/describe").headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/").status_code == 200
    assert client.get("/health").json()["token"] is True


def test_other_sites_and_other_names_are_refused(
    served: Callable[..., httpx.Client], picture: bytes
) -> None:
    client = served(hosts=["127.0.0.1", "localhost"])
    for host, site, status in (
        ("localhost:8000", "same-origin", 200),
        ("127.0.0.1", "none", 200),
        ("rebound.example", "same-origin", 400),
        ("localhost", "cross-site", 403),
        ("localhost", "same-site", 403),
    ):
        headers = {"Host": host, "Sec-Fetch-Site": site}
        answer = client.post("/v1/describe", files=form(("a.png", picture)), headers=headers)
        assert answer.status_code == status


def test_every_answer_has_a_policy_and_no_page_names_another_host(client: httpx.Client) -> None:
    paths = ["/", "/page.css", "/serve.css", "/serve.js", "/health", "/docs", "/openapi.json",
             "/nothing", "/static-offline-docs/swagger-ui.css"]  # fmt: skip
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == (404 if path == "/nothing" else 200)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert ("unsafe-inline" in policy) is (path == "/docs")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/", "/page.css", "/serve.css", "/serve.js", "/docs"):
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w", client.get(path).text)


def test_no_url_leads_out_of_the_package(client: httpx.Client) -> None:
    for path in ("/..%2f..%2fsetup.cfg", "/static-offline-docs/..%2fcore.py",
                 "/static-offline-docs/%2e%2e/core.py", "/static-offline-docs//etc/passwd",
                 "/page/serve.html", "/serve.html"):  # fmt: skip
        assert client.get(path).status_code == 404


def test_the_documentation_has_every_option_with_its_range(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/describe"]["post"]
    said = {p["name"]: p["schema"] for p in operation["parameters"]}
    assert said.keys() == {
        "captions",
        "tags",
        "min_confidence",
        *map(parameter_of, (*fields(SearchOptions), *fields(TagOptions))),
    }
    assert {"exclude_tags", "only_tags", "threshold"} <= said.keys()
    assert said["beam_size"]["minimum"] == 1
    assert said["beam_size"]["maximum"] == 100
    assert said["length_norm"]["enum"] == ["average", "gnmt"]
    assert {"200", "401", "413", "422", "503"} <= operation["responses"].keys()
    assert "multipart/form-data" in operation["requestBody"]["content"]


def test_what_arrives_together_is_described_together(
    slow: Model, model_in_use: Captioner, picture: bytes, tmp_path: Path
) -> None:
    def keep(number: int) -> str:
        path = tmp_path / str(number)
        path.write_bytes(picture)
        return str(path)

    same, other = Asked(SearchOptions(), TagOptions()), Asked(None, TagOptions())
    with Batches(model_in_use, batch_size=6, workers=1) as batches:
        first = batches.submit(keep(0), same)
        assert slow.begun.acquire(timeout=60.0)
        more = [batches.submit(keep(n), same if n < 8 else other) for n in range(1, 10)]
        eventually(lambda: not any((tmp_path / str(n)).exists() for n in range(10)))
        slow.may.set()
        for answer in (first, *more):
            assert answer.result(60.0).record["caption"] == "a dog"
    assert slow.sizes == [1, 6, 1, 2]


def test_a_full_queue_is_503_and_says_when_to_come_again(
    slow: Model, served: Callable[..., httpx.Client], picture: bytes
) -> None:
    client = served(queue=3)
    post = partial(client.post, "/v1/describe")
    with ThreadPoolExecutor(4) as threads:
        two = [threads.submit(post, files=form(("a.png", picture))) for _ in range(2)]
        eventually(lambda: waiting(client) == 2)
        pair = post(files=form(("a.png", picture), ("b.png", picture)))
        assert pair.status_code == 503
        assert waiting(client) == 2
        third = threads.submit(post, files=form(("c.png", picture)))
        eventually(lambda: waiting(client) == 3)
        full = post(files=form(("d.png", picture)))
        assert full.status_code == 503
        assert 1 <= int(full.headers["Retry-After"]) <= 60
        slow.may.set()
        assert [f.result(60.0).status_code for f in (*two, third)] == [200] * 3
    assert waiting(client) == 0
    four = post(files=form(*((str(n), picture) for n in range(4))))
    assert four.status_code == 413
    assert four.json()["detail"] == "send at most 3 photographs at a time"
    assert post(files=form(("e.png", picture))).status_code == 200


def test_a_model_that_fails_costs_the_batch_alone(
    client: httpx.Client, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(batches_module, "describe_read", failing)
        answer = client.post("/v1/describe", files=form(("a.png", picture)))
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the model failed: out of memory"}
    assert client.post("/v1/describe", files=form(("a.png", picture))).status_code == 200
    assert waiting(client) == 0


def test_a_full_disk_is_507(
    client: httpx.Client, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uploads, "_write", full)
    answer = client.post("/v1/describe", files=form(("a.png", picture)))
    assert answer.status_code == 507
    assert "No space left on device" in answer.json()["detail"]
    assert waiting(client) == 0


def raw_request(content: bytes, length: int | None = None) -> bytes:
    request = httpx.Request("POST", "http://localhost/v1/describe", files=form(("a.png", content)))
    body = request.read()
    said = len(body) if length is None else length
    head = (
        f"POST /v1/describe HTTP/1.1\r\nHost: localhost\r\nContent-Length: {said}\r\n"
        f"Content-Type: {request.headers['Content-Type']}\r\n\r\n"
    )
    return head.encode() + body


def test_a_request_that_is_cancelled_frees_its_place(
    slow: Model, model_in_use: Captioner, picture: bytes
) -> None:
    with alive(model_in_use, queue=2) as live:
        first, second = (socket.create_connection(("127.0.0.1", live.port)) for _ in range(2))
        with first, second:
            first.sendall(raw_request(picture))
            assert slow.begun.acquire(timeout=60.0)
            second.sendall(raw_request(picture))
            eventually(lambda: waiting(live.client) == 2)
            eventually(lambda: not list(live.folder.iterdir()))
            second.close()
            eventually(lambda: waiting(live.client) == 1)
            # One that breaks off in the middle of its body.
            with socket.create_connection(("127.0.0.1", live.port)) as third:
                third.sendall(raw_request(picture, 1_000_000))
                eventually(lambda: waiting(live.client) == 2)
            eventually(lambda: waiting(live.client) == 1)
            slow.may.set()
            assert b" 200 OK" in first.recv(4096)
        eventually(lambda: waiting(live.client) == 0)
        last = live.client.post("/v1/describe", files=form(("a.png", picture)))
        assert last.status_code == 200
    assert slow.sizes == [1, 1]  # what was cancelled never came to the model


def test_a_body_that_does_not_come_is_408(
    model_in_use: Captioner, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_IDLE_SECONDS", 0.2)
    with (
        alive(model_in_use) as live,
        socket.create_connection(("127.0.0.1", live.port)) as client,
    ):
        client.sendall(raw_request(picture, 1_000_000))
        assert b" 408 " in client.recv(4096)
        eventually(lambda: waiting(live.client) == 0)


def test_a_client_that_sends_to_the_end_reads_why_it_was_refused(
    model_in_use: Captioner,
) -> None:
    large = os.urandom(3_000_000)
    with alive(model_in_use, upload=100_000) as live:
        for _ in range(5):
            answer = live.client.post("/v1/describe", files=form(("a.png", large)))
            assert answer.status_code == 413


def test_many_clients_get_each_their_own_answers(model_in_use: Captioner, tmp_path: Path) -> None:
    paths = [draw_picture(tmp_path / f"{c}.png", c) for c in COLOURS]
    expected = {
        os.path.basename(record["image"]): {**record, "image": os.path.basename(record["image"])}
        for record in describe_folder(model_in_use, paths)
    }
    assert len({record["log_prob"] for record in expected.values()}) == len(COLOURS)
    with alive(model_in_use) as live, ThreadPoolExecutor(16) as threads:

        def ask(number: int) -> tuple[str, Any]:
            path = paths[number % len(paths)]
            answer = live.client.post("/v1/describe", files=form((path.name, path.read_bytes())))
            return path.name, answer.json()

        for name, answer in threads.map(ask, range(160)):
            (record,) = answer["records"]
            # Batches of other sizes round the last digit of a float otherwise.
            assert record["image"] == name
            assert record["caption"] == expected[name]["caption"]
            assert record["log_prob"] == pytest.approx(expected[name]["log_prob"], abs=2e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_accepted_is_answered_before_the_end(
    number: signal.Signals, model: list[str], tmp_path: Path, picture: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    said = tmp_path / "said.txt"
    process = start(said, _serve_in, str(temporary), ["serve", "--port", "0", *model])
    eventually(lambda: said.exists() and "answers" in said.read_text(), 120.0)
    port = int(re.search(r":(\d+)/", said.read_text())[1])  # type: ignore[index]
    url = f"http://127.0.0.1:{port}/v1/describe"
    with ThreadPoolExecutor(1) as threads, httpx.Client(timeout=60.0) as client:
        many = form(*((f"{n}.png", picture) for n in range(100)))
        answer = threads.submit(client.post, url, files=many)
        health = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        with health:
            eventually(lambda: waiting(health) == 100)
        os.kill(process.pid or 0, number)
        records = answer.result(60.0).json()["records"]
    assert len(records) == 100
    assert all("caption" in record for record in records)
    ended = end(process, said)
    assert ended.status == 0, ended.said
    assert "Traceback" not in ended.said
    assert list(temporary.iterdir()) == []


def _serve_in(temporary: str, arguments: list[str]) -> None:
    os.environ["TMPDIR"] = temporary
    run_captioner(arguments)


def test_without_its_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("captioner.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert 'pip install "captioner[serve]"' in capsys.readouterr().err


def test_a_port_that_is_taken_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--token", ""], ["--token", "two\nlines"],
                                       ["--port", "65536"], ["--queue", "0"]])  # fmt: skip
def test_wrong_options_are_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", *arguments])


def test_the_token_may_be_in_the_environment_but_not_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAPTIONER_TOKEN", "from outside")
    assert parse(["serve"], **dict.fromkeys(COMMANDS, int)).token == "from outside"
    monkeypatch.setenv("CAPTIONER_TOKEN", "")
    with pytest.raises(SystemExit, match="2"):
        main(["serve"])


# The page, in a browser.

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def cards(browser: Chrome) -> list[str]:
    found = browser.find_elements(By.CSS_SELECTOR, "article")
    return [str(card.get_property("innerText")) for card in found]


def drop(browser: Chrome, paths: Sequence[Path]) -> None:
    browser.find_element(By.ID, "files").send_keys("\n".join(map(str, paths)))


def settled(browser: Chrome, count: int) -> None:
    WebDriverWait(browser, 60).until(
        lambda b: (
            len(cards(b)) == count
            and not b.find_elements(By.CSS_SELECTOR, ".state")
            and len(b.find_elements(By.CSS_SELECTOR, ".photo > *")) == count
        )
    )


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Return photographs and one that is none, under names that would be more than text."""
    names = [name for name in HOSTILE if "/" not in name and len(name) < 200]
    paths = [draw_picture(tmp_path / "p.png", "blue").rename(tmp_path / name) for name in names]
    broken = tmp_path / "<b>broken.jpg"
    broken.write_bytes(b"not a picture")
    return [*paths, broken]


def test_the_page_shows_what_is_said_as_text(
    browser: Chrome, slow: Model, model_in_use: Captioner, hostile: list[Path]
) -> None:
    slow.may.set()
    slow._record.update(
        caption=SCRIPT,
        captions=[{"text": SCRIPT, "log_prob": -1.0}, {"text": "<i>two</i>", "log_prob": -2.0}],
        tags=[{"name": "<b>dog</b>", "score": 0.914}],
    )
    with alive(model_in_use) as live:
        browser.get(live.url)
        browser.get_log("browser")  # type: ignore[no-untyped-call]
        drop(browser, hostile)
        settled(browser, len(hostile))
        time.sleep(0.3)
        texts = cards(browser)
        for path in hostile:
            assert sum(path.name in text for text in texts) == 1
        assert sum(SCRIPT in text and "<b>dog</b> 91 %" in text for text in texts) == len(texts)
        assert browser.find_elements(By.CSS_SELECTOR, "main script, main img, main b, main i") == []
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_the_page_shows_errors_and_saves_records(
    browser: Chrome, model_in_use: Captioner, hostile: list[Path], tmp_path: Path
) -> None:
    with alive(model_in_use) as live:
        browser.get(live.url)
        drop(browser, hostile)
        settled(browser, len(hostile))
        whys = browser.find_elements(By.CSS_SELECTOR, ".why")
        assert [why.text for why in whys] == ["not a picture that Pillow can read"]
        assert browser.find_element(By.ID, "count").text == f"{len(hostile)} of {len(hostile)} done"
        assert len(browser.find_elements(By.CSS_SELECTOR, "canvas")) == len(hostile) - 1
        saved = tmp_path / "saved"
        saved.mkdir()
        browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(saved)}
        )
        browser.find_element(By.ID, "save").click()
        eventually(lambda: (saved / "captions.jsonl").exists())
        lines = (saved / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["image"] for line in lines} == {
            as_shown(path.name) for path in hostile
        }
        browser.find_element(By.ID, "clear").click()
        assert cards(browser) == []


def test_the_page_asks_for_the_token_and_waits_while_the_server_is_busy(
    browser: Chrome, slow: Model, model_in_use: Captioner, hostile: list[Path]
) -> None:
    with alive(model_in_use, token="open sesame", queue=1) as live:
        browser.get(live.url)
        WebDriverWait(browser, 30).until(lambda b: b.find_element(By.ID, "token").is_displayed())
        drop(browser, hostile[:1])
        settled(browser, 1)
        assert "a token is needed" in cards(browser)[0]
        browser.find_element(By.ID, "token").send_keys("open sesame")
        browser.find_element(By.CSS_SELECTOR, "article button").click()
        assert slow.begun.acquire(timeout=60.0)
        drop(browser, hostile[1:2])
        WebDriverWait(browser, 30).until(lambda b: "the server is busy" in "".join(cards(b)))
        slow.may.set()
        settled(browser, 2)
        assert all("a dog 70 %" in text for text in cards(browser))
        browser.execute_script("sessionStorage.clear()")


def test_the_page_fits_a_phone(phone: Chrome, model_in_use: Captioner, hostile: list[Path]) -> None:
    with alive(model_in_use) as live:
        phone.get(live.url)
        drop(phone, hostile)
        settled(phone, len(hostile))
        width = "return [document.documentElement.scrollWidth, innerWidth]"
        wide, screen = phone.execute_script(width)
        assert wide <= screen == 360
        touched = phone.find_elements(By.CSS_SELECTOR, "button, select")
        assert all(e.size["height"] >= 40 for e in touched if e.is_displayed())


def test_the_documentation_works_without_a_network(
    browser: Chrome, model_in_use: Captioner
) -> None:
    with alive(model_in_use) as live:
        browser.get_log("browser")  # type: ignore[no-untyped-call]
        browser.get(f"{live.url}/docs")
        WebDriverWait(browser, 30).until(
            lambda b: "Describe photographs" in b.find_element(By.TAG_NAME, "body").text
        )
        names = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        loaded = browser.execute_script(names)
        assert loaded
        assert all(name.startswith(live.url) for name in loaded if not name.startswith("data:"))
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
