"""The problems of the cases with their exact eigenvalues and gradients, from the catalogue of known spectra.

The exact gradient uses the whole eigenbasis, known in closed form (sines) or by construction, and no eigensolver.
Matrices without a known spectrum are in matrices.py.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import time
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.sparse
import scipy.sparse.linalg

import torch
from benchmark import matrices


def catalogue():
    """This repository's torch_patch/testing/_internal/lobpcg_problems.py, whatever the PyTorch that is measured has."""
    path = Path(__file__).resolve().parents[2] / "torch_patch" / "testing" / "_internal" / "lobpcg_problems.py"
    name = "benchmark_lobpcg_problems"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Instance:
    """A case's A, B (None: identity), iK, and what is known about them.

    A, B are tensors of the case's dtype and layout. `matrices` are the same two for SciPy (arrays or CSR).
    """

    def __init__(self, case):
        self.case = case
        self.sizes = tuple(case.problem.get("sizes", ()))
        self.problem = None
        self.mass = None  # D of a diagonal mass matrix D^2
        self.condition = 1.0  # of B, a bound
        self.shift = 0.0  # where a factorisation is definite and near the wanted end
        dtype, layout = getattr(torch, case.dtype), getattr(torch, case.layout)
        kind = case.problem["kind"]
        if kind in ("batch", "goe"):
            self.A, self.B = _random(case.problem, dtype), None
            self.exact = torch.linalg.eigvalsh(self.A.double())[..., : case.k]
        elif kind in ("graph", "elements"):
            self.A, self.B = (None if M is None else _tensor(M, dtype) for M in _assembled(case.problem))
            self.exact = None if case.truncated else self._reference()
        else:
            self.problem = _problem(catalogue(), case.problem)
            self.A, self.B = self.problem.build(dtype, layout)
            self.exact, self.condition = self.problem.extreme(case.k, case.largest), self.problem.condition
            if case.problem.get("mass") == "diagonal":
                self.mass = _matrix(self.B).diagonal() ** 0.5
        if kind == "batch":
            self.A_norm, self.B_norm = torch.linalg.matrix_norm(self.A, 2), 1.0
        else:
            self.A_norm, self.B_norm = _norm(_matrix(self.A)), 1.0 if self.B is None else _norm(_matrix(self.B))
        self.m = self.A.shape[-1]
        self.nnz = self.A._nnz() if self.A.layout != torch.strided else self.m**2
        self.setup = 0.0
        self.iK = self._preconditioner()

    @property
    def matrices(self):
        return _matrix(self.A), None if self.B is None else _matrix(self.B)

    def _preconditioner(self):
        """iK as a dense tensor or a SciPy LinearOperator, None without; its cost goes into `setup`."""
        start = time.perf_counter()
        if self.case.iK == "inverse":
            iK = torch.linalg.inv(self.A)
            iK = (iK + iK.mT) / 2
        elif self.case.iK == "lu":
            solve = matrices.factored(self.matrices[0].tocsc()).solve
            iK = scipy.sparse.linalg.LinearOperator((self.m, self.m), solve, matmat=solve, dtype=self.case.dtype)
        elif self.case.iK == "amg":
            import pyamg

            np.random.seed(0)  # noqa: NPY002 - pyamg estimates spectral radii from the global generator
            nullspace = None if self.mass is None else 1 / self.mass[:, None]
            solver = pyamg.smoothed_aggregation_solver(_int32(self.matrices[0]), B=nullspace)
            iK = solver.aspreconditioner()
        else:
            return None
        self.setup = time.perf_counter() - start
        return iK

    def scale(self, E):
        """The denominators of the relative residual for ||x_j|| = 1."""
        return torch.as_tensor(self.A_norm).unsqueeze(-1) + E.abs() * self.B_norm

    def target(self):
        """The absolute residual asked for, when |x_j| = 1; the smallest over j."""
        return float(self.case.tol * self.scale(self.exact).min())

    def residual(self, E, X):
        """Largest relative residual of the pairs."""
        BX = X if self.B is None else self.B @ X
        R = (self.A @ X - BX * E.unsqueeze(-2)).norm(dim=-2) / X.norm(dim=-2)
        return float((R / self.scale(E)).max())

    def missed(self, E):
        """Pairs whose eigenvalue is further from the exact one than the residual explains: |r| / lambda_min(B)."""
        smallest_B = self.B_norm / self.condition
        bound = 2 * self.case.tol * self.scale(self.exact) / smallest_B + 1e-12 * torch.as_tensor(self.A_norm).max()
        return int(((E.double() - self.exact).abs() > bound).sum())

    def _reference(self):
        A, B = self.matrices
        if B is None:
            self.shift = -1e-6 * _norm(A)  # a Laplacian of a graph is singular
        else:
            smallest = scipy.sparse.linalg.eigsh(B.tocsc(), 1, sigma=0, return_eigenvectors=False)[0]
            self.condition = _norm(B) / float(smallest)
        return torch.from_numpy(matrices.lowest(A, B, self.case.k, self.shift))

    # A loss that no choice of eigenvectors inside a multiple eigenvalue can change:
    # L = sum_j w_j (E_j + h x_j^T diag(p) x_j), w_j equal for equal eigenvalues, h the mean |E|.

    def _weights(self):
        gaps = (self.exact[1:] - self.exact[:-1]).abs() > 1e-9 * max(abs(self.problem.radius), 1e-300)
        cluster = torch.cat([torch.zeros(1, dtype=torch.int64), gaps.cumsum(0)])
        profile = torch.cos(3 * torch.linspace(0, 1, self.m, dtype=torch.float64))
        return 1 + cluster.double() / 2, profile.unsqueeze(-1) * float(self.exact.abs().mean())

    def loss(self, E, X):
        w, p = self._weights()
        return (w * E).sum() + (w * (p * X * X).sum(0)).sum()

    @functools.cached_property
    def exact_gradient(self):
        """dL/dA and dL/dB (None without B): arrays for dense A, else values in the order of SciPy's CSR."""
        k, spectrum = self.case.k, self.problem.spectrum.numpy()
        modes = self._modes()
        w, p = (t.numpy() for t in self._weights())
        E = spectrum[:k]
        X = modes.synthesis(np.eye(self.m, k))
        gX = 2 * p * X * w
        coefficients = modes.analysis(gX)  # (m, k): X_full^T gX
        G = coefficients[:k].copy()
        coefficients[:k] = 0
        difference = E - spectrum[:, None]
        difference[:k] = 1
        Z = modes.synthesis(coefficients / difference)
        gap = E[None, :] - E[:, None]
        same = np.abs(gap) <= 1e-9 * self.problem.radius
        W = Z + X @ (np.diag(w) + np.where(same, 0, G) / np.where(same, 1, gap))
        # the normalisation alone ties the vectors of a multiple eigenvalue: Herm(G) / 2 there, its diagonal elsewhere
        WB = -W * E - X @ np.where(same, (G + G.T) / 4, 0)
        return [_product(W, X, _matrix(self.A)), None if self.B is None else _product(WB, X, _matrix(self.B))]

    def _modes(self):
        if self.sizes:
            c = 1 / (8 * len(self.sizes)) if self.case.problem.get("mass") == "7-point" else 0.0
            return _Sines(self.sizes, self.mass, c)
        return _Columns(self.problem.eigenvectors(self.m).numpy())

    def gradient_errors(self, gA, gB):
        """Relative Frobenius error of each gradient that is not None; symmetric parts for dense ones."""
        errors = []
        for g, exact, M in zip((gA, gB), self.exact_gradient, (self.A, self.B)):
            if M is None:
                continue
            got = g.double().numpy() if g.layout == torch.strided else _values(g, M)
            got = (got + got.T) / 2 if got.ndim == 2 else got
            errors.append(float(np.linalg.norm(got - exact) / np.linalg.norm(exact)))
        return errors


