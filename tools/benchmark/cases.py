"""What is measured: the cases, who competes in each, and the bars to meet.

A bar reads  metric(peer) <= limit * against_metric(against), or  metric(peer) <= limit  without `against`.
The metrics are those of `METRICS`. Cases of one `group` stand together in the table and in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


PEERS = {
    "patched": "torch.lobpcg of the interpreter's PyTorch",
    "beside": "torch.lobpcg of the interpreter that --beside names",
    "upstream": "torch.lobpcg of the unpatched torch/_lobpcg.py, loaded beside it",
    "eigh": "torch.linalg.eigh, all pairs, by Cholesky reduction where B is given",
    "evr": "scipy.linalg.eigh with subset_by_index: LAPACK's solver for some of the pairs",
    "scipy": "scipy.sparse.linalg.lobpcg, block of k columns, random start",
    "eigsh": "scipy.sparse.linalg.eigsh: ARPACK's Lanczos; with B, its sparse LU factorisation, counted",
    "shift-invert": "scipy.sparse.linalg.eigsh at a shift, SuperLU in a symmetric ordering, the factorisation counted",
    "adjoint": "by hand: pairs by evr or shift-invert, adjoint equations by bordered systems or CG with that LU",
    "primme": "PRIMME: the best of its methods dynamic, GD+k and JDQMR",
    "xitorch": "xitorch.linalg.symeig, exact",
    "xitorch-davidson": "xitorch.linalg.symeig, Davidson forward and CG backward",
}

METRICS = {
    "seconds": "time of the call; of forward and backward together in a case of gradients",
    "forward": "time of the forward alone, no gradient asked for",
    "residual": "max_j |A x_j - E_j B x_j| / ((|A| + |E_j| |B|) |x_j|), 2-norms",
    "value_error": "max_j |E_j - exact E_j|",
    "missed": "pairs whose eigenvalue is further from the exact one than the residual that is asked for explains",
    "gradient_error": "|g - exact g| / |exact g|, Frobenius norms, the larger of A's and B's",
    "trace": "sum of the eigenvalues reached, where the iterations are limited and not the residual",
    "extra_mb": "growth of the resident memory at its peak over what the problem itself takes, MB",
    "peak_mb": "peak resident memory of the whole process, PyTorch and the set-up included, MB",
    "first_call": "time of a first call on a tiny problem: what a process pays once, not part of the times",
    "setup": "seconds to build the preconditioner, not part of the times",
    "iterations": "iterations of the forward that is timed",
    "columns": "columns that A was applied to in it",
    "columns_iK": "columns that the preconditioner, or the factorisation, was applied to in it",
    "failures": "starts that crashed, or gave other pairs than the extreme ones without a warning",
}

GROUPS = {
    "grid": "Laplacians of grids",
    "amg": "the same, algebraic multigrid as iK",
    "graph": "graphs",
    "elements": "finite elements, K x = λ M x, consistent M",
    "dense": "dense",
    "batch": "batches",
    "small": "one small dense call",
    "truncated": "a few iterations",
    "gradient": "forward and backward",
    "check": "checks",
}


@dataclass(frozen=True)
class Bar:
    metric: str
    limit: float
    against: str = ""  # peer; empty: the limit is absolute
    against_metric: str = ""  # the same metric by default
    against_case: str = ""  # the same case by default
    peer: str = "patched"

    def __str__(self) -> str:
        if not self.against:
            return f"{self.metric} <= {self.limit:g}"
        other = self.against + (f" {self.against_metric}" if self.against_metric else "")
        other += f" in {self.against_case}" if self.against_case else ""
        if self.limit < 0.1:
            return f"{self.metric}: {1 / self.limit:g} x less than {other}"
        return f"{self.metric} <= {self.limit:g} x {other}"


@dataclass(frozen=True)
class Case:
    """One problem, the call made on it, the peers and the bars. `problem` is read by problems.py."""

    name: str
    title: str
    problem: dict
    k: int
    peers: tuple = ("patched",)
    group: str = "check"
    more: tuple = ()  # peers that run only when named: slow, or without a bar
    bars: tuple = ()
    largest: bool = False
    tol: float = 1e-8  # the residual that every peer reaches, by whatever tolerance
    dtype: str = "float64"
    layout: str = "strided"
    iK: str = ""  # "amg" (pyamg, smoothed aggregation), "lu" (of a sparse A) or "inverse" (dense)
    method: str = ""
    niter: int = 0  # 0: the peer's default
    truncated: bool = False  # niter iterations are asked for, no residual
    calls: int = 1  # a run makes so many calls, and its time is that of one
    backward: bool = False
    kind: str = "time"  # "time" or "starts" (many random starts)
    starts: int = 0


@dataclass(frozen=True)
class Study:
    """The growth of a metric over several cases: the exponent of a power law fitted to it."""

    name: str
    axis: str  # "nnz" or "k"
    cases: tuple
    metric: str = "seconds"
    limit: float = 1.1
    peer: str = "patched"


def _laplacian(*sizes: int, mass: str = "") -> dict:
    return {"kind": "laplacian", "sizes": list(sizes), "mass": mass}


def _gapped(m: int, k: int, **more: object) -> dict:
    return {"kind": "gapped", "m": m, "wanted": k, **more}


_SPARSE = ("patched", "scipy", "eigsh", "shift-invert", "primme")
_PRECONDITIONED = ("patched", "scipy", "shift-invert", "primme")
_DENSE = ("patched", "eigh", "evr", "eigsh", "primme")
_MORE_DENSE = ("upstream", "scipy", "xitorch", "xitorch-davidson")
_CSR = {"layout": "sparse_csr"}
_AMG = {"layout": "sparse_csr", "iK": "amg"}
_UNTIL = 20000  # iterations; a grid of 400 x 400 takes thousands without a preconditioner


def _grid_cases() -> list[Case]:
    cases = []
    for side, ks in ((50, (4, 20)), (100, (4, 20, 50, 100)), (400, (4, 20))):
        for k in ks:
            name, title = f"laplacian-{side}x{side}-k{k}", f"2-D Laplacian, m = {side**2}, k = {k}"
            peers = {50: _SPARSE + ("upstream",), 100: _SPARSE, 400: ("patched", "shift-invert")}[side]
            more = tuple(peer for peer in _SPARSE + ("upstream",) if peer not in peers)
            cases.append(Case(name, title, _laplacian(side, side), k, peers, "grid", more=more, niter=_UNTIL, **_CSR))
    amg = [((100, 100), k) for k in (4, 20, 50)] + [((400, 400), k) for k in (4, 20)] + [((50, 50, 50), 10)]
    for sides, k in amg:
        name = f"laplacian-{'x'.join(map(str, sides))}-k{k}-amg"
        title = f"{len(sides)}-D Laplacian, m = {sides[0] ** len(sides)}, k = {k}, pyamg"
        slow = ("shift-invert",) if len(sides) == 3 else ()  # fill of a factorisation in three dimensions
        peers = tuple(p for p in _PRECONDITIONED if p not in slow)
        cases.append(Case(name, title, _laplacian(*sides), k, peers, "amg", more=slow, **_AMG))
    return cases


def _graph_and_element_cases() -> list[Case]:
    slow = {"more": ("scipy", "eigsh"), "niter": _UNTIL, **_CSR}
    peers = ("patched", "shift-invert", "primme")
    cases = [
        Case(f"graph-{shape}", f"{title}, m near 20 000, k = 10", _graph(shape), 10, peers, "graph", **slow)
        for shape, title in (("geometric", "random geometric graph"), ("blobs", "ten blobs, nearly disconnected"))
    ]
    for dimension, m, iK in ((1, 10000, "lu"), (2, 10000, ""), (2, 10000, "amg"), (2, 10000, "lu")):
        name = f"elements-{dimension}d" + (f"-{iK}" if iK else "")
        title = f"P1 in {dimension}-D, m near {m}, k = 10" + {"amg": ", pyamg", "lu": ", LU as iK"}.get(iK, "")
        problem = {"kind": "elements", "dimension": dimension, "m": m}
        # ARPACK without a shift takes M's factor and as many steps as the spectrum is wide
        others = {"more": ("scipy", "eigsh"), "niter": _UNTIL, "iK": iK, **_CSR}
        cases.append(Case(name, title, problem, 10, peers, "elements", **others))
    return cases


def _graph(shape: str, m: int = 20000) -> dict:
    return {"kind": "graph", "shape": shape, "m": m}


def _dense_cases() -> list[Case]:
    cases = [
        Case(f"goe-{m}-k{k}", f"GOE, m = {m}, k = {k}", {"kind": "goe", "m": m}, k, _DENSE, "dense", _MORE_DENSE)
        for m in (500, 1000, 2000)
        for k in (5, 20, 50)
    ]
    cases += [
        Case("dense-2000", "dense, 5 % gap, m = 2000, k = 10", _gapped(2000, 10), 10, _DENSE, "dense", _MORE_DENSE),
        Case(
            "generalized-500",
            "dense A and B, cond B = 10, m = 500, k = 5",
            _gapped(500, 5, condition=10.0),
            5,
            _DENSE,
            "dense",
            _MORE_DENSE,
        ),
    ]
    for count, m in ((1000, 16), (256, 32), (64, 200), (16, 600)):
        problem = {"kind": "batch", "count": count, "m": m}
        name, title = f"batch-{count}x{m}", f"{count} matrices, m = {m}, k = 3"
        cases.append(Case(name, title, problem, 3, ("patched", "eigh", "evr"), "batch", ("upstream",)))
    for m in (10, 50, 100):
        for backward in (False, True):
            name = f"small-{m}" + ("-grad" if backward else "")
            title = f"one call, m = {m}, k = 3" + (", with backward" if backward else "")
            problem, peers = _gapped(m, 3), ("patched", "eigh") if backward else ("patched", "eigh", "evr")
            cases.append(Case(name, title, problem, 3, peers, "small", calls=200, backward=backward))
    for k in (64, 256):
        for niter in (5, 20):
            name, title = f"truncated-k{k}-niter{niter}", f"float32 adjacency, m = 4000, k = {k}, {niter} iterations"
            limits = {"niter": niter, "truncated": True, "largest": True, "dtype": "float32", **_CSR}
            problem, peers = {"kind": "graph", "shape": "adjacency", "m": 4000}, ("patched", "upstream", "scipy")
            cases.append(Case(name, title, problem, k, peers, "truncated", **limits))
    return cases


def _checks() -> list[Case]:
    return [
        Case(
            "inverse-500",
            "iK = inverse of A, m = 500, condition 1e6",
            {"kind": "even", "m": 500, "smallest": 1e-6},
            5,
            ("patched", "scipy"),
            iK="inverse",
            bars=(Bar("iterations", 15),),
        ),
        Case(
            "float32-50x50",
            "float32, 2-D Laplacian, m = 2500, 200 random starts",
            _laplacian(50, 50),
            4,
            ("patched",),
            more=("upstream",),
            dtype="float32",
            tol=1e-6,
            niter=_UNTIL,
            kind="starts",
            starts=200,
            bars=(Bar("value_error", 1e-5), Bar("failures", 0)),
            **_CSR,
        ),
        Case(
            "known-spectra",
            "every problem of the catalogue, every dtype, 100 random starts each",
            {"kind": "catalogue"},
            3,
            ("patched",),
            more=("upstream",),
            tol=0,
            kind="starts",
            starts=100,
            bars=(Bar("failures", 0),),
        ),
    ]


def _backward_cases() -> list[Case]:
    def case(name, title, problem, k, peers=("patched",), **more):
        return Case(f"grad-{name}", f"gradient, {title}", problem, k, peers, "gradient", backward=True, **more)

    xitorch = ("upstream", "xitorch", "xitorch-davidson")
    dense = {"peers": ("patched", "eigh", "adjoint"), "more": xitorch}
    by_hand = ("patched", "adjoint")
    small_error = Bar("gradient_error", 1e-6)
    cases = [
        case("dense-2000", "dense, m = 2000, k = 10", _gapped(2000, 10), 10, bars=(small_error,), **dense),
        case("dense-500", "dense, m = 500, k = 5", _gapped(500, 5), 5, **dense),
        case(
            "generalized-500",
            "dense A and B, m = 500, k = 5",
            _gapped(500, 5, condition=10.0),
            5,
            ("patched", "eigh"),
            more=xitorch,
        ),
    ]
    cases += [
        case(
            "100x101" + ("-amg" if iK else ""),
            "2-D Laplacian 100 x 101, k = 4" + (", pyamg" if iK else ""),
            _laplacian(100, 101),
            4,
            by_hand,
            iK=iK,
            niter=0 if iK else _UNTIL,
            bars=(Bar("seconds", 2.0, "patched", "forward"), small_error),
            **_CSR,
        )
        for iK in ("", "amg")
    ]
    three = (Bar("peak_mb", 3000), Bar("gradient_error", 1e-5))
    cases += [
        case(
            "400x400-amg",
            "2-D Laplacian 400 x 400, k = 4, pyamg",
            _laplacian(400, 400),
            4,
            by_hand,
            bars=(Bar("seconds", 2.0, "patched", "forward"), Bar("extra_mb", 150)),
            **_AMG,
        ),
        case(
            "100x100x100-diagonal",
            "3-D Laplacian, m = 10^6, k = 4, diagonal B, pyamg",
            _laplacian(100, 100, 100, mass="diagonal"),
            4,
            bars=three,
            **_AMG,
        ),
        case(
            "100x100x100-7point",
            "3-D Laplacian, m = 10^6, k = 4, 7-point B, pyamg",
            _laplacian(100, 100, 100, mass="7-point"),
            4,
            bars=three,
            **_AMG,
        ),
    ]
    # sides in the ratio 0.72: a gap of 6 % or more after each k below, of 1.9 % or more between any two of the first 16
    for label, sides in (("1e4", (85, 118)), ("1e5", (268, 372)), ("1e6", (848, 1178))):
        title = f"2-D Laplacian, m = {label}, k = 4, pyamg: growth with nnz"
        cases.append(case(f"nnz-{label}", title, _laplacian(*sides), 4, **_AMG))
    for k in (2, 8, 16):
        title = f"2-D Laplacian, m = 1e5, k = {k}, pyamg: growth with k"
        cases.append(case(f"k-{k}", title, _laplacian(268, 372), k, **_AMG))
    return cases


CASES = {
    case.name: case
    for cases in (_grid_cases, _graph_and_element_cases, _dense_cases, _backward_cases, _checks)
    for case in cases()
}

_SIZES = ("grad-nnz-1e4", "grad-nnz-1e5", "grad-nnz-1e6")
_BLOCKS = ("grad-k-2", "grad-nnz-1e5", "grad-k-8", "grad-k-16")
STUDIES = (
    Study("forward + backward against nnz", "nnz", _SIZES),
    Study("forward + backward against k", "k", _BLOCKS),
)


def select(cases: list[str], peers: list[str], beside: bool = False) -> dict[str, list[str]]:
    """Case name -> peers, for globs of names. Nothing named: every case with its own peers.

    A peer that is named runs wherever it can, also where it runs only on request; `beside` adds that peer wherever
    torch.lobpcg runs. ValueError if a glob fits nothing.
    """
    for patterns, known, what in ((cases, CASES, "case"), (peers, PEERS, "peer")):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"no {what} fits {pattern!r}; see --list")
    rows = {}
    for name, case in CASES.items():
        if cases and not any(fnmatchcase(name, pattern) for pattern in cases):
            continue
        wanted = {
            peer
            for peer in case.peers + case.more
            if (any(fnmatchcase(peer, p) for p in peers) if peers else peer in case.peers)
        }
        if beside and "patched" in wanted:
            wanted.add("beside")
        if wanted:
            rows[name] = [peer for peer in PEERS if peer in wanted]
    if not rows:
        raise ValueError("none of these peers runs in any of these cases; see --list")
    return rows
