"""Which pairs have converged and which directions go on, from the residuals of an iteration.

The iteration's transfer of numbers that decide is here.
"""

from typing import Callable, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import is_single


# Errors that a call without tol allows, in single and in double precision: of an eigenvalue relative to itself, and of
# a vector (and so of a gradient), which is asked for where a derivative may follow.
_VALUE_ERROR = {True: 1e-3, False: 1e-7}
_VECTOR_ERROR = {True: 1e-3, False: 1e-6}


class Measures(NamedTuple):
    """How good the pairs of an iteration are.

    e: (*, n) eigenvalues.  rerr: (*, n) residuals relative to (|A| + |E| |B|) |x|.  rho: (*, n) norms of D^-1/2 r, D =
    diag(B); size N and noise: (*, n), what rounding by a relative eps changes in rho and in E, over eps.  None of these
    three changes when unknowns are scaled.  eps: unit rounding of the blocks.
    """

    e: Tensor
    rerr: Tensor
    rho: Tensor
    size: Tensor
    noise: Tensor
    eps: float

    @property
    def floor(self) -> Tensor:
        """rho below which rounding allows no better: (*, n)."""
        return 2.0 * self.eps * self.size

    @property
    def level(self) -> Tensor:
        """rho / N: eps is rounding level; (*, n)."""
        return self.rho / self.size

    def gap(self, k: int) -> Tensor:
        """Distances of the first k eigenvalues to those of the guards, the columns behind them: (*, k); 0 without
        guards.  A guard that has not converged may be closer by its own residual."""
        if self.e.shape[-1] == k:
            return torch.zeros_like(self.e)
        d = (self.e[..., :k, None] - self.e[..., None, k:]).abs()
        return torch.maximum(d - self.rho[..., None, k:], 0.1 * d).amin(-1)

    def value_error(self, k: int) -> Tensor:
        """Bounds on the errors of the first k eigenvalues: the smaller of rho and rho^2 / gap; (*, k)."""
        rho = self.rho[..., :k]
        return rho * (rho / self.gap(k).clamp_min(1e-290)).clamp_max(1.0)

    def inaccurate(self, k: int) -> Tensor:
        """Whether an eigenvalue misses what a call without tol promises, max(1e-3 |E|, 20 eps N) in single precision
        and max(1e-7 |E|, 20 eps N) in double: (*, k)."""
        allowed = torch.maximum(
            _VALUE_ERROR[is_single(self.eps)] * self.e[..., :k].abs(),
            10.0 * self.floor[..., :k],
        )
        return self.value_error(k) > allowed

    def accurate(self, k: int, tol: float, vectors: bool) -> Tensor:
        """Whether the first k pairs are as accurate as a call without tol asks for: (*, k).

        The eigenvalue to tol relative to itself, a third of what is promised, or to ten times its noise; with `vectors`
        the vector too, if guards tell its gap.  Or rounding allows no better.
        """
        rho, floor = self.rho[..., :k], self.floor[..., :k]
        if self.e.shape[-1] == k:
            return torch.ones_like(rho, dtype=torch.bool)
        noise = 10.0 * self.eps * self.noise[..., :k]
        allowed = torch.maximum(tol * self.e[..., :k].abs(), noise)
        good = self.value_error(k) <= allowed
        if vectors:
            good = good & (rho <= _VECTOR_ERROR[is_single(self.eps)] * self.gap(k))
        return good | (rho <= floor)


class Rules(NamedTuple):
    """What is decided by.  k: pairs that are wanted.  Of the first `candidates` columns those go on that have not been
    done with, of the first `more` where the wanted pairs have converged but not settled.

    loss: Ritz.d under which digits were lost.
    """

    k: int
    candidates: int
    more: int
    loss: float


