# mypy: allow-untyped-defs
"""Eigenproblems as users have them, with common losses, and an oracle that says how right torch.lobpcg is on them.

``draw(seed, dtype)`` returns a problem, ``examine(problem)`` what became of it: two forward passes and one gradient
for each loss, each with its error and a verdict. A verdict names what a user would see::

    right            no word, and the error is small
    silent           no word, and the error is above 5 % (single precision) or 1e-3 (double)
    loose            no word, and the error is between the bars of "right" and "silent"
    false alarm      warned of, though the error is at most 1e-2 (single) or 1e-4 (double)
    warned           warned of, and the error is larger than that
    refused          an exception, though the derivative exists
    rounding         warned of, where rounding the given matrices accounts for it
    undetermined     rounding the given matrices changes this gradient by half of itself or more
    unsaid           one of these two without a word, and the error is above the bar of "silent": not wrong, given the
                     matrices, but a user would want to know
    kink             no word, and off, because entries of X nearer to zero than X is accurate have another sign: a loss
                     of |x| has a kink there

The oracle is dense and in double precision: a copy of the matrices *as they are in the dtype given*, all their
eigenpairs, and the derivative as a sum over all of them,

    dX_j = sum_{i != j} V_i V_i^H (dA - E_j dB) X_j / (E_j - E_i) - X_j X_j^H dB X_j / 2 .

**What rounding allows.** In exact arithmetic a matrix that was rounded once more, by a relative eps of the given
dtype, has other eigenpairs: with C = V^H (dA - E_j dB) X, the pairs i and j mix by C_ij / (E_j - E_i). For a matrix
alone C_ij is taken as eps |A|_2, what a backward stable factorisation in that dtype may do. For a pencil the norms of
A and B say little where they are graded, so C_ij is four times its root mean square over independent relative
roundings of all entries, eps sqrt(sum_ab |V_ai|^2 |M_ab|^2 |X_bj|^2), which does not change when unknowns are scaled.
The exact gradient is evaluated at two such perturbed sets of pairs (clusters by a small eigenproblem, entries of X
rounded as well), and once with the entries of X set to zero that are below four times the larger change; twice the
largest difference is what rounding allows of this loss. A gradient is not called wrong below that, nor a warning
false above it. A kink is told in the same way, with the entries below 1e-3 (single) or 1e-6 (double) of the root mean
square of their vector set to zero.

**Eigenvalues and vectors.** An eigenvalue may be off by 1e-3 (single) or 1e-7 (double) of itself or by 20 eps |A|_2;
for a pencil the latter is 20 times the root mean square above, for i = j. The angle between an eigenvector and the
span of the vectors of its cluster may be 1e-2 (single) or 1e-4 (double), or 20 times the mixing above; where no
gradient is asked for, also twice sqrt(eps) times the norm over the gap, as tol promises.

**Exact zeros.** The gradient of a constant, such as the norm of orthonormal X, has no relative error. Where the exact
gradient is below 1e-10 times the size that a cotangent of this norm has in a random direction, or it and what
rounding makes of it are below 30 eps times that size, the error is relative to that size, and its verdict begins with
"zero". The norm is that of the cotangent at X or at a random X, whichever is larger: a loss may be at its minimum.
"""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch


__all__ = ["FAMILIES", "LOSSES", "Matrix", "Ordinary", "Report", "draw", "examine"]


