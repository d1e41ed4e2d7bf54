"""What is measured: the cases, who competes in each, and the bars to meet.

A bar reads  metric(peer) <= limit * against_metric(against), or  metric(peer) <= limit  without `against`.
"At least 20 times faster" is a limit of 1/20. The metrics are those of `METRICS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


PEERS = {
    "patched": "torch.lobpcg of the interpreter's PyTorch",
    "upstream": "torch.lobpcg of the unpatched torch/_lobpcg.py, loaded beside it",
    "eigh": "torch.linalg.eigh, by Cholesky reduction where B is given",
    "scipy": "scipy.sparse.linalg.lobpcg, block of k columns, random start",
    "eigsh": "scipy.sparse.linalg.eigsh (ARPACK)",
    "eigsh-invert": "scipy.sparse.linalg.eigsh, shift-invert at 0 (a sparse factorisation)",
    "xitorch": "xitorch.linalg.symeig, exact",
    "xitorch-davidson": "xitorch.linalg.symeig, Davidson forward and CG backward",
}

METRICS = {
    "seconds": "time of the call; of forward and backward together in a backward case",
    "forward": "time of the forward alone, no gradient asked for",
    "residual": "max_j ||A x_j - E_j B x_j|| / ((||A|| + |E_j| ||B||) ||x_j||), 2-norms",
    "absolute": "max_j ||A x_j - E_j B x_j||",
    "value_error": "max_j |E_j - exact E_j|",
    "gradient_error": "||g - exact g||_F / ||exact g||_F, the larger of A's and B's",
    "extra_mb": "growth of the resident memory at its peak over what the problem itself takes, MB",
    "peak_mb": "peak resident memory of the whole process, PyTorch and the set-up included, MB",
    "first_call": "time of a first call on a tiny problem: what a process pays once, not part of the times",
    "setup": "seconds to build the preconditioner, not part of the times",
    "iterations": "iterations",
    "columns": "columns that A was applied to",
    "columns_per_active": "columns of A divided by the active (not converged) columns, summed over the iterations",
    "failures": "starts that crashed, or gave other pairs than the extreme ones without a warning",
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
    peers: tuple = ("patched", "upstream", "scipy")
    more: tuple = ()  # peers that run only when named: slow, or without a bar
    bars: tuple = ()
    largest: bool = False
    tol: float = 1e-8
    absolute: float = 0.0  # absolute residual asked for instead of tol
    dtype: str = "float64"
    layout: str = "strided"
    iK: str = ""  # "amg" (pyamg, smoothed aggregation) or "inverse" (dense)
    method: str = ""
    niter: int = 0  # 0: the peer's default
    backward: bool = False
    kind: str = "time"  # "time", "count" (products and iterations), "starts" (many random starts)
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


_AMG = {"layout": "sparse_csr", "iK": "amg"}
_DENSE = ("patched", "upstream", "eigh", "scipy", "eigsh", "xitorch", "xitorch-davidson")
_UNTIL = 20000  # iterations; a grid of 400 x 400 takes thousands without a preconditioner


def _forward_cases() -> list[Case]:
    cases = []
    for layout in ("csr", "coo"):
        name = f"laplacian-50x50-{layout}"
        bars = (
            Bar("seconds", 0.7, "scipy"),
            Bar("seconds", 0.25, "upstream", against_case="laplacian-50x50-coo"),
        )
        cases.append(
            Case(
                name,
                f"2-D Laplacian n=2500, {layout.upper()}, absolute residual 1e-5",
                _laplacian(50, 50),
                4,
                absolute=1e-5,
                layout=f"sparse_{layout}",
                niter=_UNTIL,
                bars=bars,
            )
        )
    grid = {"problem": _laplacian(400, 400), "k": 4, "layout": "sparse_csr"}
    cases += [
        Case(
            "laplacian-400x400",
            "2-D Laplacian n=160000, CSR, no preconditioner",
            peers=("patched", "scipy"),
            more=("upstream", "eigsh-invert"),
            niter=_UNTIL,
            bars=(Bar("seconds", 0.7, "scipy"),),
            **grid,
        ),
        Case(
            "laplacian-400x400-amg",
            "the same, pyamg as iK",
            peers=("patched", "scipy", "eigsh-invert"),
            iK="amg",
            bars=(Bar("seconds", 1.1, "scipy"), Bar("seconds", 1 / 40, "patched", against_case="laplacian-400x400")),
            **grid,
        ),
        Case(
            "dense-2000",
            "dense n=2000, k=10 smallest",
            _gapped(2000, 10),
            10,
            ("patched", "upstream", "eigh", "scipy"),
            ("eigsh", "xitorch", "xitorch-davidson"),
            bars=(Bar("seconds", 0.3, "upstream"), Bar("seconds", 1.1, "scipy")),
        ),
        Case("dense-500", "dense n=500, k=5 smallest", _gapped(500, 5), 5, _DENSE, bars=(Bar("seconds", 1.0, "eigh"),)),
        Case("dense-500-even", "the same with evenly spaced eigenvalues", {"kind": "even", "m": 500}, 5, _DENSE[:5]),
        Case(
            "generalized-500",
            "dense generalized n=500, k=5, cond(B)=10",
            _gapped(500, 5, condition=10.0),
            5,
            ("patched", "upstream", "eigh", "scipy", "eigsh"),
            ("xitorch", "xitorch-davidson"),
        ),
        Case(
            "batch-256x32",
            "256 matrices 32 x 32, k=3, default method",
            {"kind": "batch", "count": 256, "m": 32},
            3,
            ("patched", "upstream", "eigh"),
            bars=(Bar("seconds", 1.5, "eigh"),),
        ),
        Case(
            "batch-256x32-ortho",
            'the same, method="ortho"',
            {"kind": "batch", "count": 256, "m": 32},
            3,
            ("patched", "upstream"),
            ("eigh",),
            method="ortho",
            bars=(Bar("seconds", 1 / 20, "upstream"),),
        ),
        Case(
            "inverse-500",
            "iK = inverse of A, n=500, condition 1e6, default method",
            {"kind": "even", "m": 500, "smallest": 1e-6},
            5,
            iK="inverse",
            kind="count",
            bars=(Bar("iterations", 15),),
        ),
        Case(
            "products-50x50",
            "products with A, 2-D Laplacian n=2500",
            _laplacian(50, 50),
            4,
            absolute=1e-5,
            layout="sparse_csr",
            niter=_UNTIL,
            kind="count",
            bars=(Bar("columns_per_active", 1.1),),
        ),
        Case(
            "float32-50x50",
            "float32, 2-D Laplacian n=2500, 200 random starts",
            _laplacian(50, 50),
            4,
            ("patched",),
            ("upstream",),
            dtype="float32",
            layout="sparse_csr",
            tol=1e-6,
            niter=_UNTIL,
            kind="starts",
            starts=200,
            bars=(Bar("value_error", 1e-5), Bar("failures", 0)),
        ),
        Case(
            "known-spectra",
            "every problem of the catalogue, every dtype, 100 random starts each",
            {"kind": "catalogue"},
            3,
            ("patched",),
            ("upstream",),
            tol=0,
            kind="starts",
            starts=100,
            bars=(Bar("failures", 0),),
        ),
    ]
    return cases


def _backward_cases() -> list[Case]:
    def case(name, title, problem, k, peers=("patched",), **more):
        return Case(f"grad-{name}", f"gradient: {title}", problem, k, peers, backward=True, **more)

    eigh = ("patched", "upstream", "eigh")
    xitorch = ("xitorch", "xitorch-davidson")
    small_error = Bar("gradient_error", 1e-6)
    cases = [
        case(
            "dense-2000",
            "dense n=2000, k=10",
            _gapped(2000, 10),
            10,
            eigh,
            more=xitorch,
            bars=(Bar("seconds", 0.3, "eigh"), small_error),
        ),
        case("dense-500", "dense n=500, k=5", _gapped(500, 5), 5, eigh + xitorch, bars=(Bar("seconds", 1.0, "eigh"),)),
        case(
            "generalized-500",
            "dense generalized n=500, k=5",
            _gapped(500, 5, condition=10.0),
            5,
            ("patched", "eigh") + xitorch,
            bars=(Bar("seconds", 1.0, "eigh"),),
        ),
    ]
    cases += [
        case(
            f"100x100-{layout}" + ("-amg" if iK else ""),
            f"2-D Laplacian 100 x 100, {layout.upper()}" + (", pyamg as iK" if iK else ""),
            _laplacian(100, 100),
            4,
            layout=f"sparse_{layout}",
            iK=iK,
            niter=0 if iK else _UNTIL,
            bars=(Bar("seconds", 1.6, "patched", "forward"), small_error),
        )
        for layout in ("csr", "coo")
        for iK in ("", "amg")
    ]
    three = (Bar("peak_mb", 3000), Bar("gradient_error", 1e-5))
    cases += [
        case(
            "400x400-amg",
            "2-D Laplacian 400 x 400, pyamg as iK",
            _laplacian(400, 400),
            4,
            bars=(Bar("seconds", 2.0, "patched", "forward"), Bar("extra_mb", 150)),
            **_AMG,
        ),
        case(
            "100x100x100-diagonal",
            "3-D Laplacian, n=10^6, diagonal mass, gradient in A and B",
            _laplacian(100, 100, 100, mass="diagonal"),
            4,
            bars=three,
            **_AMG,
        ),
        case(
            "100x100x100-7point",
            "3-D Laplacian, n=10^6, 7-point mass, gradient in A and B",
            _laplacian(100, 100, 100, mass="7-point"),
            4,
            bars=three,
            **_AMG,
        ),
    ]
    # sides in the ratio 0.72: a gap of 6 % or more after each k below, of 1.9 % or more between any two of the first 16
    for label, sides in (("1e4", (85, 118)), ("1e5", (268, 372)), ("1e6", (848, 1178))):
        cases.append(
            case(
                f"nnz-{label}",
                f"2-D Laplacian n={label}, pyamg, for the growth with nnz",
                _laplacian(*sides),
                4,
                **_AMG,
            )
        )
    for k in (2, 8, 16):
        cases.append(
            case(f"k-{k}", f"2-D Laplacian n=1e5, k={k}, pyamg, for the growth with k", _laplacian(268, 372), k, **_AMG)
        )
    return cases


CASES = {case.name: case for case in _forward_cases() + _backward_cases()}

_SIZES = ("grad-nnz-1e4", "grad-nnz-1e5", "grad-nnz-1e6")
_BLOCKS = ("grad-k-2", "grad-nnz-1e5", "grad-k-8", "grad-k-16")
STUDIES = (
    Study("forward + backward against nnz", "nnz", _SIZES),
    Study("forward + backward against k", "k", _BLOCKS),
)


def select(cases: list[str], peers: list[str]) -> dict[str, list[str]]:
    """Case name -> peers, for globs of names. Nothing named: every case with its own peers.

    A peer that is named runs wherever it can, also where it runs only on request. ValueError if a glob fits nothing.
    """
    for patterns, known, what in ((cases, CASES, "case"), (peers, PEERS, "peer")):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"no {what} fits {pattern!r}; see --list")
    rows = {}
    for name, case in CASES.items():
        if cases and not any(fnmatchcase(name, pattern) for pattern in cases):
            continue
        wanted = [
            peer
            for peer in PEERS
            if (
                any(fnmatchcase(peer, p) for p in peers) and peer in case.peers + case.more
                if peers
                else peer in case.peers
            )
        ]
        if wanted:
            rows[name] = wanted
    if not rows:
        raise ValueError("none of these peers runs in any of these cases; see --list")
    return rows