class Verdict(NamedTuple):
    """lead: wanted pairs converged before the first that has not, the fewest over a batch; active: columns that go on,
    the most over a batch; index (*, active): those columns; valid (*, active): one, or zero for a filler.

    Of each matrix, levels: largest rho / N of a wanted pair that has not converged; awaited: how many have not, -1
    where all have but not settled; traces: the sum of the wanted eigenvalues; sizes: the largest N of one.

    worst: largest rerr of a wanted pair that has not converged; total: sum of all rerr (NaN where one is); least:
    the smallest kept squared sine of Ritz.d; losses: whether one lies under the bound asked about; least_B,
    least_K: smallest w^H B w and r^H K r met; nearest: least rho / N over a batch of the worst wanted pair.
    """

    lead: int
    active: int
    worst: float
    levels: List[float]
    awaited: List[float]
    traces: List[float]
    sizes: List[float]
    total: float
    least: float
    losses: bool
    least_B: float
    least_K: float
    nearest: float
    index: Tensor  # type: ignore[assignment]  # tuple's method of this name is not called
    valid: Tensor


class Progress:
    """When each matrix of a batch last came closer to its pairs, in iterations."""

    def __init__(self, count: int, k: int, sign: float, eps: float) -> None:
        self.sign, self.eps, self.noise = sign, eps, 20.0 * k * eps
        self.count = count
        self.restart(0)

    def restart(self, step: int) -> None:
        """Other columns stand in the block."""
        # Wanted pairs, and the columns that have to settle behind them, are two goals: a matrix may fall back from the
        # second to the first without having lost anything.
        self.best = [[float("inf")] * self.count for _ in range(2)]
        self.traces = [float("inf")] * self.count
        self.steps = [step] * self.count
        self.going = [True] * self.count

    def note(self, step: int, verdict: Verdict, loss: Callable[[], float]) -> None:
        """Take note of an iteration; loss: how far the basis is from an orthonormal one.

        Progress is a residual lower by a tenth.  Or it is one that rises by 100 while the trace falls by more than
        rounding and that loss explain: then a pair that was missed before has appeared.  Else a rise is noise, or a
        basis that falls apart.
        """
        for i, (level, awaited) in enumerate(zip(verdict.levels, verdict.awaited)):
            self.going[i] = awaited != 0
            best, trace = self.best[awaited < 0], verdict.traces[i] * self.sign
            closer = level < 0.9 * best[i]
            if not closer and level > 100.0 * best[i]:
                gain, noise = self.traces[i] - trace, self.noise * verdict.sizes[i]
                # Beyond three digits the eigenvalues are no bound of anything.
                lost = loss() if gain > noise else 1.0
                closer = lost < 1e-3 and gain > noise * (1.0 + lost / self.eps)
            if closer:
                best[i], self.traces[i], self.steps[i] = level, trace, step

    def stalled(self, step: int) -> bool:
        """Whether none of the matrices that wait for a pair came closer lately: in 50 iterations near rounding level,
        elsewhere in 1000 (convergence may pause, not that long)."""
        for i, last in enumerate(self.steps):
            near = self.best[0][i] < 100.0 * self.eps
            if self.going[i] and step - last < (50 if near else 1000):
                return False
        return True


def judge_one(
    measures: Measures,
    done: Tensor,
    locked: Tensor,
    settled: Optional[Tensor],
    rules: Rules,
    d: Tensor,
    least: float,
    definite: Optional[Tensor],
    index: Tensor,
) -> Verdict:
    """Of a single problem, whose small matrices are in host memory: decided on the host, which spares twenty small
    kernels.

    done (n,): which pairs have converged; locked (n,): which need no direction any more; settled: whether no pair was
    missed; d, least: as in Ritz; definite: least_B and least_K.  index: the columns that went on
    before, returned if they are what goes on now.
    """
    rerr, n, p = measures.rerr, measures.rerr.shape[0], d.shape[0]
    numbers = [rerr]
    if p > 0:
        numbers.append(d)
    if definite is not None:
        numbers.append(definite)
    values: List[float] = (torch.cat(numbers) if len(numbers) > 1 else rerr).tolist()
    is_done: List[bool] = done.tolist()
    is_locked: List[bool] = locked.tolist()
    k, candidates, lead = rules.k, rules.candidates, 0
    while lead < k and is_done[lead]:
        lead += 1
    unsettled = settled is not None and lead == k and not bool(settled)
    if unsettled:
        lead, candidates = k - 1, rules.more
    running: List[int] = []
    total, worst, level, awaited = 0.0, 0.0, 0.0, 0
    levels: List[float] = measures.level.tolist()
    for i in range(n):
        total += values[i]
        if i < candidates and lead < k and not is_locked[i]:
            running.append(i)
        if (i < k and not is_done[i]) or (unsettled and i < rules.more):
            worst, level = max(worst, values[i]), max(level, levels[i])
            awaited += 1
    losses = least < rules.loss
    for i in range(n, n + p):
        if values[i] > 0.0:
            least = min(least, values[i])
        losses = losses or values[i] < rules.loss
    if len(running) != index.shape[0] or len(running) < n:
        index = torch.tensor(running, dtype=torch.int64, device=index.device)
    least_B, least_K = 1.0, 1.0
    if definite is not None:
        least_B, least_K = values[n + p], values[n + p + 1]
    return Verdict(
        lead,
        len(running),
        worst,
        [level],
        [-1.0 if unsettled else awaited],
        [sum(measures.e[:k].tolist())],
        [max(measures.size[:k].tolist())],
        total,
        least,
        losses,
        least_B,
        least_K,
        max(levels[:k]),
        index,
        rerr,
    )


