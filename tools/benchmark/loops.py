"""torch.lobpcg in a loop: 200 training steps that start from the last eigenvectors, and what an exact start costs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.testing._internal import lobpcg_ordinary as ordinary


STEPS = 200


# Training -----------------------------------------------------------------------------------------------------------


def training(dtype: torch.dtype) -> Iterator[str]:
    """One line for each loop: what was said, how many steps had wrong eigenvalues, how memory grew."""
    yield f"{STEPS} training steps in {str(dtype)[6:]}, each started from the eigenvectors of the last one:"
    for name, loop in (
        ("dense 64", lambda: _dense(dtype, {})),
        ('dense 64, method="ortho"', lambda: _dense(dtype, {"method": "ortho"})),
        ('dense 64, method="ortho", losses of X', lambda: _dense(dtype, {"method": "ortho"}, vectors=True)),
        ("sparse graph 2000, learned weights", lambda: _graph(dtype)),
    ):
        yield f"{name:40} {loop()}"


class _Log:
    """What the steps of one loop gave."""

    def __init__(self, dtype: torch.dtype):
        self.bars, self.eps = ordinary.bars(dtype), torch.finfo(dtype).eps
        self.steps = self.warned = self.close = self.refused = self.wrong = self.checked = 0
        self.first, self.worst, self.resident, self.start = "", 0.0, [], time.monotonic()

    def step(self, function: Callable, rounding: float = 0.0) -> tuple | None:
        """Result of one step, None if it was refused. rounding: the relative error that it makes in the gradient."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = function()
            except RuntimeError as error:
                self.refused += 1
                self.first = self.first or str(error)
                result = None
        texts = [str(w.message) for w in caught if "lobpcg" in str(w.message)]
        self.steps += 1
        if texts and rounding > 1e-2:
            self.close += 1
        elif texts:
            self.warned += 1
            self.first = self.first or texts[0]
        if self.steps % 10 == 0:
            self.resident.append(_resident())
        return result

    def check(self, E: torch.Tensor, exact: torch.Tensor, norm: float) -> None:
        """Compare eigenvalues with the exact ones of the same matrix."""
        allowed = torch.clamp(self.bars.value * exact.abs(), min=20 * self.eps * norm)
        over = float(((E.double() - exact).abs() / allowed).max())
        self.checked += 1
        self.wrong += not over <= 1
        self.worst = max(self.worst, over)

    def __str__(self) -> str:
        grown = (max(self.resident[10:]) - max(self.resident[5:10])) / 2**20 if self.resident[-1] else math.nan
        text = f"warned {self.warned} (and {self.close} where rounding alone is 1e-2), refused {self.refused}, "
        text += f"wrong pairs {self.wrong} of {self.checked} checked "
        text += f"(error over allowed {self.worst:.1e}), memory {grown:+.1f} MB from steps 60-100 to 110-200, "
        text += f"{time.monotonic() - self.start:.0f} s"
        return text + (f"; first: {self.first[:150]}" if self.first else "")


def _resident() -> int:
    """Bytes that this process holds; 0 where the system does not tell."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * 4096 if statistics.exists() else 0


def _dense(dtype: torch.dtype, options: dict, vectors: bool = False, m: int = 64, k: int = 3) -> _Log:
    """Learned corrections to a matrix that drifts: eigenvalues cross every few steps, also into the top k."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64)
    Q, M = torch.linalg.qr(normal(m, m)).Q, normal(m)
    correction = torch.zeros(m, m, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([correction], lr=2e-2)
    log, X = _Log(dtype), None
    for t in range(STEPS):
        if t % 25 == 0:
            first, last = 4 * uniform(2, m)
        w = first + (last - first) * (t % 25) / 24
        A = ((Q * w) @ Q.T).to(dtype) + correction
        exact, norm, gap = _dense_exact(A, k)

        def step(A=A, X=X):
            E, Y = torch.lobpcg(A, k=k, X=X, **options)
            loss = (E - torch.arange(k, 0, -1, dtype=dtype)).square().sum()
            if vectors:
                loss = loss + 0.01 * (M.to(dtype)[:, None] * Y.square()).sum()
            optimizer.zero_grad()
            loss.backward()
            return E.detach(), Y.detach()

        pairs = log.step(step, log.eps * norm / gap)
        if pairs is not None:
            E, X = pairs
            log.check(E, exact, norm)
            torch.nn.utils.clip_grad_norm_(correction, 1.0)
            optimizer.step()
    return log


def _dense_exact(A, k):
    e = torch.linalg.eigvalsh((A + A.mT).detach().double() / 2).flip(0)
    return e[:k], float(e.abs().max()), float(-e[: k + 1].diff().max())


def _graph(dtype: torch.dtype, m: int = 2000, k: int = 4) -> _Log:
    """Weights of a nearest-neighbour graph, learned so that it holds together and two groups of nodes part."""
    problem = next(
        p
        for p in (ordinary.draw(s, dtype, m, "graph") for s in range(100, 1000))
        if p.A.m == m and p.A.entries is not None and not p.largest and p.A.layout != torch.strided
    )
    matrix, g = problem.A, torch.Generator().manual_seed(0)
    weights = matrix.parameter.clone().double().clamp_min(1e-3).log().to(dtype).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=2e-2)
    sides = torch.randn(m, generator=g, dtype=torch.float64).sign().to(dtype)
    log, X = _Log(dtype), None
    for t in range(STEPS):
        A = matrix.assemble(matrix.values(weights.exp()))

        def step(A=A, X=X):
            E, Y = torch.lobpcg(A, k=k, X=X, largest=False)
            loss = -E[1:].sum() - (sides @ Y).square().sum() / m + 1e-3 * weights.square().mean()
            optimizer.zero_grad()
            loss.backward(retain_graph=False)
            return E.detach(), Y.detach()

        pairs = log.step(step)
        if pairs is not None:
            if t % 20 == 19:
                e = torch.linalg.eigvalsh(A.detach().to_dense().double())
                log.check(pairs[0], e[:k], float(e.abs().max()))
            X = pairs[1]
            optimizer.step()
    return log


