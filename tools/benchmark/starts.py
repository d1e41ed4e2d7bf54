"""Cases that ask for the right pairs from many random starts: one problem, or every problem of the catalogue."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace

import torch


DTYPES = ("float32", "float64", "complex128")


def run(row) -> dict:
    """Failures and the worst eigenvalue error over all starts; the first few failures by name."""
    case, found = row.case, Findings()
    start = time.perf_counter()
    if case.problem["kind"] == "catalogue":
        from benchmark import peers, problems

        for problem in problems.catalogue().catalogue():
            for dtype in DTYPES:
                if problem.supports(getattr(torch, dtype)) and problem.m >= 3 * case.k:
                    _one_problem(row, peers, problem, dtype, found)
    else:
        bound = 10 * row.instance.target()
        for seed in range(case.starts):
            found.one(row.peer, row.instance, seed, case.tol, bound, case.name)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "failures": found.failures,
        "value_error": found.worst,
        "starts": found.starts,
        "warned": found.warned,
        "examples": found.examples,
    }


def _one_problem(row, peers, problem, dtype, found):
    """Both ends of the spectrum, at the tolerance sqrt(eps) that a user gets by default."""
    tol = torch.finfo(getattr(torch, dtype)).eps ** 0.5
    A, B = problem.build(getattr(torch, dtype))
    B_norm = 1.0 if B is None else float(torch.linalg.matrix_norm(B, 2))
    smallest_B = 1.0 if B is None else B_norm / problem.condition
    for largest in (False, True):
        case = SimpleNamespace(k=row.case.k, largest=largest, method="ortho", niter=0, iK="")
        instance = SimpleNamespace(case=case, A=A, B=B, m=problem.m, iK=None)
        instance.exact = problem.extreme(case.k, largest)
        # an eigenvalue is off by at most ||r|| / lambda_min(B) for ||x|| = 1; ||A|| <= radius ||B||
        residual = tol * 2 * problem.radius * B_norm
        bound = problem.error(getattr(torch, dtype)) + 2 * residual / smallest_B
        peer = row.make(instance, row.options)
        for seed in range(row.case.starts):
            name = f"{problem.name} {dtype} {'largest' if largest else 'smallest'}"
            found.one(peer, instance, seed, tol, bound, name)


class Findings:
    """What the starts gave."""

    def __init__(self):
        self.starts = self.failures = self.warned = 0
        self.worst = 0.0
        self.examples = []

    def one(self, peer, instance, seed, tol, bound, name):
        """Solve from start `seed`. A failure: an exception, or values off by more than `bound` without a warning."""
        self.starts += 1
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                E, _ = peer.solve(instance.A, instance.B, seed, tol, X=peer.start(seed))
        except Exception as error:  # a crash is a result here
            self._fail(f"{name}, start {seed}: {type(error).__name__}: {str(error)[:100]}")
            return
        error = float((E.double() - instance.exact).abs().max())
        warned = any("converge" in str(w.message) for w in caught)
        self.warned += warned
        if not warned:
            if error <= bound:
                self.worst = max(self.worst, error)
            else:
                self._fail(f"{name}, start {seed}: eigenvalue off by {error:.1e}, at most {bound:.1e} expected")

    def _fail(self, text):
        self.failures += 1
        if len(self.examples) < 5:
            self.examples.append(text)