class _Columns:
    """The eigenbasis as a matrix; columns ascending, B-orthonormal."""

    def __init__(self, basis):
        self.basis = basis

    def analysis(self, block):
        return self.basis.T @ block

    def synthesis(self, coefficients):
        return self.basis @ coefficients


class _Sines:
    """The eigenbasis of (D L D, D (I - c L) D), L a Laplacian on a grid, by fast sine transforms; ascending."""

    def __init__(self, sizes, d, c):
        self.sizes = sizes
        t = np.zeros(1)
        for n in sizes:
            angle = math.pi * np.arange(1, n + 1) / (n + 1)
            t = (t[:, None] + 4 * np.sin(angle / 2) ** 2).ravel()
        self.order = np.argsort(t / (1 - c * t), kind="stable")
        self.norm = np.sqrt(1 - c * t)[:, None]
        self.d = 1.0 if d is None else d[:, None]

    def _transform(self, block):
        axes = tuple(range(len(self.sizes)))
        return scipy.fft.dstn(block.reshape(*self.sizes, -1), type=1, axes=axes, norm="ortho").reshape(block.shape)

    def analysis(self, block):
        return (self._transform(block / self.d) / self.norm)[self.order]

    def synthesis(self, coefficients):
        grid = np.empty_like(coefficients)
        grid[self.order] = coefficients
        return self._transform(grid / self.norm) / self.d


