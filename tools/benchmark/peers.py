"""The competitors: each solves an Instance and returns eigenvalues and eigenvectors as tensors.

A peer is a class with `solve(A, B, seed, tol)`; A and B are the tensors to solve for (a gradient may be asked of
them). `count(seed, tol)`, where a peer has it, returns iterations, columns of A, and the sum of active columns.
"""

from __future__ import annotations

import contextlib

import numpy as np
import scipy.sparse.linalg

import torch
from benchmark import upstream


class NotOffered(Exception):
    """The peer cannot do what the case asks for."""


class Patched:
    """torch.lobpcg."""

    def __init__(self, instance, options):
        self.instance, self.case = instance, instance.case
        self.lobpcg = torch.lobpcg
        self.iK = self._preconditioner(instance.iK)
        self.keywords = {"largest": self.case.largest, "iK": self.iK}
        if self.case.method:
            self.keywords["method"] = self.case.method
        if self.case.niter:
            self.keywords["niter"] = self.case.niter

    def _preconditioner(self, iK):
        if iK is None or isinstance(iK, torch.Tensor):
            return iK
        return lambda block: torch.from_numpy(np.ascontiguousarray(iK.matmat(block.detach().numpy())))

    def solve(self, A, B, seed, tol, **more):
        torch.manual_seed(seed)
        return self.lobpcg(A, self.case.k, B=B, tol=tol, **self.keywords, **more)

    def start(self, seed):
        """A random start block."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.instance.m, self.case.k, dtype=self.instance.A.dtype, generator=generator)

    def count(self, seed, tol):
        record = _Record()
        A = self.instance.A
        if A.dim() == 2:
            with self._counted(A, record) as operand:
                # a callable has no dtype or size: the start block gives both
                more = {} if operand is A else {"X": self.start(seed)}
                self.solve(operand, self.instance.B, seed, tol, tracker=record, **more)
        else:
            raise NotOffered("no count for batches")
        return record.summary()

    @contextlib.contextmanager
    def _counted(self, A, record):
        def product(block):
            record.columns += block.shape[-1]
            return A @ block

        yield product


class Upstream(Patched):
    """torch.lobpcg of the unpatched file."""

    def __init__(self, instance, options):
        super().__init__(instance, options)
        self.lobpcg = upstream.load(options.get("upstream", "")).lobpcg

    def _preconditioner(self, iK):
        if iK is not None and not isinstance(iK, torch.Tensor):
            raise NotOffered("upstream takes no callable as iK")
        return iK

    @contextlib.contextmanager
    def _counted(self, A, record):
        """Count in the one function through which upstream multiplies."""
        from torch import _linalg_utils

        original = _linalg_utils.matmul

        def matmul(M, block):
            if M is A:
                record.columns += block.shape[-1]
            return original(M, block)

        _linalg_utils.matmul = matmul
        try:
            yield A
        finally:
            _linalg_utils.matmul = original


class _Record:
    """A tracker for torch.lobpcg that notes iterations and active columns."""

    def __init__(self):
        self.columns = 0
        self.steps = []  # (iteration, active columns after it)
        self.block = 0

    def __call__(self, worker):
        errors, tol = worker.tvars.get("rerr"), worker.fparams["tol"]
        self.block = worker.X.shape[-1]
        done = worker.ivars["converged_count"] if errors is None else int((errors <= tol).sum())
        self.steps.append((worker.ivars["istep"], self.block - done))

    def summary(self):
        """The start block counts as one step with all its columns; the last step's remaining ones are never used."""
        active = self.block + sum(max(a, 1) for _, a in self.steps[:-1])
        return {"iterations": max(step for step, _ in self.steps), "columns": self.columns, "active": active}


class Eigh:
    """torch.linalg.eigh on the dense matrix."""

    def __init__(self, instance, options):
        self.case = instance.case

    def solve(self, A, B, seed, tol):
        if B is not None:
            L = torch.linalg.cholesky(B)
            A = torch.linalg.solve_triangular(L, A, upper=False)
            A = torch.linalg.solve_triangular(L, A.mH, upper=False)
        E, X = dense_pairs(A, self.case.k, self.case.largest)
        return E, X if B is None else torch.linalg.solve_triangular(L.mH, X, upper=True)


