# mypy: allow-untyped-defs
"""Hermitian eigenproblems A x = lambda B x whose spectra are known without solving them.

Tests, examples and benchmarks of ``torch.lobpcg`` draw their problems from here. Each spectrum is a closed form or
holds by construction, so no eigensolver is its own judge::

    p = lobpcg_problems.get("mikota")
    A, B = p.build(torch.float64, torch.sparse_csr)
    E_exact = p.extreme(k=4, largest=False)

Everything is assembled in double precision and then rounded to the dtype asked for. A real problem asked for in a
complex dtype is conjugated by a diagonal unitary matrix: same spectrum, same pattern, complex entries. Random factors
come from a generator of their own, seeded by the problem's parameters; the global random state is neither read nor set.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass
from typing import Callable, Optional

import torch


__all__ = ["Problem", "batch", "catalogue", "get"]

_LAYOUTS = {
    torch.strided: lambda A, b: A.to_dense(),
    torch.sparse_coo: lambda A, b: A.to_sparse_coo().coalesce(),
    torch.sparse_csr: lambda A, b: A.to_sparse_csr(),
    torch.sparse_csc: lambda A, b: A.to_sparse_csc(),
    torch.sparse_bsr: lambda A, b: A.to_sparse_csr().to_sparse_bsr((b, b)),
    torch.sparse_bsc: lambda A, b: A.to_sparse_csr().to_sparse_bsc((b, b)),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """One pencil (A, B) of order m.

    ``assemble()`` returns A and B (None for the identity), float64 or complex128, strided or COO. ``eigenvalues()``
    returns all m eigenvalues, float64, ascending. ``vectors(j)``, where known, returns the B-orthonormal eigenvectors
    that belong to the positions j of that list. ``condition`` bounds the condition number of B.
    """

    name: str
    m: int
    assemble: Callable[[], tuple[torch.Tensor, Optional[torch.Tensor]]]
    eigenvalues: Callable[[], torch.Tensor]
    vectors: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    condition: float = 1.0
    is_complex: bool = False
    generalized: bool = False
    source: str = ""

    def __repr__(self):
        return f"Problem({self.name!r}, m={self.m})"

    @functools.cached_property
    def spectrum(self):
        """All eigenvalues, ascending (m,), float64."""
        return self.eigenvalues().to(torch.float64)

    @property
    def spread(self):
        """Largest minus smallest eigenvalue."""
        return float(self.spectrum[-1] - self.spectrum[0])

    @property
    def radius(self):
        """Largest modulus of an eigenvalue."""
        return float(max(abs(self.spectrum[0]), abs(self.spectrum[-1])))

    def supports(self, dtype):
        """Whether the problem can be written in dtype: not complex in a real one, no overflow, no underflow."""
        if self.is_complex and not dtype.is_complex:
            return False
        info = torch.finfo(dtype)
        return (
            self.radius == 0
            or info.tiny / info.eps < self.radius < math.sqrt(info.eps) * info.max
        )

    def extreme(self, k, largest=False):
        """The k wanted eigenvalues in the order of ``torch.lobpcg`` (k,)."""
        return self.spectrum[-k:].flip(0) if largest else self.spectrum[:k].clone()

    def gap(self, k, largest=False):
        """Distance of the k-th wanted eigenvalue to the next one, relative to the spread; inf if there is no next."""
        if k >= self.m:
            return math.inf
        wanted = self.extreme(k + 1, largest)
        return (
            float(abs(wanted[k] - wanted[k - 1])) / self.spread if self.spread else 0.0
        )

    def error(self, dtype):
        """How far rounding A and B to dtype may move an eigenvalue.

        Entrywise rounding is a perturbation of norm <= eps sqrt(m) ||A||, and ||A|| ||B^-1|| <= radius cond(B); the
        factor 4 covers A and B, and the rounding of the assembly.
        """
        return (
            4
            * math.sqrt(self.m)
            * torch.finfo(dtype).eps
            * self.condition
            * self.radius
        )

    def build(self, dtype=torch.float64, layout=torch.strided, device="cpu"):
        """A and B (None for the identity) in the dtype and layout asked for."""
        if not self.supports(dtype):
            raise ValueError(f"{self.name}: cannot be represented in {dtype}")
        block = next(b for b in (3, 2, 1) if self.m % b == 0)
        A, B = self.assemble()
        if dtype.is_complex and not self.is_complex:
            u = _phases(self.m)
            A, B = _congruence(A, u), None if B is None else _congruence(B, u)
        return tuple(
            None if M is None else _LAYOUTS[layout](M.to(dtype), block).to(device)
            for M in (A, B)
        )

    def eigenvectors(self, k, largest=False, dtype=torch.float64, device="cpu"):
        """Exact eigenvectors of the k wanted pairs (m, k), in the order of ``extreme``."""
        assert self.vectors is not None, f"{self.name}: no eigenvectors are known"
        j = torch.arange(k)
        X = self.vectors(self.m - 1 - j if largest else j)
        if dtype.is_complex and not self.is_complex:
            X = _phases(self.m).unsqueeze(-1) * X
        return X.to(device=device, dtype=dtype)


# --- Parts ---


def _generator(*key):
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def _phases(m):
    return torch.polar(
        torch.ones(m, dtype=torch.float64), 1.0 + torch.arange(m, dtype=torch.float64)
    )


def _unitary(m, is_complex, *key):
    """Orthogonal or unitary (m, m), reproducible."""
    dtype = torch.complex128 if is_complex else torch.float64
    return torch.linalg.qr(
        torch.randn(m, m, dtype=dtype, generator=_generator(m, is_complex, *key))
    )[0]


def _hermitian(A):
    return (A + A.mH) / 2


def _congruence(A, d):
    """diag(d) A diag(conj d), dense or COO, Hermitian to the bit like A."""
    if A.layout == torch.strided:
        return _hermitian(d.unsqueeze(-1) * A * d.conj())
    A = A.coalesce()
    r, c = A.indices()
    A = torch.sparse_coo_tensor(
        A.indices(), d[r] * A.values() * d[c].conj(), A.shape
    ).coalesce()
    transposed = (
        A.transpose(0, 1).coalesce().values().conj()
    )  # same positions: the pattern is symmetric
    return torch.sparse_coo_tensor(
        A.indices(), (A.values() + transposed) / 2, A.shape
    ).coalesce()


def _coo(m, i, j, off, diagonal):
    """COO with `off` at (i, j), its conjugate at (j, i), and `diagonal` (m,)."""
    r = torch.arange(m)
    indices = torch.stack([torch.cat([i, j, r]), torch.cat([j, i, r])])
    return torch.sparse_coo_tensor(
        indices, torch.cat([off, off.conj(), diagonal.to(off.dtype)]), (m, m)
    ).coalesce()


def _diagonal(values):
    none = torch.empty(0, dtype=torch.int64)
    return _coo(len(values), none, none, values[:0], values)


def _band(diagonal, *offs):
    """Banded symmetric COO from its main diagonal and first, second, ... superdiagonals."""
    m = len(diagonal)
    i = torch.cat([torch.arange(m - s) for s in range(1, len(offs) + 1)])
    j = torch.cat([torch.arange(s, m) for s in range(1, len(offs) + 1)])
    return _coo(m, i, j, torch.cat(offs), diagonal)


def _grid_edges(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (i, j) of neighbours in a rectangular grid numbered in row-major order."""
    number = torch.arange(math.prod(sizes)).reshape(sizes)
    pairs = [
        (number.narrow(a, 0, s - 1).flatten(), number.narrow(a, 1, s - 1).flatten())
        for a, s in enumerate(sizes)
    ]
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def _full(m, value):
    return torch.full((m,), float(value), dtype=torch.float64)


