"""Several processes that train one model: who does what, and what they tell each other.

Started by ``torchrun``, which says to each process in its environment which one it is. One process
is a group of one, and everything here is then what it would be without a group.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Group", "joined"]

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run; this one is ``rank`` of ``size``.

    On its machine it is ``local_rank`` of ``local_size``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of a kind: each has a GPU to itself."""
        if device.type != "cuda" or self.size == 1:
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors."""
        if self.size > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def any(self, said: bool, device: torch.device) -> bool:
        """Return whether any process said so; ``device`` is where this process computes."""
        return bool(self.sum(torch.tensor(float(said), device=device)))

    def merge(self, found: dict[int, T]) -> dict[int, T]:
        """Return what all processes found, in the order of the keys."""
        parts: list[dict[int, T]] = [found]
        if self.size > 1:
            parts = [{} for _ in range(self.size)]
            distributed.all_gather_object(parts, found)
        merged = {key: value for part in parts for key, value in part.items()}
        return dict(sorted(merged.items()))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the mean over the processes."""
        if self.size == 1:
            return module
        # Gradients of depthwise weights, (C, 1, k, k), have strides that only look like others.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(module)

    def alone(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return where a wrapped module's gradients are gathered but not yet sent around."""
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that ``torchrun`` started; a group of one where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    try:
        yield Group(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]), local_size)
    finally:
        distributed.destroy_process_group()