# Problems -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix made from a parameter: the entries themselves, or what a user learns (points, weights of edges).

    ``parameter`` is in the dtype of the problem. ``entries`` maps it to the values at ``index`` (2, nnz), or to the
    whole matrix where index is None; without it, the parameter is these values.
    """

    m: int
    parameter: torch.Tensor
    index: Optional[torch.Tensor] = None
    entries: Optional[Callable[..., Any]] = None
    layout: torch.layout = torch.strided

    def values(self, parameter):
        return parameter if self.entries is None else self.entries(parameter)

    def assemble(self, values):
        if self.index is None:
            return values
        A = torch.sparse_coo_tensor(
            self.index, values, (self.m, self.m), check_invariants=False
        )
        if self.layout == torch.strided:
            return A.to_dense()
        return A.coalesce() if self.layout == torch.sparse_coo else A.to_sparse_csr()

    def leaf(self, needs_grad):
        """The matrix and the leaf that its gradient arrives at."""
        if self.entries is None:
            A = self.assemble(self.parameter).clone().requires_grad_(needs_grad)
            return A, A
        parameter = self.parameter.clone().requires_grad_(needs_grad)
        return self.assemble(self.values(parameter)), parameter

    def wide(self):
        """The matrix as it is in its dtype, dense and in double precision."""
        values = self.values(self.parameter).detach()
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
        return Matrix(self.m, values, self.index).assemble(values).to_dense()

    def read(self, gradient):
        """What autograd left on the leaf, as the values that ``pull_back`` returns, in double precision."""
        if self.entries is None and self.index is not None:
            gradient = gradient.to_dense()[self.index[0], self.index[1]]
        return gradient.to(torch.complex128 if gradient.is_complex() else torch.float64)

    def pull_back(self, W, X, noise=0.0, generator=None):
        """Herm(W X^H) on the entries of the matrix, then on its parameter. noise: relative rounding of the entries."""
        if self.index is None:
            g = W @ X.mH
            g = (g + g.mH) / 2
        else:
            r, c = self.index
            g = ((W[r] * X[c].conj()).sum(-1) + (X[r] * W[c].conj()).sum(-1)) / 2
        if noise:
            g = g * (
                1
                + noise * torch.randn(g.shape, dtype=torch.float64, generator=generator)
            )
        if self.entries is None:
            return g
        parameter = self.parameter.to(torch.float64).requires_grad_(True)
        return torch.autograd.grad(self.entries(parameter), parameter, g)[0]


@dataclass(frozen=True, eq=False)
class Ordinary:
    """k extreme pairs of A x = lambda B x at one end, with default arguments otherwise."""

    family: str
    seed: int
    A: Matrix
    B: Optional[Matrix]
    k: int
    largest: bool
    dtype: torch.dtype
    learn_B: bool = False

    def __repr__(self):
        end, layout = "largest" if self.largest else "smallest", str(self.A.layout)[6:]
        return f"{self.family} seed={self.seed} m={self.A.m} k={self.k} {end} {layout} {str(self.dtype)[6:]}"


class _Draw:
    """Random numbers of one problem, in double precision; the global random state is neither read nor set."""

    def __init__(self, *key):
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    def normal(self, *shape, dtype=torch.float64):
        return torch.randn(shape, dtype=dtype, generator=self.generator)

    def uniform(self, *shape):
        return torch.rand(shape, dtype=torch.float64, generator=self.generator)

    def integer(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, p):
        return float(self.uniform()) < p

    def pick(self, *values):
        return values[self.integer(0, len(values) - 1)]

    def size(self, most):
        """Mostly a few hundred; a few as large as allowed."""
        t = float(self.uniform())
        bands = (
            (0.3, 20, 60),
            (0.8, 60, 300),
            (0.93, 300, 640),
            (0.98, 700, 1100),
            (1.0, 2000, 2000),
        )
        low, high = next((low, high) for upto, low, high in bands if t <= upto)
        return min(self.integer(low, high), most)


def _real_inner(U, V):
    return (U.conj() * V).sum(0).real


def _symmetric(A):
    return (A + A.mH) / 2


def _dense(A, dtype, **options):
    return Matrix(A.shape[-1], _symmetric(A).to(dtype), **options)


def _sparse(m, index, values, dtype, layout, entries=None):
    """A matrix from its entries; duplicates are added up where the values are the parameter."""
    if entries is not None:
        return Matrix(m, values.to(dtype), index, entries, layout)
    A = torch.sparse_coo_tensor(
        index, values, (m, m), check_invariants=False
    ).coalesce()
    return Matrix(m, A.values().to(dtype), A.indices(), None, layout)


def _layout(draw):
    return draw.pick(
        torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csr
    )


def _goe(draw, dtype, most):
    m = draw.size(most)
    return _dense(draw.normal(m, m) / math.sqrt(m), dtype), None, draw.chance(0.5)


def _wishart(draw, dtype, most):
    m = draw.size(most)
    Z = draw.normal(m, draw.integer(m, 2 * m))
    return _dense(Z @ Z.T / Z.shape[1], dtype), None, draw.chance(0.6)


def _covariance(draw, dtype, most):
    """Samples of correlated features with units of their own: metres beside millimetres, prices beside shares."""
    m = draw.size(min(most, 700))
    scales = 10 ** (draw.pick(1.0, 2.0, 3.0) * (draw.uniform(m) - 1))
    factors = draw.normal(m, 5) @ draw.normal(5, 4 * m)
    Z = (draw.normal(m, 4 * m) + draw.pick(0.5, 2.0) * factors) * scales[:, None]
    Z = Z - Z.mean(1, keepdim=True)
    return _dense(Z @ Z.T / (4 * m - 1), dtype), None, draw.chance(0.8)


def _rbf(draw, dtype, most):
    """A kernel matrix of points; the points are learned in half of the problems, and a ridge may be added."""
    m, width = draw.size(min(most, 1100)), draw.pick(0.5, 1.0, 2.0)
    points = draw.normal(m, draw.pick(2, 3, 5))
    ridge = draw.pick(0.0, 0.1, 1e-2)

    def kernel(Z):
        squares = (Z[:, None, :] - Z[None, :, :]).square().sum(-1)
        return torch.exp(-squares / (2 * width**2)) + ridge * torch.eye(
            len(Z), dtype=Z.dtype
        )

    largest = draw.chance(0.9)
    if m <= 300 and draw.chance(0.5):
        return Matrix(m, points.to(dtype), None, kernel), None, largest
    return _dense(kernel(points), dtype), None, largest


def _lattice(sides):
    """Edges (2, number) of a rectangular grid of points."""
    index = torch.arange(math.prod(sides)).reshape(sides)
    ends = []
    for axis, side in enumerate(sides):
        first, second = index.narrow(axis, 0, side - 1), index.narrow(axis, 1, side - 1)
        ends.append(torch.stack([first.flatten(), second.flatten()]))
    return torch.cat(ends, 1)


def _of_edges(m, edges, diagonal):
    """index and entries(w) of diagonal + sum_e w_e (e_u - e_v)(e_u - e_v)^T."""
    u, v = edges
    loop = torch.arange(m)
    index = torch.cat(
        [torch.stack([loop, loop]), torch.stack([u, v]), torch.stack([v, u])], 1
    )

    def entries(w):
        degree = w.new_zeros(m).index_add(0, u, w).index_add(0, v, w)
        return torch.cat([degree + diagonal.to(w.dtype), -w, -w])

    return index, entries


def _from_weights(draw, dtype, m, edges, weights, diagonal):
    index, entries = _of_edges(m, edges, diagonal)
    layout = _layout(draw)
    if draw.chance(0.4):
        return _sparse(m, index, weights, dtype, layout, entries)
    return _sparse(m, index, entries(weights), dtype, layout)


def _grid(draw, dtype, most):
    """Laplacian with Dirichlet walls, -Delta plus a potential or a material in half of the problems."""
    m = draw.size(most)
    side = max(4, math.isqrt(m))
    sides = draw.pick((min(m, 500),), (side, side + 1), (max(3, side // 2), 2 * side))
    edges, m = _lattice(sides), math.prod(sides)
    full = 2.0 * len(sides) * torch.ones(m, dtype=torch.float64)
    inner = torch.bincount(edges.flatten(), minlength=m)
    potential = draw.pick(0.0, 0.0, 0.1, 1.0) * draw.uniform(m)
    weights = torch.ones(edges.shape[1], dtype=torch.float64)
    if draw.chance(0.3):
        weights = 0.5 + draw.uniform(edges.shape[1])
    return (
        _from_weights(draw, dtype, m, edges, weights, full - inner + potential),
        None,
        draw.chance(0.25),
    )


def _neighbours(draw, most):
    """Order, edges (2, number) and weights of a nearest-neighbour graph in the plane, connected by a path."""
    m = draw.size(most)
    points = draw.uniform(m, 2)
    points = points[torch.argsort(points[:, 0])]
    distance = torch.cdist(points, points)
    near = distance.topk(min(draw.integer(5, 9), m), largest=False).indices
    u, v = torch.arange(m).repeat_interleave(near.shape[1]), near.flatten()
    path = torch.stack([torch.arange(m - 1), torch.arange(1, m)])
    pairs = torch.cat(
        [torch.stack([torch.minimum(u, v), torch.maximum(u, v)]), path], 1
    )
    edges = torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1)
    length = distance[edges[0], edges[1]]
    return m, edges, torch.exp(-((length / length.mean()) ** 2) / 2)


def _graph(draw, dtype, most):
    m, edges, weights = _neighbours(draw, most)
    diagonal = draw.pick(0.0, 0.0, 0.1) * draw.uniform(m)
    return (
        _from_weights(draw, dtype, m, edges, weights, diagonal),
        None,
        draw.chance(0.1),
    )


def _normalised_cut(draw, dtype, most):
    """(D - W) x = lambda D x."""
    m, edges, weights = _neighbours(draw, most)
    A = _from_weights(
        draw, dtype, m, edges, weights, torch.zeros(m, dtype=torch.float64)
    )
    degree = torch.zeros(m, dtype=torch.float64).index_add(
        0, edges.flatten(), weights.repeat(2)
    )
    loop = torch.arange(m).repeat(2, 1)
    return A, _sparse(m, loop, degree, dtype, A.layout), draw.chance(0.1)


def _random_sparse(draw, dtype, most):
    m = draw.size(most)
    edges = torch.randint(m, (2, draw.integer(2, 5) * m), generator=draw.generator)
    edges = torch.unique(edges.sort(0).values[:, edges[0] != edges[1]], dim=1)
    values = draw.normal(edges.shape[1])
    loop = torch.arange(m).repeat(2, 1)
    index = torch.cat([loop, edges, edges.flip(0)], 1)
    diagonal = draw.pick(1.0, 4.0) * draw.normal(m)
    return (
        _sparse(m, index, torch.cat([diagonal, values, values]), dtype, _layout(draw)),
        None,
        draw.chance(0.5),
    )


def _bar(draw, dtype, most):
    """A bar of linear elements, clamped at both ends: stiffness and consistent mass, graded mesh or material."""
    m = draw.size(min(most, 1000))
    grading = draw.pick(1.0, 1.0, 10.0, 100.0)
    h = grading ** torch.linspace(0, -1, m + 1, dtype=torch.float64) * (
        0.8 + 0.4 * draw.uniform(m + 1)
    )
    h = h / h.sum()
    stiff = draw.pick(1.0, 10.0) ** draw.uniform(m + 1) / h
    if draw.chance(0.5):
        stiff = 1 / h
    i = torch.arange(m)
    index = torch.cat(
        [
            torch.stack([i, i]),
            torch.stack([i[1:], i[:-1]]),
            torch.stack([i[:-1], i[1:]]),
        ],
        1,
    )
    K = torch.cat([stiff[:-1] + stiff[1:], -stiff[1:-1], -stiff[1:-1]])
    M = torch.cat([(h[:-1] + h[1:]) / 3, h[1:-1] / 6, h[1:-1] / 6])
    layout = _layout(draw)
    return (
        _sparse(m, index, K, dtype, layout),
        _sparse(m, index, M, dtype, layout),
        draw.chance(0.25),
    )


def _spins(draw, dtype, most):
    """A Heisenberg chain in random fields, with a current of spin (complex Hermitian) in half of the problems."""
    sites = min(draw.pick(5, 6, 6, 7, 7, 8, 9, 10), int(math.log2(most)))
    complex_chain = draw.chance(0.5)
    wide = torch.complex128 if complex_chain else torch.float64
    x = torch.tensor([[0, 1], [1, 0]], dtype=wide)
    z = torch.tensor([[1, 0], [0, -1]], dtype=wide)
    raising = torch.tensor([[0, 1], [0, 0]], dtype=wide)
    hop = 2 * torch.kron(raising, raising.T.contiguous())
    if complex_chain:
        hop = hop * complex(math.cos(0.4), math.sin(0.4))
    bond = torch.kron(z, z) + hop + hop.mH

    def at(site, term):
        sides = [
            torch.eye(2**n, dtype=wide)
            for n in (site, sites - site - (1 if len(term) == 2 else 2))
        ]
        return torch.kron(torch.kron(sides[0], term), sides[1])

    H = sum(at(i, bond) for i in range(sites - 1))
    H = H + sum(
        at(i, float(draw.normal()) * z + 0.5 * float(draw.normal()) * x)
        for i in range(sites)
    )
    if complex_chain:
        dtype = dtype.to_complex()
    layout = _layout(draw)
    if layout == torch.strided:
        return _dense(H, dtype), None, draw.chance(0.2)
    index = H.abs().nonzero().T.contiguous()
    return (
        _sparse(2**sites, index, H[index[0], index[1]], dtype, layout),
        None,
        draw.chance(0.2),
    )


FAMILIES = {
    "GOE": _goe,
    "Wishart": _wishart,
    "covariance": _covariance,
    "RBF kernel": _rbf,
    "grid": _grid,
    "graph": _graph,
    "normalised cut": _normalised_cut,
    "random sparse": _random_sparse,
    "elements": _bar,
    "spin chain": _spins,
}


def draw(seed, dtype=torch.float32, most=2000, family=None):
    """Problem number ``seed``, of order 20 to ``most``; the families take turns unless one is named."""
    family = family or list(FAMILIES)[seed % len(FAMILIES)]
    numbers = _Draw("lobpcg", family, seed)
    A, B, largest = FAMILIES[family](numbers, dtype, most)
    k = min(numbers.integer(1, 10), max(1, A.m // 6))
    values = A.values(A.parameter)
    return Ordinary(
        family,
        seed,
        A,
        B,
        k,
        largest,
        values.dtype,
        B is not None and numbers.chance(0.5),
    )


# Losses -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Data:
    """Constants of the losses of one problem: vectors (m,), weights (k,), a basis (m, k), pairs of rows."""

    u: torch.Tensor
    v: torch.Tensor
    d: torch.Tensor
    c: torch.Tensor
    Q: torch.Tensor
    rows: torch.Tensor
    scale: float

    def to(self, dtype):
        real = dtype.to_real()
        u, v, Q = (t.to(dtype) for t in (self.u, self.v, self.Q))
        d, c = (t.to(real) for t in (self.d, self.c))
        return _Data(u, v, d, c, Q, self.rows, self.scale)


def _data(problem, scale):
    numbers, m, k = (
        _Draw("losses", problem.family, problem.seed),
        problem.A.m,
        problem.k,
    )
    wide = torch.complex128 if problem.dtype.is_complex else torch.float64
    u, v = (numbers.normal(m, dtype=wide) / math.sqrt(m) for _ in range(2))
    Q = torch.linalg.qr(numbers.normal(m, k, dtype=wide)).Q
    rows = torch.randint(m, (2, 4 * k + 8), generator=numbers.generator)
    return _Data(
        u, v, 0.5 + numbers.uniform(m), 0.5 + numbers.uniform(k), Q, rows, scale
    )


def _projector(E, X, t):
    """|X X^H - Q Q^H|_F^2 without the large matrix."""
    return (X.mH @ X).abs().square().sum() - 2 * (t.Q.mH @ X).abs().square().sum()


def _entropy(E, X, t):
    p = X.abs().square() + torch.finfo(E.dtype).tiny
    return -(p * p.log()).sum()


def _spectral(E, X, t):
    """u^H X exp(-E / scale) X^H v."""
    return ((t.u.conj() @ X) * torch.exp(-E / t.scale) * (X.mH @ t.v)).real.sum()


# Functions of E (k,), X (m, k) and the constants above; none depends on signs or phases.
LOSSES: dict[str, Callable[..., Any]] = {
    "sum": lambda E, X, t: E.sum(),
    "log-sum": lambda E, X, t: torch.logsumexp(E / t.scale, 0),
    "gap": lambda E, X, t: E[-1] - E[0] if len(E) > 1 else E[0] ** 2 + E[0] * t.scale,
    "weighted": lambda E, X, t: (t.c * E).sum(),
    "projector": _projector,
    "trace": lambda E, X, t: (t.d[:, None] * X.abs().square()).sum(),
    "weighted trace": lambda E, X, t: (t.c * t.d[:, None] * X.abs().square()).sum(),
    "entropy": _entropy,
    "abs": lambda E, X, t: (t.d[:, None] * X.abs()).sum(),
    "norm": lambda E, X, t: torch.linalg.norm(X),
    "overlap": lambda E, X, t: (t.c * (t.u.conj() @ X).abs().square()).sum(),
    "embedding": lambda E, X, t: (X[t.rows[0]] - X[t.rows[1]]).abs().square().sum(),
    "spectral": _spectral,
}


# The oracle ---------------------------------------------------------------------------------------------------------


class Oracle:
    """All eigenpairs of a problem, the wanted first, in double precision; exact gradients and what rounding allows."""

    # Wanted eigenvalues nearer than this (relative to the largest modulus) are set this far apart before a difference
    # is divided by theirs: what a loss of whole clusters needs is then right to the larger number, and rounding is
    # amplified by its inverse.
    equal, apart = 1e-12, 1e-7

    def __init__(self, problem):
        self.problem, self.k = problem, problem.k
        A, self.B = problem.A.wide(), None if problem.B is None else problem.B.wide()
        eps = torch.finfo(problem.dtype).eps
        if self.B is None:
            e, V = torch.linalg.eigh(A)
        else:
            # scaled to a unit diagonal first, since grading costs digits in the factor
            s = self.B.diagonal().real.rsqrt()
            L = torch.linalg.cholesky(s[:, None] * self.B * s)
            C = torch.linalg.solve_triangular(L, s[:, None] * A * s, upper=False)
            e, U = torch.linalg.eigh(
                _symmetric(torch.linalg.solve_triangular(L, C.mH, upper=False))
            )
            V = s[:, None] * torch.linalg.solve_triangular(L.mH, U, upper=True)
            # What rounding of C has cost the eigenvalues, Rayleigh quotients have back: the zero of a normalised cut
            # was off by up to twice what is allowed.
            e = _real_inner(V, A @ V) / _real_inner(V, self.B @ V)
            e, order = e.sort()
            V = V[:, order]
        self.e, self.V = (e.flip(0), V.flip(1)) if problem.largest else (e, V)
        self.eps, self.norm = eps, float(e.abs().max())
        E, X = self.e[: self.k], self.V[:, : self.k]
        if self.B is None:
            self.mixing = torch.full(
                (problem.A.m, self.k), eps * self.norm, dtype=torch.float64
            )  # (m, k)
        else:
            V2, X2 = self.V.abs().square(), X.abs().square()
            square = V2.T @ (A.abs().square() @ X2) + E.square() * (
                V2.T @ (self.B.abs().square() @ X2)
            )
            self.mixing = 4 * eps * square.sqrt()
        scale = float(E.abs().max())
        self.data = _data(
            problem, scale if scale > 100 * eps * self.norm else self.norm
        )
        self.samples = [
            self._perturbed(_Draw("perturbed", problem.seed, i)) for i in range(2)
        ]
        self.moved = (
            torch.stack([V[:, : self.k].abs() - X.abs() for _, V, _, _ in self.samples])
            .abs()
            .amax(0)
        )

    def _perturbed(self, numbers):
        """Eigenvalues (m,), vectors (m, m), factors that round X (m, k): a perturbation of the size of ``mixing``."""
        k, e, V = self.k, self.e, self.V
        C = self.mixing * numbers.normal(*self.mixing.shape, dtype=V.dtype)
        small, U = torch.linalg.eigh(torch.diag(e[:k]).to(V.dtype) + _symmetric(C[:k]))
        if self.problem.largest:
            small, U = small.flip(0), U.flip(1)
        distance = e[:k] - e[k:, None]
        K = (
            C[k:]
            / torch.maximum(
                distance.abs(), C[k:].abs() + torch.finfo(torch.float64).tiny
            )
            * distance.sign()
        )
        X = (V[:, :k] + V[:, k:] @ K) @ U
        rest = V[:, k:] - V[:, :k] @ K.mH
        shift = self.mixing[k:].amax(-1) * numbers.normal(len(e) - k)
        rounded = 1 + self.eps * numbers.normal(*X.shape)
        return (
            torch.cat([small, e[k:] + shift]),
            torch.cat([X, rest], 1),
            rounded,
            numbers,
        )

    def aligned(self, X):
        """V with the wanted vectors turned towards X: by a phase, inside a cluster of rounding by a unitary matrix."""
        V = self.V.clone()
        for j, stop in self.groups(10.0):
            if (
                stop > self.k
            ):  # the cluster continues behind the wanted pairs: only phases are left
                stop, parts = self.k, [slice(i, i + 1) for i in range(j, self.k)]
            else:
                parts = [slice(j, stop)]
            for part in parts:
                left, _, right = torch.linalg.svd(self._overlap(V[:, part], X[:, part]))
                V[:, part] = V[:, part] @ (left @ right)
        return V

    def _overlap(self, V, X):
        return V.mH @ (X if self.B is None else self.B @ X)

    def groups(self, factor):
        """(first, end) of the clusters of eigenvalues that ``factor`` times the mixing cannot tell apart."""
        near = (self.e.diff().abs() <= factor * self.mixing.amax(0).max()).tolist()
        if self.B is not None:
            size = factor * torch.maximum(
                self.mixing[:-1].amax(1), self.mixing[1:].amax(1)
            )
            near = (self.e.diff().abs() <= size).tolist()
        found, first = [], 0
        for i in range(self.k):
            if i + 1 == len(self.e) or not near[i]:
                found.append((first, i + 1))
                first = i + 1
        if first < self.k:
            stop = next(
                (i + 1 for i in range(self.k, len(near)) if not near[i]), len(self.e)
            )
            found.append((first, stop))
        return found

    def _separated(self, e):
        """e with the wanted eigenvalues set apart where they are equal."""
        E = e[: self.k].tolist()
        sign, step = -1.0 if self.problem.largest else 1.0, self.apart * self.norm
        for j in range(1, self.k):
            if sign * (E[j] - E[j - 1]) < self.equal * self.norm:
                E[j] = E[j - 1] + sign * step
        return torch.cat([torch.tensor(E, dtype=torch.float64), e[self.k :]])

    def _cotangents(self, loss, E, X):
        E, X = E.clone().requires_grad_(True), X.clone().requires_grad_(True)
        found = torch.autograd.grad(loss(E, X, self.data), (E, X), allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, (E, X))]

    def _factors(self, loss, e, V, seen=None):
        """X, W and W_B with gA = Herm(W X^H), gB = Herm(W_B X^H). seen: the X that the loss is evaluated at."""
        k = self.k
        e, X = self._separated(e), V[:, :k]
        gE, gX = self._cotangents(loss, e[:k], X if seen is None else seen)
        return X, *self._pulled(e, V, gE, gX)

    def _pulled(self, e, V, gE, gX):
        """W and W_B of _factors, for cotangents of the wanted pairs."""
        E, X, G = e[: self.k], V[:, : self.k], V.mH @ gX  # G: (m, k)
        W = V @ (G / self._distance(e)) + X * gE
        return W, -W * E - 0.5 * X * G[: self.k].diagonal().real

    def _distance(self, e):
        """E_j - e_i, infinite for j = i, (m, k)."""
        distance = e[: self.k] - e[:, None]
        distance[torch.arange(self.k), torch.arange(self.k)] = math.inf
        return distance

    def _typical(self, loss):
        """As _factors, for cotangents of this loss's size in a random direction, and a random X of the same lengths."""
        e, X, numbers = (
            self._separated(self.e),
            self.V[:, : self.k],
            _Draw("typical", self.problem.seed),
        )
        E, elsewhere = e[: self.k], self.data.Q * torch.linalg.norm(X, dim=0)
        (gE, gX), (other_gE, other_gX) = (
            self._cotangents(loss, E, Y) for Y in (X, elsewhere)
        )
        gE = torch.maximum(gE.abs(), other_gE.abs())
        length = torch.maximum(
            torch.linalg.norm(gX, dim=0), torch.linalg.norm(other_gX, dim=0)
        )
        direction = numbers.normal(*X.shape, dtype=X.dtype)
        gX = direction * (length / torch.linalg.norm(direction, dim=0))
        return elsewhere, *self._pulled(e, self.V, gE, gX)

    def gradients(self, name, X):
        """For each leaf: exact gradient; what rounding and kinks account for; size of its terms; whether it is zero."""
        loss, problem = LOSSES[name], self.problem
        matrices = [problem.A] + ([problem.B] if problem.learn_B else [])

        def leaves(*pairs, noise=0.0, generator=None):
            Y, *both = self._factors(loss, *pairs)
            return [M.pull_back(W, Y, noise, generator) for M, W in zip(matrices, both)]

        V = self.aligned(X)
        Y = V[:, : self.k]
        exact = leaves(self.e, V)
        T, *both = self._typical(loss)
        sizes = [
            float(torch.linalg.norm(M.pull_back(W, T))) for M, W in zip(matrices, both)
        ]
        # zero by structure: the oracle's own rounding of V^H gX; zero to rounding: of the dtype, with all that it makes
        structure = max(
            1e-10, 30 * math.sqrt(len(self.e)) * torch.finfo(torch.float64).eps
        )
        others = [
            leaves(
                e,
                U,
                U[:, : self.k] * rounded,
                noise=4 * self.eps,
                generator=numbers.generator,
            )
            for e, U, rounded, numbers in self.samples
        ]
        others.append(leaves(self.e, V, Y * (Y.abs() > 4 * self.moved)))
        small = bars(problem.dtype).entry * Y.abs().square().mean(0).sqrt()
        kinked = leaves(self.e, V, Y * (Y.abs() > small))
        found = []
        for i, g in enumerate(exact):
            allowed = 2 * max(
                float(torch.linalg.norm(other[i] - g)) for other in others
            )
            kink = 2 * float(torch.linalg.norm(kinked[i] - g))
            norm = float(torch.linalg.norm(g))
            zero = (
                norm <= structure * sizes[i]
                or norm + allowed <= 30 * self.eps * sizes[i]
            )
            found.append((g, allowed, kink, sizes[i], zero))
        return found