def _count(m, start=0):
    return torch.arange(start, start + m, dtype=torch.float64)


def _angles(n):
    """pi j / (n + 1), j = 1..n."""
    return math.pi * _count(n, 1) / (n + 1)


# --- Difference operators ---


def _modes(sizes):
    """Eigenvalues sum_a 4 sin^2(pi j_a / (2 (n_a + 1))) of the Dirichlet grid, flattened in row-major order."""
    total = torch.zeros((), dtype=torch.float64)
    for n in sizes:
        total = total.unsqueeze(-1) + 4 * torch.sin(_angles(n) / 2) ** 2
    return total.flatten()


def _sines(sizes, position):
    """Tensor products of sqrt(2 / (n+1)) sin(pi i j / (n+1)): orthonormal eigenvectors, columns in ascending order."""
    mode = _modes(sizes).argsort(stable=True)[position]
    X = torch.ones(1, len(position), dtype=torch.float64)
    stride = math.prod(sizes)
    for n in sizes:
        stride //= n
        j = mode // stride % n + 1
        factor = math.sqrt(2 / (n + 1)) * torch.sin(
            _angles(n).unsqueeze(-1) * j
        )  # (n, p)
        X = (X.unsqueeze(1) * factor).flatten(0, 1)
    return X


def _laplacian_matrix(sizes):
    i, j = _grid_edges(sizes)
    return _coo(
        math.prod(sizes),
        i,
        j,
        _full(len(i), -1),
        _full(math.prod(sizes), 2 * len(sizes)),
    )


