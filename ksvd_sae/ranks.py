"""Several processes that learn one dictionary: each codes a part of every batch, and sums go round.

Every process runs the same program over the same samples in the same order and takes its rows of each batch
(``part``). What a step needs to know of the batch are sums over samples, which are all-reduced, or a few rows, which
whoever has them gives to all; so N processes learn what one would, but for the order in which sums are added. What is
then decided from them (atoms, draws) is the same in all, and the atoms are rank 0's, lest rounding on another machine
drive them apart.

torch.distributed carries it: NCCL between GPUs, gloo between CPUs, started by torchrun or by the user's own
``init_process_group``. If a process dies, the others stop with a ``ProcessError`` at their next sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ksvd_sae.errors import ProcessError


@dataclass(frozen=True)
class Ranks:
    """This process' place among those that learn together.

    rank: from 0. size: how many there are; with one, nothing is sent, and nothing is other than without.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """All processes of torch.distributed's default group; one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, n: int) -> slice:
        """This process' rows of n: as many as any other's, or one more; of few rows some have none."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, of one shape."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def count(self, n: int, device: torch.device) -> int:
        """The sum of the numbers of all processes; alone, nobody waits for the device."""
        return n if self.size == 1 else int(self.total(torch.tensor(n, device=device)))

    def largest(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def agreed(self, tensor: Tensor) -> Tensor:
        """Rank 0's."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with _others():
            dist.broadcast(tensor, 0)
        return tensor

    def joined(self, rows_B: Tensor) -> Tensor:
        """The rows of all processes, one process' after another's: those of the whole batch in its order."""
        if self.size == 1:
            return rows_B
        first, n = self._place(rows_B)
        all_B = rows_B.new_zeros(n, *rows_B.shape[1:])
        all_B[first : first + len(rows_B)] = rows_B
        return self.total(all_B)

    def give_parts(self, rows_B: Tensor) -> None:
        """Give all this process' ``part`` of the rows, and take the others', in place."""
        with _others():
            for rank in range(self.size):
                own_B = rows_B[Ranks(rank, self.size).part(len(rows_B))]
                if len(own_B):
                    dist.broadcast(own_B, rank)

    def rows(self, rows_BD: Tensor, picks: Tensor) -> Tensor:
        """The picked rows of the whole batch, from whoever has them."""
        if self.size == 1:
            return rows_BD[picks]
        first, _ = self._place(rows_BD)
        own = (picks >= first) & (picks < first + len(rows_BD))
        picked_ND = rows_BD.new_zeros(len(picks), *rows_BD.shape[1:])
        picked_ND[own] = rows_BD[picks[own] - first]
        return self.total(picked_ND)

    def first(self, rows_BD: Tensor, n: int) -> Tensor:
        """The first n rows of the whole batch, as far as there are so many."""
        if self.size == 1:
            return rows_BD[:n]
        _, total = self._place(rows_BD)
        return self.rows(rows_BD, torch.arange(min(n, total), device=rows_BD.device))

    def _place(self, rows_B: Tensor) -> tuple[int, int]:
        """Where this process' rows begin among those of all, and how many these are."""
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows_B.device)
        counts[self.rank] = len(rows_B)
        all_counts = self.total(counts).tolist()
        return sum(all_counts[: self.rank]), sum(all_counts)

    def _reduced(self, tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return tensor
        # In place: a copy, as the caller may go on to use its own.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        with _others():
            dist.all_reduce(tensor, how)
        return tensor


ALONE = Ranks()


@contextmanager
def _others() -> Iterator[None]:
    """What is sent round fails where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"DB-KSVD in {dist.get_world_size()} processes, rank {dist.get_rank()}: another process is gone",
            got=str(error).splitlines()[0][:200],
            cause="it ended with an error of its own, which it has printed, or was killed",
            cure="start all of them again: training goes on from the last checkpoint",
        ) from error