def judge_batch(
    measures: Measures,
    done: Tensor,
    locked: Tensor,
    settled: Optional[Tensor],
    rules: Rules,
    d: Tensor,
    masked: Tensor,
    definite: Tensor,
) -> Verdict:
    """The same decisions as masks over the batch; masked: (*) how many rows of the last W were fillers."""
    k, rerr = rules.k, measures.rerr
    lead = torch.cumprod(done[..., :k], -1).sum(-1)  # (*)
    awaited = ~done[..., :k]
    number = awaited.sum(-1).to(rerr.dtype)
    going = ~locked[..., : rules.more]
    waiting = going & (lead < k).unsqueeze(-1)
    waiting[..., rules.candidates :] = False
    if settled is not None:
        unsettled = ((lead == k) & ~settled).unsqueeze(-1)
        waiting = waiting | (unsettled & going)
        awaited = torch.cat(
            [awaited, unsettled.expand(lead.shape + (rules.more - k,))], -1
        )
        lead = lead - unsettled.squeeze(-1).to(lead.dtype)
        number = number.masked_fill(unsettled.squeeze(-1), -1.0)
    least, losses = torch.ones_like(definite[0]), torch.zeros_like(definite[0])
    if d.shape[-1] > 0:
        least = d.masked_fill(d <= 0.0, 1.0).min()
        # Fillers show as zeros in d: more small ones than those are losses.
        losses = ((d < rules.loss).sum(-1) - masked).max().to(rerr.dtype)
    counts = [waiting.sum(-1).max().to(rerr.dtype), lead.min().to(rerr.dtype)]
    count = awaited.shape[-1]
    sizes = [
        (rerr[..., :count] * awaited).max(),
        rerr.sum(),
        least,
        losses,
        measures.level[..., :k].amax(-1).min(),
    ]
    level = (measures.level[..., :count] * awaited).amax(-1)
    trace, size = measures.e[..., :k].sum(-1), measures.size[..., :k].amax(-1)
    each = [T.reshape(-1) for T in (level, number, trace, size)]
    values: List[float] = torch.cat(
        [torch.stack(counts + sizes), definite, *each]
    ).tolist()
    # of each matrix, behind nine numbers of the batch
    some = lead.numel()
    levels, counts_of_each, traces, scales = (
        values[i : i + some] for i in range(9, 9 + 4 * some, some)
    )
    active = int(values[0])
    order = torch.sort(waiting.to(torch.int8), stable=True, dim=-1, descending=True)[1]
    index = order[..., :active]
    valid = waiting.gather(-1, index).to(rerr.dtype)
    return Verdict(
        int(values[1]),
        active,
        values[2],
        levels,
        counts_of_each,
        traces,
        scales,
        values[3],
        values[4],
        values[5] > 0.0,
        values[7],
        values[8],
        values[6],
        index,
        valid,
    )


def settled(
    measures: Measures,
    residual: Tensor,
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
    e, rerr = measures.e, measures.rerr
    good = rerr[..., k : last + 1] <= small
    if late:
        distance = (e[..., k : last + 1] - e[..., k - 1 : k]).abs() * norm_B
        good = good | (residual[..., k : last + 1] <= 0.1 * distance)
    return good.all(-1)