def laplacian(*sizes):
    """(2d+1)-point Laplacian on a rectangular grid, Dirichlet conditions. LeVeque (2007), sections 2.10 and 3.4."""
    return Problem(
        "laplacian" + "x".join(map(str, sizes)),
        math.prod(sizes),
        lambda: (_laplacian_matrix(sizes), None),
        lambda: _modes(sizes).sort().values,
        lambda position: _sines(sizes, position),
        source="LeVeque (2007)",
    )


def laplacian_mass(*sizes):
    """Laplacian L against the mass matrix I - L / (8 d): L's eigenvectors, eigenvalues t / (1 - t / (8 d)), t of L."""
    c = 1 / (8 * len(sizes))
    m = math.prod(sizes)

    def assemble():
        i, j = _grid_edges(sizes)
        return _laplacian_matrix(sizes), _coo(
            m, i, j, _full(len(i), c), _full(m, 1 - 2 * len(sizes) * c)
        )

    def eigenvalues():
        t = _modes(sizes).sort().values
        return t / (1 - c * t)

    def vectors(position):
        return _sines(sizes, position) / torch.sqrt(
            1 - c * _modes(sizes).sort().values[position]
        )

    return Problem(
        "laplacian_mass" + "x".join(map(str, sizes)),
        m,
        assemble,
        eigenvalues,
        vectors,
        2.0,
        generalized=True,
        source="shares eigenvectors with the Laplacian; spectrum of B within (1/2, 1)",
    )


def sakurai(m):
    """Square of the 1-D Laplacian, eigenvalues 16 sin^4: condition ~ m^4. Sakurai et al. (2003)."""

    def assemble():
        diagonal = _full(m, 6)
        diagonal[0] = diagonal[-1] = 5
        return _band(diagonal, _full(m - 1, -4), _full(m - 2, 1)), None

    return Problem(
        f"sakurai{m}",
        m,
        assemble,
        lambda: _modes((m,)) ** 2,
        lambda position: _sines((m,), position),
        source="Sakurai et al. (2003)",
    )


def ring(m, flux=0.0):
    """Laplacian of a ring: 2 - 2 cos((2 pi j + flux) / m).

    Flux 0: every eigenvalue but one or two is double. A flux through the ring makes it complex Hermitian and, unless
    a multiple of pi, simple; no diagonal unitary makes it real (Hofstadter 1976, Peierls phase).
    """

    def assemble():
        i = torch.arange(m)
        phase = torch.polar(_full(m, 1), _full(m, flux / m)) if flux else _full(m, 1)
        return _coo(m, i, (i + 1) % m, -phase, _full(m, 2)), None

    return Problem(
        f"ring{m}" + (f"_flux{flux:g}" if flux else ""),
        m,
        assemble,
        lambda: (2 - 2 * torch.cos((2 * math.pi * _count(m) + flux) / m)).sort().values,
        is_complex=bool(flux),
        source="circulant matrix",
    )


# --- Mechanics ---


def mikota(m):
    """Chain with masses 1/i and springs m+1-i: eigenvalues 1, 4, 9, ..., m^2, cond(B) = m. Mikota (2001)."""

    def assemble():
        return _band(2 * _count(m).flip(0) + 1, -_count(m - 1, 1).flip(0)), _diagonal(
            1 / _count(m, 1)
        )

    return Problem(
        f"mikota{m}",
        m,
        assemble,
        lambda: _count(m, 1) ** 2,
        None,
        float(m),
        generalized=True,
        source="Mikota (2001)",
    )


