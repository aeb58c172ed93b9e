"""Data-parallel training: the group of processes that train one model, and their collectives.

``torchrun`` starts the processes and gives each its rank in environment variables.
Without torchrun the group has one process and every collective is a no-op.
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
    """The processes of a run: this process has rank ``rank`` among ``size`` processes.

    ``local_rank`` is its rank among the ``local_size`` processes on the same machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process has rank 0, which alone writes the run's files and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process: on CUDA, the GPU whose index is ``local_rank``."""
        if device.type != "cuda" or self.size == 1:
            return device
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensor over the processes (all-reduce)."""
        if self.size > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def any(self, said: bool, device: torch.device) -> bool:
        """Return whether ``said`` is true in any process; ``device`` is this process's device."""
        return bool(self.sum(torch.tensor(float(said), device=device)))

    def merge(self, found: dict[int, T]) -> dict[int, T]:
        """Return the union of the processes' dictionaries, sorted by key (all-gather)."""
        parts: list[dict[int, T]] = [found]
        if self.size > 1:
            parts = [{} for _ in range(self.size)]
            distributed.all_gather_object(parts, found)
        merged = {key: value for part in parts for key, value in part.items()}
        return dict(sorted(merged.items()))

    def wait(self) -> None:
        """Wait until every process has called this method (barrier)."""
        if self.size > 1:
            distributed.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are the mean over the processes."""
        if self.size == 1:
            return module
        # A depthwise weight's gradient (C, 1, k, k) can have other strides for the same layout.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(module)

    def alone(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients accumulate in this process without an all-reduce."""
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the group of processes that ``torchrun`` started, or yield a group of one process."""
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
