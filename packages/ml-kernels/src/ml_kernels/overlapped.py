"""Matrix products that hide their collective: one part is multiplied while another travels.

A gather becomes a ring: each rank multiplies the part it has and passes it on meanwhile, its own
first, so that the first product waits for nothing. A scatter that adds becomes the same ring for
partial sums (Wang et al. 2023, "Overlap Communication with Dependent Computation via
Decomposition"). Works with any backend of torch.distributed that sends and receives: nccl, gloo.

Results equal those of the plain sequence within rounding: parts are multiplied on their own, and
the ring adds a sum up in a fixed order, for rank `r` from `r + 1` around to `r`. The backward of
`all_gather_matmul` makes the calls of the plain sequence, only earlier, and equals it bit for bit.

Shapes: `R` rows of the whole group, `tp` ranks, `I` and `O` inner and outer width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ml_kernels.collective_gradients import (
    Gradients,
    gathered_backward,
    reduced_backward,
    with_gradients,
)

_CHUNKS = 4
"""Parts of `matmul_all_reduce`: the last one's communication is not hidden."""


def all_gather_matmul(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.all_gather_matmul`: `(R / tp, I)` to `(R, O / tp)`."""
    if group.size() == 1:
        return F.linear(x, weight)
    return with_gradients(
        x, weight, group, product=_gather_and_multiply, backward=gathered_backward
    )


def matmul_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.matmul_reduce_scatter`: `(R, I / tp)` to `(R / tp, O)`."""
    if group.size() == 1:
        return F.linear(x, weight)
    return with_gradients(
        x, weight, group, product=_multiply_and_scatter, backward=_scattered_backward
    )


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """See `ml_kernels.matmul_all_reduce`: `(R, I / tp)` to `(R, O)`."""
    if group.size() == 1:
        return F.linear(x, weight)
    return with_gradients(x, weight, group, product=_multiply_and_reduce, backward=reduced_backward)


def _gather_and_multiply(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    x = x.contiguous()
    # Cut, not flattened: the result may be changed in place only if it is no view.
    out = x.new_empty(group.size() * x.shape[0], weight.shape[0])
    parts = out.chunk(group.size())
    for rank, part in _around(x, x.new_empty(2, *x.shape).unbind(), group):
        torch.mm(part, weight.t(), out=parts[rank])
    return out


def _multiply_and_scatter(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    parts = torch.unflatten(x, 0, (group.size(), -1))
    return _sum_around(lambda rank: parts[rank] @ weight.t(), group)


def _scattered_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    x_needed: bool,
) -> Gradients:
    """Gather the gradient and multiply: the ring of `_gather_and_multiply`, but keep the parts."""
    ranks, me = group.size(), group.rank()
    gathered = gradient.new_empty(ranks, *gradient.shape)
    gathered[me] = gradient
    landing = [gathered[(me - step) % ranks] for step in range(1, ranks)]
    of_x = gradient.new_empty(ranks, gradient.shape[0], weight.shape[1])
    for rank, part in _around(gathered[me], landing, group):
        if x_needed:
            torch.mm(part, weight, out=of_x[rank])
    of_weight = None if x is None else gathered.flatten(0, 1).t() @ x
    return of_x.flatten(0, 1) if x_needed else None, of_weight


def _multiply_and_reduce(
    x: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    chunks = min(_CHUNKS, x.shape[0])
    reductions = []
    for part, total in zip(x.tensor_split(chunks), out.tensor_split(chunks), strict=True):
        torch.mm(part, weight.t(), out=total)
        reductions.append(dist.all_reduce(total, group=group, async_op=True))
    for reduction in reductions:
        reduction.wait()
    return out


def _around(
    mine: torch.Tensor, landing: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(rank, its part)` of all ranks, this one's first; the next travels meanwhile.

    Parts arrive in the buffers of `landing` in turn. Two are enough: one is sent and used while the
    other is filled.
    """
    ranks, me, part = group.size(), group.rank(), mine
    for step in range(ranks - 1):
        coming = landing[step % len(landing)]
        transfers = _pass_on(part, coming, group)
        yield (me - step) % ranks, part
        for transfer in transfers:
            transfer.wait()
        part = coming
    yield (me + 1) % ranks, part


def _sum_around(partial: Callable[[int], torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of all ranks' `partial(r)` on rank `r`; sums travel while one is computed."""
    ranks, me = group.size(), group.rank()
    total = partial((me - 1) % ranks)
    for step in range(2, ranks + 1):
        coming = torch.empty_like(total)
        transfers = _pass_on(total, coming, group)
        addend = partial((me - step) % ranks)
        for transfer in transfers:
            transfer.wait()
        total = coming.add_(addend)
    return total


def _pass_on(part: torch.Tensor, coming: torch.Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send a part to the next rank and to receive one from the previous."""
    ranks, me = group.size(), group.rank()
    following, previous = (dist.get_global_rank(group, (me + by) % ranks) for by in (1, -1))
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, part, following, group),
            dist.P2POp(dist.irecv, coming, previous, group),
        ]
    )