def rod(m):
    """Rod fixed at both ends, linear elements, consistent mass: 6/h^2 (1 - cos t)/(2 + cos t), t = pi j h.

    K = tridiag(-1, 2, -1)/h, M = h/6 tridiag(1, 4, 1), h = 1/(m+1). Strang and Fix (1973), chapter 6.
    """
    h = 1 / (m + 1)

    def assemble():
        K = _band(_full(m, 2 / h), _full(m - 1, -1 / h))
        return K, _band(_full(m, 4 * h / 6), _full(m - 1, h / 6))

    def vectors(position):
        return _sines((m,), position) / torch.sqrt(
            h / 3 * (2 + torch.cos(_angles(m)[position]))
        )

    top = math.cos(math.pi * h)
    return Problem(
        f"rod{m}",
        m,
        assemble,
        lambda: 6 / h**2 * (1 - torch.cos(_angles(m))) / (2 + torch.cos(_angles(m))),
        vectors,
        (2 + top) / (2 - top),
        generalized=True,
        source="Strang and Fix (1973)",
    )


# --- Graphs ---


def _graph(name, m, i, j, spectrum, normalized=False):
    """Graph Laplacian L = D - W of the edges (i, j); with `normalized` the normalized-cut pencil (L, D)."""

    def assemble():
        degree = torch.bincount(torch.cat([i, j]), minlength=m).double()
        return (
            _coo(m, i, j, _full(len(i), -1), degree),
            _diagonal(degree) if normalized else None,
        )

    degree = torch.bincount(torch.cat([i, j]), minlength=m)
    condition = float(degree.max()) / float(degree.min()) if normalized else 1.0
    return Problem(
        name,
        m,
        assemble,
        lambda: spectrum.sort().values,
        None,
        condition,
        generalized=normalized,
        source="Chung (1997), Spectral Graph Theory",
    )


def path_graph(m, normalized=False):
    """Path: 2 - 2 cos(pi j / m), j = 0..m-1; normalized: 1 - cos(pi j / (m - 1))."""
    t = math.pi * _count(m)
    spectrum = 1 - torch.cos(t / (m - 1)) if normalized else 2 - 2 * torch.cos(t / m)
    return _graph(
        f"path{m}" + "_ncut" * normalized, m, *_grid_edges((m,)), spectrum, normalized
    )


def complete_graph(m):
    """Complete graph: 0 once, m with multiplicity m - 1."""
    spectrum = _full(m, m)
    spectrum[0] = 0
    i, j = torch.triu_indices(m, m, 1)
    return _graph(f"complete{m}", m, i, j, spectrum)


def star_graph(m):
    """Star: 0 and m once, 1 with multiplicity m - 2."""
    spectrum = _full(m, 1)
    spectrum[0], spectrum[-1] = 0, m
    return _graph(
        f"star{m}",
        m,
        torch.zeros(m - 1, dtype=torch.int64),
        torch.arange(1, m),
        spectrum,
    )


def bipartite_graph(a, b):
    """Complete bipartite graph, normalized cut: 0 and 2 once, 1 with multiplicity a + b - 2."""
    spectrum = _full(a + b, 1)
    spectrum[0], spectrum[-1] = 0, 2
    i, j = torch.cartesian_prod(torch.arange(a), torch.arange(a, a + b)).unbind(-1)
    return _graph(f"bipartite{a}x{b}_ncut", a + b, i, j, spectrum, True)


def hypercube_graph(d):
    """Hypercube of 2^d vertices: 2 j with multiplicity binomial(d, j)."""
    spectrum = torch.tensor(
        [2.0 * j for j in range(d + 1) for _ in range(math.comb(d, j))],
        dtype=torch.float64,
    )
    return _graph(f"hypercube{d}", 2**d, *_grid_edges((2,) * d), spectrum)


# --- Prescribed spectra ---


