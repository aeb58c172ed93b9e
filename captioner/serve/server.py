"""The server's life: from its port to the answer of the last request."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from threading import current_thread, main_thread
from typing import Any

import uvicorn

from captioner.generation.describer import Describer
from captioner.serve.app import Limits, build_app
from captioner.serve.batches import Batches
from captioner.serve.uploads import private_folder

__all__ = ["is_local", "listen", "serve"]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes one that is free. Raises ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"cannot listen on {host}, port {port}: {why}") from error


def is_local(listening: socket.socket) -> bool:
    """Return whether only programs on this machine reach a socket."""
    return ip_address(listening.getsockname()[0]).is_loopback


def serve(
    captioner: Describer[Any],
    listening: socket.socket,
    limits: Limits,
    *,
    batch_size: int = 32,
    workers: int = 2,
    decode_timeout: float = 30.0,
    ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Answer requests until SIGINT or SIGTERM, and then those that have been accepted.

    A second SIGINT ends the server at once.

    Args:
        captioner: The model.
        listening: Of :func:`listen`.
        limits: What is taken; on a loopback only its own names are, whatever the limits say.
        batch_size: How many photographs go through the model at a time.
        workers: How many processes read photographs.
        decode_timeout: The longest time to read one photograph, in seconds.
        ready: Told the URL once requests are answered.

    """
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    if is_local(listening):
        # A site whose name leads to this machine would be let in by its visitor's browser.
        limits = replace(limits, hosts=(host, "localhost"))
    batches = Batches(
        captioner, batch_size=batch_size, workers=workers, decode_timeout=decode_timeout
    )
    # uvicorn would set up logging of its own: an access log has names that act on a terminal.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with private_folder() as folder, batches:
        config = uvicorn.Config(
            build_app(batches, folder, limits),
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            ws="none",
        )
        ready(f"http://{host}:{port}/")
        # uvicorn hands a signal on after the last answer.
        with _interrupting(), suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def _interrupting() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is: by default it ends the process, and leaves the folder."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
