"""The processes of one training run under torchrun: who am I, vectors of all, gradients of all.

`torchrun --nproc-per-node 2 -m training train RECIPE` trains on `train.batch_size` pairs in every process. The first
process alone reads, judges and writes; what all of them need, it makes first. Without torchrun there is one process,
and nothing here does anything.
"""

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among `count`."""

    index: int
    count: int

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (n, D) of every process in their order, (count · n, D); gradients go back to where rows came from."""
        return rows if self.count == 1 else cast(Tensor, _Gather.apply(rows, self))

    def gather_constant(self, values: Tensor) -> Tensor:
        """Gathers like `gather`, without gradients."""
        if self.count == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up every parameter's gradient over the processes, in place."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a head that had no part in this process's share
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def agree(self, value: Any) -> Any:
        """The first process's value in all of them: what it judges by, so that all stop at the same step."""
        if self.count == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    def collect(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def spread(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, in place."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process does what is in this block, and then the others do, who find it in the cache."""
        if self.index:
            dist.barrier()
        yield
        if self.count > 1 and self.index == 0:
            dist.barrier()

    def share_of(self, count: int) -> slice:
        """This process's share of so many items, in a row; no item is left out."""
        return slice(count * self.index // self.count, count * (self.index + 1) // self.count)

    def share(self, rows: Any) -> Any:
        """This process's equal share of rows (n, …); what does not divide is left out."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size] if self.count > 1 else rows


ALONE = Ranks(0, 1)


def processes() -> int:
    """Return how many processes torchrun started, without joining them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined(backend: str | None = None) -> Ranks:
    """Join the run that torchrun's variables describe; ALONE where there are none. NCCL with a GPU, else gloo."""
    if processes() == 1:
        return ALONE
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # The others wait while the first encodes, which takes days on large sets; torchrun ends them if it dies.
        dist.init_process_group(
            backend or ("nccl" if torch.cuda.is_available() else "gloo"), timeout=datetime.timedelta(days=30)
        )
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave(code: int) -> NoReturn:
    """End this process with `code`, and the run that it is part of.

    torch never ends a group's threads, not even when the group is destroyed: one that lets go of its last tensor while
    the interpreter is going down aborts the process after its work is done, about one run in fifteen. So a process
    that was part of a run goes without that: everything is written, its output is flushed, the kernel does the rest.
    """
    if not dist.is_initialized():
        sys.exit(code)
    if code == 0:  # after an error the others may be waiting elsewhere; torchrun stops them
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.size = ranks, len(rows)
        return ranks.gather_constant(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process's loss used these rows: the sum of what each sends back is their gradient.
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole)
        return whole[ctx.ranks.index * ctx.size : (ctx.ranks.index + 1) * ctx.size], None