class Scipy:
    """scipy.sparse.linalg.lobpcg; its tolerance is an absolute residual."""

    def __init__(self, instance, options):
        self.instance, self.case = instance, instance.case
        if instance.A.dim() > 2:
            raise NotOffered("no batches")
        self.A, self.B = instance.matrices
        self.iK = instance.iK.numpy() if isinstance(instance.iK, torch.Tensor) else instance.iK

    def solve(self, A, B, seed, tol):
        E, X, _ = self._run(self.A, seed, tol)
        return _tensors(E, X)

    def _run(self, A, seed, tol):
        shape = (self.instance.m, self.case.k)
        start = np.random.default_rng(seed).standard_normal(shape).astype(self.case.dtype)
        absolute = tol * self.instance.target() / self.instance.tolerance()
        return scipy.sparse.linalg.lobpcg(
            A,
            start,
            B=self.B,
            M=self.iK,
            tol=absolute,
            maxiter=self.case.niter or 1000,
            largest=self.case.largest,
            retResidualNormsHistory=True,
        )

    def count(self, seed, tol):
        columns = 0

        def product(block):
            nonlocal columns
            columns += 1 if block.ndim == 1 else block.shape[-1]
            return self.A @ block

        shape = (self.instance.m, self.instance.m)
        operator = scipy.sparse.linalg.LinearOperator(shape, matvec=product, matmat=product, dtype=self.A.dtype)
        history = self._run(operator, seed, tol)[2]
        absolute = tol * self.instance.target() / self.instance.tolerance()
        active = self.case.k + sum(max(int((np.asarray(h) > absolute).sum()), 1) for h in history[:-1])
        return {"iterations": len(history) - 1, "columns": columns, "active": active}


class Eigsh:
    """scipy.sparse.linalg.eigsh, implicitly restarted Lanczos."""

    shift = None

    def __init__(self, instance, options):
        self.instance, self.case = instance, instance.case
        if instance.A.dim() > 2:
            raise NotOffered("no batches")
        self.A, self.B = instance.matrices
        if self.B is not None and self.shift is None and scipy.sparse.issparse(self.B):
            raise NotOffered("sparse B needs a factorisation")
        if self.shift is not None and scipy.sparse.issparse(self.A):
            self.A, self.B = self.A.tocsc(), None if self.B is None else self.B.tocsc()

    def solve(self, A, B, seed, tol):
        start = np.random.default_rng(seed).standard_normal(self.instance.m).astype(self.case.dtype)
        which = ("LA" if self.case.largest else "SA") if self.shift is None else "LM"
        E, X = scipy.sparse.linalg.eigsh(
            self.A, self.case.k, self.B, sigma=self.shift, which=which, v0=start, tol=tol, maxiter=100 * self.instance.m
        )
        order = np.argsort(-E if self.case.largest else E)
        return _tensors(E[order], X[:, order])


class EigshInvert(Eigsh):
    """The same on (A - 0 B)^-1: the smallest of a positive definite pencil."""

    shift = 0.0


class Xitorch:
    """xitorch.linalg.symeig."""

    def __init__(self, instance, options):
        import xitorch.linalg  # noqa: F401

        self.case = instance.case

    def solve(self, A, B, seed, tol):
        torch.manual_seed(seed)
        return xitorch_pairs(A, self.case.k, B, self.case.largest, **self._options(tol))

    def _options(self, tol):
        return {"method": "exacteig"}


class XitorchDavidson(Xitorch):
    """Davidson forward, conjugate gradients backward."""

    def _options(self, tol):
        return {"method": "davidson", "min_eps": tol, "bck_options": {"method": "cg", "rtol": tol}}


def dense_pairs(A, k, largest):
    """The k extreme pairs of torch.linalg.eigh."""
    E, X = torch.linalg.eigh(A)
    return (E[..., -k:].flip(-1), X[..., -k:].flip(-1)) if largest else (E[..., :k], X[..., :k])


def xitorch_pairs(A, k, B, largest, size=None, **options):
    """xitorch.linalg.symeig of matrices, or of products with blocks of `size` rows."""
    import xitorch.linalg

    class Product(xitorch.LinearOperator):
        def __init__(self, product):
            super().__init__((size, size), is_hermitian=True, dtype=torch.float64, device=torch.device("cpu"))
            self.product = product

        def _mv(self, x):
            return self.product(x.unsqueeze(-1)).squeeze(-1)

        def _getparamnames(self, prefix=""):
            return []

    def operator(A):
        return Product(A) if callable(A) else xitorch.LinearOperator.m(A, is_hermitian=True)

    M, mode = None if B is None else operator(B), "uppest" if largest else "lowest"
    E, X = xitorch.linalg.symeig(operator(A), neig=k, mode=mode, M=M, **options)
    return (E.flip(-1), X.flip(-1)) if largest else (E, X)


def _tensors(E, X):
    return torch.from_numpy(np.ascontiguousarray(E)), torch.from_numpy(np.ascontiguousarray(X))


CLASSES = {
    "patched": Patched,
    "upstream": Upstream,
    "eigh": Eigh,
    "scipy": Scipy,
    "eigsh": Eigsh,
    "eigsh-invert": EigshInvert,
    "xitorch": Xitorch,
    "xitorch-davidson": XitorchDavidson,
}