def tiny(spec, k):
    """The specification of a problem of the same kind, as small as k allows."""
    if spec["kind"] == "laplacian":
        return spec | {"sizes": [6 * k] + [3] * (len(spec["sizes"]) - 1)}
    if spec["kind"] in ("graph", "elements"):
        return spec | {"m": max(400, 10 * k)}
    return spec | {"m": 6 * k} | ({"count": 2} if "count" in spec else {})


def _problem(library, spec):
    kind = spec["kind"]
    if kind == "laplacian":
        sizes, mass = spec["sizes"], spec["mass"]
        if mass == "7-point":
            return library.laplacian_mass(*sizes)
        p = library.laplacian(*sizes)
        return library.diagonal_mass(p, 10.0) if mass == "diagonal" else p
    m = spec["m"]
    if kind == "even":
        return library.prescribed(f"even{m}", torch.linspace(spec.get("smallest", 0.0), 1, m, dtype=torch.float64))
    k = spec["wanted"]
    lowest = torch.linspace(0, 0.1, k, dtype=torch.float64)
    rest = torch.linspace(0.15, 1, m - k, dtype=torch.float64)  # 5 % of the spread between wanted and rest
    return library.prescribed(f"gapped{m}", torch.cat([lowest, rest]), spec.get("condition", 1))


def _random(spec, dtype):
    if spec["kind"] == "goe":
        return torch.from_numpy(matrices.goe(spec["m"])).to(dtype)
    shape = (spec["count"], spec["m"], spec["m"])
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ((G + G.mT) / 2).to(dtype)


def _assembled(spec):
    """A and B (None: identity) as SciPy's sparse matrices."""
    if spec["kind"] == "elements":
        return matrices.elements(spec["dimension"], spec["m"])
    if spec["shape"] == "adjacency":
        return matrices.random_adjacency(spec["m"]), None
    return matrices.laplacian(
        {"geometric": matrices.geometric, "blobs": matrices.blobs}[spec["shape"]](spec["m"])
    ), None


def _tensor(M, dtype):
    M = M.sorted_indices() if hasattr(M, "sorted_indices") else M
    parts = (torch.from_numpy(part.astype(np.int64)) for part in (M.indptr, M.indices))
    return torch.sparse_csr_tensor(*parts, torch.from_numpy(M.data.copy()).to(dtype), size=M.shape)


def _matrix(M):
    """NumPy array, or SciPy CSR, sharing the values where it can."""
    if M.layout == torch.strided:
        return M.numpy()
    if M.layout == torch.sparse_coo:
        M = M.coalesce()
        return scipy.sparse.coo_array((M.values().numpy(), M.indices().numpy()), shape=M.shape).tocsr()
    parts = (M.values().numpy(), *(_index(t) for t in (M.col_indices(), M.crow_indices())))
    return scipy.sparse.csr_array(parts, shape=M.shape)


def _index(t):
    return t.to(torch.int32).numpy()  # what SciPy takes for a matrix of this size, and pyamg requires


def _int32(M):
    M = M.tocsr()
    return scipy.sparse.csr_array((M.data, M.indices.astype(np.int32), M.indptr.astype(np.int32)), shape=M.shape)


def _values(g, M):
    """The values of the sparse gradient g in the order of _matrix(M); NaN if the pattern is another one."""
    got, expected = _matrix(g), _matrix(M)
    if not (np.array_equal(got.indptr, expected.indptr) and np.array_equal(got.indices, expected.indices)):
        return np.full(expected.nnz, np.nan)
    return got.data.astype(np.float64)


def _product(W, X, M):
    """The symmetric part of W X^T, dense or at the entries of the sparse M."""
    if not scipy.sparse.issparse(M):
        g = W @ X.T
        return (g + g.T) / 2
    r, c = M.tocoo().coords
    values = np.zeros(len(r))
    for j in range(X.shape[1]):
        values += (W[r, j] * X[c, j] + W[c, j] * X[r, j]) / 2
    return values


def _norm(M):
    start = np.random.default_rng(0).standard_normal(M.shape[0])
    options = {"which": "LM", "tol": 1e-2, "v0": start.astype(M.dtype), "return_eigenvectors": False}
    return abs(float(scipy.sparse.linalg.eigsh(M, 1, **options)[0]))
