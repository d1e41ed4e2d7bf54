"""Which pairs have converged and which directions go on, from the residuals of an iteration.

The iteration's one transfer to the host is here.
"""

from typing import List, NamedTuple, Optional

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """lead: wanted pairs converged before the first that has not, the fewest over a batch; active: columns that go on,
    the most over a batch; index (*, active): those columns; valid (*, active): one, or zero for a filler.

    worst: largest rerr of a wanted pair that has not converged; total: sum of all rerr (NaN where one is); least: the
    smallest kept squared sine of Ritz.d; losses: whether one lies under the bound asked about; least_B, least_K:
    smallest w^H B w and r^H K r met.
    """

    lead: int
    active: int
    worst: float
    total: float
    least: float
    losses: bool
    least_B: float
    least_K: float
    index: Tensor  # type: ignore[assignment]  # tuple's method of this name is not called
    valid: Tensor


def judge_one(
    rerr: Tensor,
    d: Tensor,
    least: float,
    definite: Optional[Tensor],
    settled: Optional[Tensor],
    k: int,
    tol: float,
    lock: float,
    candidates: int,
    more: int,
    drop: float,
    loss: float,
    index: Tensor,
) -> Verdict:
    """Of one matrix in host memory: decided on the host from the numbers transferred, which spares twenty small
    kernels.

    rerr: (n,); d, least: as in Ritz, kept above drop; definite: least_B and least_K. Of the first `candidates` columns
    those go on whose rerr exceeds lock; of the first `more` where the wanted pairs have converged but not settled.
    index: the columns that went on before, returned if they are what goes on now.
    """
    n, p = rerr.shape[0], d.shape[0]
    numbers = [rerr]
    if p > 0:
        numbers.append(d)
    if definite is not None:
        numbers.append(definite)
    values: List[float] = (torch.cat(numbers) if len(numbers) > 1 else rerr).tolist()
    lead = 0
    while lead < k and values[lead] <= tol:
        lead += 1
    unsettled = settled is not None and lead == k and not bool(settled)
    if unsettled:
        lead, candidates = k - 1, more
    running: List[int] = []
    total, worst = 0.0, 0.0
    for i in range(n):
        total += values[i]
        if i < candidates and values[i] > lock and lead < k:
            running.append(i)
        if i < k and values[i] > tol or unsettled and i < more:
            worst = max(worst, values[i])
    losses = least < loss
    for i in range(n, n + p):
        if values[i] > drop:
            least = min(least, values[i])
        losses = losses or values[i] < loss
    if len(running) != index.shape[0] or len(running) < n:
        index = torch.tensor(running, dtype=torch.int64, device=index.device)
    least_B, least_K = 1.0, 1.0
    if definite is not None:
        least_B, least_K = values[n + p], values[n + p + 1]
    return Verdict(
        lead, len(running), worst, total, least, losses, least_B, least_K, index, rerr
    )


def judge_batch(
    rerr: Tensor,
    d: Tensor,
    masked: Tensor,
    definite: Tensor,
    settled: Optional[Tensor],
    k: int,
    tol: float,
    lock: float,
    candidates: int,
    more: int,
    drop: float,
    loss: float,
) -> Verdict:
    """The same decisions as masks over the batch, rerr (*, n); masked: (*) how many rows of the last W were fillers."""
    real = rerr.dtype
    done = rerr[..., :k] <= tol
    lead = torch.cumprod(done, -1).sum(-1)  # (*)
    awaited = ~done
    waiting = (rerr[..., :more] > lock) & (lead < k).unsqueeze(-1)
    waiting[..., candidates:] = False
    if settled is not None:
        unsettled = ((lead == k) & ~settled).unsqueeze(-1)
        waiting = waiting | (unsettled & (rerr[..., :more] > lock))
        awaited = torch.cat([awaited, unsettled.expand(lead.shape + (more - k,))], -1)
        lead = lead - unsettled.squeeze(-1).to(lead.dtype)
    least, losses = torch.ones_like(definite[0]), torch.zeros_like(definite[0])
    if d.shape[-1] > 0:
        least = d.masked_fill(d <= drop, 1.0).min()
        # Fillers show as zeros in d: more small ones than those are losses.
        losses = ((d < loss).sum(-1) - masked).max().to(real)
    counts = [waiting.sum(-1).max().to(real), lead.min().to(real)]
    sizes = [
        (rerr[..., : awaited.shape[-1]] * awaited).max(),
        rerr.sum(),
        least,
        losses,
    ]
    values: List[float] = torch.cat([torch.stack(counts + sizes), definite]).tolist()
    active = int(values[0])
    order = torch.sort(waiting.to(torch.int8), stable=True, dim=-1, descending=True)[1]
    index = order[..., :active]
    valid = waiting.gather(-1, index).to(real)
    return Verdict(
        int(values[1]),
        active,
        values[2],
        values[3],
        values[4],
        values[5] > 0.0,
        values[6],
        values[7],
        index,
        valid,
    )


def settled(
    rerr: Tensor,
    residual: Tensor,
    E: Tensor,
    norm_B: Tensor,
    k: int,
    last: int,
    small: float,
    late: bool,
) -> Tensor:
    """Whether columns k to last, which no caller chose, have found eigenvalues of their own, so that none before them
    was missed: (*).

    Each must have a residual that is small in itself; or, once late, an error bound for its eigenvalue, of a tenth of
    its distance from the wanted ones.
    """
    good = rerr[..., k : last + 1] <= small
    if late:
        distance = (E[..., k : last + 1] - E[..., k - 1 : k]).abs() * norm_B
        good = good | (residual[..., k : last + 1] <= 0.1 * distance)
    return good.all(-1)