def prescribed(name, spectrum, condition=1.0, is_complex=False):
    """Dense pencil with the given spectrum: A = C diag(spectrum) C^H, B = C C^H, eigenvectors C^-H.

    C = U D V^H with U, V random unitary and cond(D^2) = condition; condition 1 takes C = U and B = None.
    """
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64).sort().values
    m = len(spectrum)
    generalized = condition != 1

    def factors():
        U = _unitary(m, is_complex, name, "U")
        if not generalized:
            return U, torch.ones(m, dtype=torch.float64), torch.eye(m, dtype=U.dtype)
        return (
            U,
            torch.logspace(0, -math.log10(condition) / 2, m, dtype=torch.float64),
            _unitary(m, is_complex, name),
        )

    def assemble():
        U, d, V = factors()
        C = (U * d) @ V.mH
        return (
            _hermitian((C * spectrum) @ C.mH),
            _hermitian((U * d**2) @ U.mH) if generalized else None,
        )

    def vectors(position):
        U, d, V = factors()
        return ((U / d) @ V.mH)[:, position]

    return Problem(
        name,
        m,
        assemble,
        lambda: spectrum,
        vectors,
        float(condition),
        is_complex,
        generalized,
        source="by construction",
    )


def indefinite(m, condition=1.0, is_complex=False):
    """Simple spectrum, both signs, spacings between 0.5/m and 1.5/m around an even grid of [-1, 1]."""
    jitter = (
        torch.rand(m, dtype=torch.float64, generator=_generator("indefinite", m)) - 0.5
    )
    spectrum = (2 * _count(m) + 1 + jitter / 2) / m - 1
    name = (
        f"indefinite{m}"
        + f"_cond{condition:g}" * (condition != 1)
        + "_complex" * is_complex
    )
    return prescribed(name, spectrum, condition, is_complex)


def clustered(m, k, gap, condition=1.0, is_complex=False):
    """Spectrum 0..m-1 except that, at either end, the first k values are `gap` apart: two clusters of k."""
    inner = _count(m - 2 * k, k)
    step = gap * _count(k)
    spectrum = torch.cat([step, inner, m - 1 - step.flip(0)])
    name = (
        f"clustered{m}_k{k}_gap{gap:g}"
        + f"_cond{condition:g}" * (condition != 1)
        + "_complex" * is_complex
    )
    return prescribed(name, spectrum, condition, is_complex)


