"""The workers of a run, and the Ray cluster that must have room for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from captioner.cluster.storage import why
from captioner.folder.checks import RunError
from captioner.settings import ConfigError
from captioner.version import __version__

__all__ = ["Workers", "cause_of", "check_nodes", "check_room", "connected"]

_SECONDS = 10.0  # for an address to answer


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that hold a model each.

    Attributes:
        concurrency: how many there are.
        num_cpus: the CPUs of each: threads of the model, and processes that decode photographs.
            Where a worker has a GPU, so many are for its reading too, on any node.
        num_gpus: the GPUs of each; workers may share one.
        device: as for ``Captioner.load``; "auto" is the GPU where a worker has one.
        precision: as for ``Captioner.load``; with "auto" each node takes what it gains from.
    """

    concurrency: int
    num_cpus: int
    num_gpus: float
    device: str
    precision: str

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("concurrency", "num_cpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes 1 or more")
        if not (0.0 <= self.num_gpus <= 1.0 or float(self.num_gpus).is_integer()):
            raise ConfigError(
                f"num_gpus is {self.num_gpus}; it takes a share of 1, or a whole number"
            )

    def fitting(self, cpus: float, gpus: float) -> int:
        """Return how many of them a node of so many CPUs and GPUs has room for."""
        by_cpus = int(cpus // self.num_cpus)
        return min(by_cpus, int(gpus / self.num_gpus)) if self.num_gpus else by_cpus


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a Ray cluster; the caller's connection is used, and stays.

    Raises ``RunError`` where there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    try:
        ray.init(address, include_dashboard=None, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray cluster at {address}: {why(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ``RunError`` where nobody listens: Ray itself would wait for minutes."""
    if address in {"auto", "local"}:
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not (host and port.isdigit()):
        raise RunError(f"no Ray cluster at {address}: an address is auto, local or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"no Ray cluster at {address}: {why(error)}") from error


def check_nodes(paths: Sequence[str]) -> None:
    """Raise ``RunError`` where a node lacks this version of captioner, or a path on its disk."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    lacking_on = ray.remote(num_cpus=0)(_lacking)
    answers = [
        lacking_on.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(__version__, list(paths))
        for node in alive
    ]
    for node, answer in zip(alive, answers, strict=True):
        name = node["NodeManagerAddress"]
        try:
            lacking = ray.get(answer)
        except RayError as error:
            raise RunError(f"captioner does not run on node {name}: {cause_of(error)}") from error
        if lacking:
            raise RunError(f"{lacking} on node {name}")


def _lacking(version: str, paths: Sequence[str]) -> str:
    if version != __version__:
        return f"captioner {__version__} is not the {version} of this machine: it is"
    missing = [path for path in paths if not os.path.lexists(path)]
    return (
        f"{missing[0]} must be on all nodes (a disk that all mount), and is not" if missing else ""
    )


def cause_of(error: RayError) -> str:
    """Return the reason of an error of Ray's in a line, without its traceback."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {why(error.cause)}"
    return why(error)


def check_room(workers: Workers) -> None:
    """Raise ``RunError`` where the cluster has no room for the workers: they would never start."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    amounts = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    room = sum(workers.fitting(*amount) for amount in amounts)
    cpus = sum(cpu for cpu, _ in amounts)
    needed = workers.num_cpus * (workers.concurrency + (1 if workers.num_gpus else 0))
    if room < workers.concurrency or cpus < needed:
        gpus = f" and {workers.num_gpus:g} GPUs" if workers.num_gpus else ""
        to_read = f", and {workers.num_cpus} CPUs to read with," if workers.num_gpus else ""
        raise RunError(
            f"{workers.concurrency} workers of {workers.num_cpus} CPUs{gpus}{to_read} do not fit "
            f"on the cluster, whose {len(nodes)} nodes have {cpus:g} CPUs and "
            f"{sum(gpu for _, gpu in amounts):g} GPUs"
        )
