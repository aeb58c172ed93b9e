"""A server and many clients, against a folder run on the same photographs."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import quantiles
from threading import local
from typing import Any, NamedTuple

import torch

from captioner.folder import FolderRun
from captioner.inference import Captioner
from captioner.photos.workers import Found
from measures.folder import enlarged
from measures.timing import Named, ratio, spread

_HEAD = b'--b\r\nContent-Disposition: form-data; name="images"; filename="%s"\r\n\r\n'


class Reply(NamedTuple):
    """What a client was answered, and after how many seconds."""

    image: str
    said: Any
    seconds: float
    refused: int


def serve(args: argparse.Namespace) -> Named:
    """A server with many clients against a folder run: throughput, latency, and nothing lost."""
    with tempfile.TemporaryDirectory() as place, running(args) as port:
        paths = sorted(args.images.iterdir())[: args.count]
        if args.megapixels:
            paths = enlarged(paths, args.megapixels, args.count, Path(place))
        captioner = Captioner.load(device=args.device, precision=args.precision)
        records = described(captioner, paths[: 2 * args.batch_size], args)  # these do not count
        asked(port, paths[: 2 * args.clients], args.clients)
        folders, servers = [], []
        replies: list[Reply] = []
        for _ in range(args.rounds):
            folders.append(seconds(lambda: records.update(described(captioner, paths, args))))
            servers.append(seconds(lambda: replies.extend(asked(port, paths, args.clients))))
    for name, taken in (("folder run", folders), (f"server, {args.clients} clients", servers)):
        yield name, {"photographs a second": spread([len(paths) / s for s in taken])}
    yield "server / folder run", {"throughput": ratio(folders, servers)}
    cuts = quantiles([1e3 * reply.seconds for reply in replies], n=100, method="inclusive")
    yield "an answer", {"p50 ms": round(cuts[49], 1), "p99 ms": round(cuts[98], 1)}
    whole = [r for r in replies if [a["image"] for a in r.said.get("records", ())] == [r.image]]
    count = args.rounds * len(paths)
    yield (
        f"of {count:,} photographs",
        {
            "lost": count - len(whole),
            "as in the folder run": sum(r.said["records"] == [records[r.image]] for r in whole),
            "refused at first": sum(reply.refused for reply in replies),
        },
    )


@contextmanager
def running(args: argparse.Namespace) -> Iterator[int]:
    """Run ``captioner serve`` in a process of its own, and give its port."""
    command = [sys.executable, "-P", "-m", "captioner", "serve", "--port", "0"]
    for name in ("device", "precision", "batch_size", "workers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/ answers", said)
            if found is None:
                sys.exit(f"the server did not start: {said}{process.stderr.read()}")
            yield int(found[1])
        finally:
            process.terminate()


def described(
    captioner: Captioner, paths: Sequence[Path], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the records of a folder run, each under the name of its photograph."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        run = FolderRun(output=output, batch_size=args.batch_size, workers=args.workers)
        run.run(captioner, [Found(str(path)) for path in paths])
        records = map(json.loads, output.read_text(encoding="utf-8").splitlines())
        return {Path(r["image"]).name: {**r, "image": Path(r["image"]).name} for r in records}


def asked(port: int, paths: Sequence[Path], clients: int) -> list[Reply]:
    """Ask for each photograph in a request of its own, each client one after the other."""
    own = local()

    def connect() -> None:
        own.connection = HTTPConnection("127.0.0.1", port, timeout=300)

    with ThreadPoolExecutor(clients, initializer=connect) as threads:
        return list(threads.map(partial(ask, lambda: own.connection), paths))


def ask(connection: Callable[[], HTTPConnection], path: Path) -> Reply:
    body = _HEAD % os.fsencode(path.name) + path.read_bytes() + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    started, refused = time.perf_counter(), 0
    while True:
        connection().request("POST", "/v1/describe", body, headers)
        answer = connection().getresponse()
        said = json.load(answer)
        if answer.status != 503:
            return Reply(path.name, said, time.perf_counter() - started, refused)
        refused += 1
        time.sleep(float(answer.headers["Retry-After"]))


def seconds(run: Callable[[], object]) -> float:
    """Return what a run takes by the clock: of other processes' time nothing is known here."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