def doubled(m):
    """Direct sum of two equal 1-D Laplacians, interleaved: eigenvalues double to the last bit."""
    T = laplacian(m)

    def assemble():
        A = T.assemble()[0]
        indices = torch.cat([2 * A.indices(), 2 * A.indices() + 1], 1)
        return (
            torch.sparse_coo_tensor(
                indices, A.values().repeat(2), (2 * m, 2 * m)
            ).coalesce(),
            None,
        )

    def vectors(position):
        X = torch.zeros(2 * m, len(position), dtype=torch.float64)
        for column, p in enumerate(position.tolist()):
            X[p % 2 :: 2, column] = _sines((m,), torch.tensor([p // 2]))[:, 0]
        return X

    return Problem(
        f"doubled{m}",
        2 * m,
        assemble,
        lambda: T.spectrum.repeat_interleave(2),
        vectors,
        source="by construction",
    )


def wishart(m, n):
    """G G^T / n for G (m, n) normal: squared singular values of G, accurate also where they are small."""
    G = torch.randn(
        m, n, dtype=torch.float64, generator=_generator("wishart", m, n)
    ) / math.sqrt(n)

    def eigenvalues():
        return torch.nn.functional.pad(
            torch.linalg.svdvals(G) ** 2, (0, m - min(m, n))
        ).flip(0)

    return Problem(
        f"wishart{m}x{n}",
        m,
        lambda: (_hermitian(G @ G.mT), None),
        eigenvalues,
        source="Wishart (1928)",
    )


def diagonal(values, name="diagonal"):
    """Diagonal matrix, stored as given: eigenvectors are columns of the identity."""
    values = torch.as_tensor(values, dtype=torch.float64)
    m = len(values)
    order = values.argsort(stable=True)
    return Problem(
        f"{name}{m}",
        m,
        lambda: (_diagonal(values), None),
        lambda: values[order],
        lambda position: torch.eye(m, dtype=torch.float64)[:, order[position]],
        source="by construction",
    )


def rank_deficient(m, rank):
    """Positive semidefinite of the given rank: m - rank zeros, then 1..rank."""
    spectrum = torch.nn.functional.pad(_count(rank, 1), (m - rank, 0))
    return prescribed(f"rank{rank}_of_{m}", spectrum)


# --- Problems from problems ---


def scaled(p, factor):
    """factor A instead of A (factor nonzero; negative reverses the spectrum)."""

    def position(j):
        return j if factor > 0 else p.m - 1 - j

    return Problem(
        f"{p.name}_times{factor:g}",
        p.m,
        lambda: (p.assemble()[0] * factor, p.assemble()[1]),
        lambda: (p.spectrum * factor).sort().values,
        None if p.vectors is None else lambda j: p.vectors(position(j)),
        p.condition,
        p.is_complex,
        p.generalized,
        p.source,
    )


def diagonal_mass(p, condition):
    """D A D against D B D with D^2 = diag from 1 to 1/condition, interleaved: spectrum of p, eigenvectors D^-1 X."""
    power = (
        _count(p.m) * 0.6180339887498949 % 1
    )  # golden ratio: neighbours get very different masses
    d = 10 ** (-math.log10(condition) / 2 * power)

    def assemble():
        A, B = p.assemble()
        return _congruence(A, d), _diagonal(d**2) if B is None else _congruence(B, d)

    return Problem(
        f"{p.name}_mass{condition:g}",
        p.m,
        assemble,
        lambda: p.spectrum,
        None if p.vectors is None else lambda j: p.vectors(j) / d.unsqueeze(-1),
        condition * p.condition,
        p.is_complex,
        True,
        p.source,
    )


def batch(p, shape, dtype=torch.float64, device="cpu"):
    """Dense A (*shape, m, m) and spectrum (*shape, m): entry b is (1 + b) A + b B, so its values are (1 + b) E + b.

    B, shared by the batch, is returned unbatched between them: ``A, B, spectrum``.
    """
    A, B = p.build(dtype, device=device)
    b = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape).unsqueeze(-1)
    c = b.unsqueeze(-1).to(device=device, dtype=dtype)
    identity = torch.eye(p.m, dtype=dtype, device=device)
    return (1 + c) * A + c * (identity if B is None else B), B, (1 + b) * p.spectrum + b


# --- The catalogue ---


@functools.cache
def catalogue():
    """Every kind of problem once, small (m <= 216), as a tuple."""
    problems = [
        laplacian(100),
        laplacian(12, 9),
        laplacian(6, 6, 6),
        laplacian_mass(11, 8),
        sakurai(50),
    ]
    problems += [mikota(60), rod(100), ring(48), ring(45, 1.0), doubled(40)]
    problems += [
        path_graph(60),
        path_graph(60, normalized=True),
        complete_graph(30),
        star_graph(40),
    ]
    problems += [bipartite_graph(12, 20), hypercube_graph(6)]
    problems += [
        diagonal(_count(100, 1) / 10),
        diagonal(torch.zeros(40), "zero"),
        diagonal(torch.ones(40), "identity"),
    ]
    problems += [
        indefinite(80),
        indefinite(80, 1e3),
        indefinite(80, is_complex=True),
        indefinite(80, 1e3, True),
    ]
    problems += [clustered(60, 3, gap) for gap in (1e-2, 1e-6, 1e-10, 1e-13)]
    problems += [
        clustered(60, 3, 1e-10, 1e2, True),
        wishart(80, 160),
        wishart(60, 20),
        rank_deficient(60, 15),
    ]
    problems += [
        scaled(laplacian(100), -1),
        scaled(laplacian(12, 9), 1e30),
        scaled(laplacian(12, 9), 1e-30),
    ]
    problems += [scaled(laplacian(12, 9), 1e200), scaled(laplacian(12, 9), 1e-200)]
    problems += [
        diagonal_mass(laplacian(12, 9), 1e2),
        diagonal_mass(indefinite(80, is_complex=True), 1e2),
    ]
    return tuple(problems)


def get(name):
    """The problem of the catalogue called name, or the only one whose name starts with it."""
    exact = [p for p in catalogue() if p.name == name]
    found = exact or [p for p in catalogue() if p.name.startswith(name)]
    if len(found) != 1:
        raise KeyError(
            f"{name!r} fits {[p.name for p in found or catalogue()]}; give one name"
        )
    return found[0]