# Verdicts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """Relative errors: of a false alarm at most, of a silent gradient at most; of E, of X, and of the entries of X."""

    alarm: float
    wrong: float
    value: float
    vector: float
    entry: float


_SINGLE, _DOUBLE = (
    Bars(1e-2, 5e-2, 1e-3, 1e-2, 1e-3),
    Bars(1e-4, 1e-3, 1e-7, 1e-4, 1e-6),
)


def bars(dtype):
    return _SINGLE if torch.finfo(dtype).eps > 1e-10 else _DOUBLE


@dataclass
class Report:
    """What became of one problem.

    ``forwards``: (verdict, error over what is allowed, text), without and with a gradient asked for. ``gradients``:
    (loss, verdict, relative error, what rounding allows, text).
    """

    problem: Ordinary
    forwards: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)

    def bad(self):
        """What the contract forbids: (what, verdict, error, text)."""
        found = [
            ("forward", *entry)
            for entry in self.forwards
            if "silent" in entry[0] or "refused" in entry[0]
        ]
        for loss, verdict, error, _, text in self.gradients:
            if "silent" in verdict or "refused" in verdict:
                found.append((loss, verdict, error, text))
        return found


def _call(function):
    """The result or None, and what was said: the first warning of lobpcg's, or the exception's text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except (RuntimeError, ValueError) as error:
            return None, f"{type(error).__name__}: {error}"
    return result, next(
        (str(w.message) for w in caught if "lobpcg" in str(w.message)), ""
    )


def _judge_values(oracle, E):
    """Largest error of an eigenvalue over what the criterion allows, and whether a pair was missed."""
    k, bar = oracle.k, bars(oracle.problem.dtype)
    exact, rounding = oracle.e[:k], oracle.mixing[torch.arange(k), torch.arange(k)]
    # mixing is eps |A|_2, or four times the rounding of a quotient of the pencil
    rounding = rounding * (20.0 if oracle.B is None else 5.0)
    error = (E.to(torch.float64) - exact).abs()
    over = error / torch.maximum(bar.value * exact.abs(), rounding)
    after = oracle.e[: k + 1].diff().abs()
    missed = (over[: len(after)] > 1) & (error[: len(after)] > 0.5 * after)
    return _finite(over.max()), bool(missed.any())


def _judge_vectors(oracle, X, needs_grad):
    """Largest angle between a vector and the cluster it belongs to, over what is allowed; orthonormality likewise."""
    bar, eps, X = bars(oracle.problem.dtype), oracle.eps, X.to(oracle.V.dtype)
    gram = oracle._overlap(X, X)
    worst = _finite((gram - torch.eye(oracle.k)).abs().max()) / (1e3 * eps)
    for first, stop in oracle.groups(60.0):
        own = oracle._overlap(
            oracle.V[:, first:stop], X[:, first : min(stop, oracle.k)]
        )
        lengths = gram.diagonal().real[first : min(stop, oracle.k)]
        angle = (1 - own.abs().square().sum(0) / lengths).clamp_min(0).sqrt()
        gaps = [
            float((oracle.e[a] - oracle.e[a - 1]).abs())
            for a in (first, stop)
            if 0 < a < len(oracle.e)
        ]
        gap = min(gaps, default=math.inf)
        allowed = max(bar.vector, 20 * float(oracle.mixing[first:stop].max()) / gap)
        if not needs_grad:
            allowed = max(allowed, 2 * math.sqrt(eps) * oracle.norm / gap)
        if allowed < 0.5:
            worst = max(worst, _finite(angle.max()) / allowed)
    return worst


def _finite(x):
    return float(x) if math.isfinite(float(x)) else math.inf


def _judge_forward(oracle, pairs, text, needs_grad):
    if pairs is None:
        return "refused", math.inf, text
    E, X = (t.detach() for t in pairs)
    over, missed = _judge_values(oracle, E)
    mixed = _judge_vectors(oracle, X, needs_grad)
    word = "warned" if text else "silent"
    if missed:
        return f"missed, {word}", over, text
    if over > 1:
        return f"E off, {word}", over, text
    if mixed > 1:
        return f"X mixed, {word}", mixed, text
    return ("false alarm" if text else "right"), max(over, mixed), text


def _judge_gradient(oracle, exact, found, said, before):
    """Verdict, relative error, what rounding allows, of the worst leaf. said, before: in backward, in forward."""
    bar, rank = bars(oracle.problem.dtype), []
    for i, (g, allowed, kink, size, zero) in enumerate(exact):
        scale = (size if zero else float(torch.linalg.norm(g))) or torch.finfo(
            torch.float64
        ).tiny
        error = (
            math.inf
            if found is None
            else _finite(torch.linalg.norm(found[i] - g)) / scale
        )
        rank.append((error, allowed / scale, kink / scale, zero))
    error, rounding, kink, zero = max(rank)
    head = "zero: " if zero else ""
    if rounding > 0.5:
        unsaid = found is not None and not said and not before and error > bar.wrong
        return ("unsaid" if unsaid else "undetermined"), error, rounding
    if found is None:
        return head + "refused", error, rounding
    if error <= bar.alarm:
        false = "false alarm" if rounding <= bar.alarm else "rounding"
        return head + (false if said else "right"), error, rounding
    if said:
        return head + "warned", error, rounding
    if error <= bar.wrong:
        return head + "loose", error, rounding
    if error <= rounding:
        return head + ("rounding" if before else "unsaid"), error, rounding
    if before:
        return head + "warned", error, rounding
    return head + ("kink" if error <= kink else "silent"), error, rounding


def examine(problem, losses=None, lobpcg=None):
    """Report on the forward pass without and with a gradient asked for, and on the gradient of each loss."""
    lobpcg = lobpcg or torch.lobpcg
    oracle, report = Oracle(problem), Report(problem)

    def solve(needs_grad):
        matrices = [M.leaf(needs_grad and wanted) for M, wanted in parts]
        B = matrices[1][0] if problem.B is not None else None
        pairs = lobpcg(matrices[0][0], problem.k, B, largest=problem.largest)
        return pairs, [leaf for _, leaf in matrices if leaf.requires_grad]

    parts = [(problem.A, True)] + (
        [(problem.B, problem.learn_B)] if problem.B is not None else []
    )
    result, text = _call(lambda: solve(False))
    report.forwards.append(_judge_forward(oracle, result and result[0], text, False))
    result, before = _call(lambda: solve(True))
    report.forwards.append(_judge_forward(oracle, result and result[0], before, True))
    if result is None:
        return report
    (E, X), leaves = result
    data = oracle.data.to(X.dtype)
    wanted = [M for M, needed in parts if needed]
    for name in losses or LOSSES:
        exact = oracle.gradients(name, X.detach().to(oracle.V.dtype))
        loss = LOSSES[name]
        found, said = _call(
            lambda loss=loss: torch.autograd.grad(
                loss(E, X, data), leaves, retain_graph=True
            )
        )
        if found is not None:
            found = [M.read(g) for M, g in zip(wanted, found)]
        verdict, error, allowed = _judge_gradient(oracle, exact, found, said, before)
        report.gradients.append((name, verdict, error, allowed, said or before))
    return report