# Starts -------------------------------------------------------------------------------------------------------------


def starts(dtype: torch.dtype) -> Iterator[str]:
    """For each problem: iterations from the default start and from exact eigenvectors, and their ratio."""
    yield f"{str(dtype)[6:]:40} {'m':>5} {'k':>2}   cold   exact X  ratio   products cold  exact X  ratio"
    ratios = []
    for family, largest, k, seed in (
        ("grid", False, 3, 4),
        ("graph", False, 4, 5),
        ("normalised cut", False, 4, 6),
        ("random sparse", True, 4, 7),
        ("elements", False, 3, 8),
        ("Wishart", True, 5, 1),
        ("GOE", True, 3, 0),
        ("spin chain", False, 2, 9),
    ):
        problem = _large(family, largest, seed, dtype)
        oracle = ordinary.Oracle(ordinary.Ordinary(family, seed, problem.A, problem.B, k, largest, problem.dtype))
        X = oracle.V[:, :k].to(problem.dtype)
        cold, warm = (_iterations(problem, k, largest, start) for start in (None, X))
        cold_products, warm_products = (_products(problem, k, largest, start) for start in (None, X))
        ratios.append((warm[0] / cold[0], warm_products / cold_products))
        yield (
            f"{family:40} {problem.A.m:5} {k:2} {cold[0]:6} {warm[0]:9} {ratios[-1][0]:6.0%} "
            f"{cold_products:15} {warm_products:8} {ratios[-1][1]:6.0%}{cold[1]}{warm[1]}"
        )
    for name, column in zip(("iterations", "products"), zip(*ratios)):
        yield f"{name}: mean ratio {sum(column) / len(column):.0%}, worst {max(column):.0%}"


def _large(family, largest, seed, dtype):
    """The first problem of the family from seed on with 300 to 1100 unknowns, at the end asked for."""
    for s in range(seed, seed + 4000):
        problem = ordinary.draw(s, dtype, 1100, family)
        if 300 <= problem.A.m <= 1100 and problem.largest == largest:
            return problem
    raise AssertionError(f"no problem of {family} is large")


def _iterations(problem, k, largest, X):
    steps, (A, _), B = [0], problem.A.leaf(False), problem.B and problem.B.leaf(False)[0]

    def tracker(worker):
        steps[0] = worker.ivars["istep"]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.lobpcg(A.detach(), k, B, X, largest=largest, tracker=tracker)
    texts = [str(w.message) for w in caught if "lobpcg" in str(w.message)]
    return steps[0], f"; warned: {texts[0][:80]}" if texts else ""


def _products(problem, k, largest, X):
    """Columns that A was applied to; A is a callable, so the cold start is a random block of the default size."""
    count, A, B = [0], problem.A.leaf(False)[0].detach(), problem.B and problem.B.leaf(False)[0]

    def product(V):
        count[0] += V.shape[-1]
        return A @ V

    if X is None:
        g = torch.Generator().manual_seed(0)
        X = torch.randn(problem.A.m, k + max(4, k), generator=g, dtype=problem.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.lobpcg(product, k, B, X, largest=largest)
    return count[0]
