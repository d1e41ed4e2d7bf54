"""The competitors: each solves an Instance and returns eigenvalues and eigenvectors as tensors.

A peer is a class with `solve(A, B, seed, tol)`; A and B are the tensors to solve for (a gradient may be asked of them).
`counts` is what the last solve counted: iterations, columns of A, columns of the preconditioner. The counters are there
in the run that is timed; they cost a Python call a product. `variants` are ways to solve of which the best is taken.
"""

from __future__ import annotations

import contextlib

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

import torch
from benchmark import adjoint, matrices, upstream


class NotOffered(Exception):
    """The peer cannot do what the case asks for."""


class Counted(scipy.sparse.linalg.LinearOperator):
    """A linear map that counts the columns it is applied to."""

    def __init__(self, apply, m, dtype):
        super().__init__(np.dtype(dtype), (m, m))
        self.apply, self.columns = apply, 0

    def _matmat(self, block):
        self.columns += block.shape[-1]
        return self.apply(block)

    def _matvec(self, x):
        self.columns += 1
        return self.apply(x)

    def _adjoint(self):
        return self


class Peer:
    """What the peers share."""

    direct = False  # its residual is rounding, whatever tolerance is asked for
    variants: tuple = ("",)

    def __init__(self, instance, options):
        self.instance, self.case = instance, instance.case
        self.options, self.variant, self.counts = options, self.variants[0], {}

    def counted(self, matrix):
        return Counted(matrix.__matmul__, self.instance.m, self.case.dtype)

    def random(self, seed, *shape):
        return np.random.default_rng(seed).standard_normal((self.instance.m, *shape)).astype(self.case.dtype)


class SciPyPeer(Peer):
    """A peer that takes SciPy's matrices, one problem at a time."""

    def __init__(self, instance, options):
        super().__init__(instance, options)
        if instance.A.dim() > 2:
            raise NotOffered("no batches")
        self.A, self.B = instance.matrices
        self.iK = instance.iK.numpy() if isinstance(instance.iK, torch.Tensor) else instance.iK

    def ordered(self, E, X):
        order = np.argsort(-E if self.case.largest else E)
        return _tensors(E[order], X[:, order])


class Patched(Peer):
    """torch.lobpcg."""

    def __init__(self, instance, options):
        super().__init__(instance, options)
        self.lobpcg, self.worker = torch.lobpcg, torch._lobpcg.LOBPCG
        self.keywords = {"largest": self.case.largest, "iK": self._preconditioner(instance.iK)}
        if self.case.method:
            self.keywords["method"] = self.case.method
        if self.case.niter:
            self.keywords["niter"] = self.case.niter

    def _preconditioner(self, iK):
        if iK is None or isinstance(iK, torch.Tensor):
            return iK

        def apply(block):
            self.counts["columns_iK"] = self.counts.get("columns_iK", 0) + block.shape[-1]
            return torch.from_numpy(np.ascontiguousarray(iK.matmat(block.detach().numpy())))

        return apply

    def solve(self, A, B, seed, tol, **more):
        self.counts = {}
        if self.case.calls > 1:
            # Calls this short would take three times as long with counters around them, and iterate not at all.
            return self.lobpcg(A, self.case.k, B=B, tol=tol, **self.keywords, **more)
        torch.manual_seed(seed)
        with self._counting(A):
            return self.lobpcg(A, self.case.k, B=B, tol=tol, **self.keywords, **more)

    def start(self, seed):
        """A random start block."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.instance.m, self.case.k, dtype=self.instance.A.dtype, generator=generator)

    @contextlib.contextmanager
    def _counting(self, A):
        """Iterations when a worker's run ends; columns as the operands count them. A dense solve counts neither."""
        original, operands, columns = self.worker.run, _operands(), _Columns(self.counts)

        def run(worker):
            original(worker)
            self.counts["iterations"] = worker.ivars["istep"]

        before = operands.__dict__.get("columns")
        self.worker.run, operands.columns = run, columns
        try:
            yield
        finally:
            self.worker.run = original
            if before is None:
                del operands.columns
            else:
                operands.columns = before


class _Columns:
    """The counter `columns` of an operand, whose increments go into `counts` too where the operand is A."""

    def __init__(self, counts):
        self.counts = counts

    def __get__(self, operand, owner):
        return operand.__dict__.get("columns", 0)

    def __set__(self, operand, value):
        if operand.name == "A":
            more = value - operand.__dict__.get("columns", 0)
            self.counts["columns"] = self.counts.get("columns", 0) + more
        operand.__dict__["columns"] = value


def _operands():
    """The class through which torch.lobpcg multiplies; its first version had it elsewhere."""
    try:
        from torch._lobpcg_impl.operand import Operand
    except ModuleNotFoundError:
        from torch._lobpcg_operator import Operator as Operand
    return Operand


class Upstream(Patched):
    """torch.lobpcg of the unpatched file."""

    def __init__(self, instance, options):
        super().__init__(instance, options)
        module = upstream.load(options.get("upstream", ""))
        self.lobpcg, self.worker = module.lobpcg, module.LOBPCG

    def _preconditioner(self, iK):
        if iK is not None and not isinstance(iK, torch.Tensor):
            raise NotOffered("upstream takes no callable as iK")
        return iK

    @contextlib.contextmanager
    def _counting(self, A):
        """Count in the one function through which upstream multiplies."""
        from torch import _linalg_utils

        product, original = _linalg_utils.matmul, self.worker.run

        def matmul(M, block):
            if M is A:
                self.counts["columns"] = self.counts.get("columns", 0) + block.shape[-1]
            return product(M, block)

        def run(worker):
            original(worker)
            self.counts["iterations"] = worker.ivars["istep"]

        _linalg_utils.matmul, self.worker.run = matmul, run
        try:
            yield
        finally:
            _linalg_utils.matmul, self.worker.run = product, original


class Eigh(Peer):
    """torch.linalg.eigh on the dense matrix."""

    direct = True

    def solve(self, A, B, seed, tol):
        if B is not None:
            L = torch.linalg.cholesky(B)
            A = torch.linalg.solve_triangular(L, A, upper=False)
            A = torch.linalg.solve_triangular(L, A.mH, upper=False)
        E, X = dense_pairs(A, self.case.k, self.case.largest)
        return E, X if B is None else torch.linalg.solve_triangular(L.mH, X, upper=True)


class Evr(Peer):
    """scipy.linalg.eigh for the wanted pairs alone, one matrix after the other."""

    direct = True

    def solve(self, A, B, seed, tol):
        m, k = self.instance.m, self.case.k
        wanted = (m - k, m - 1) if self.case.largest else (0, k - 1)
        matrices = A.numpy().reshape(-1, m, m)
        B = None if B is None else B.numpy()
        pairs = [scipy.linalg.eigh(M, B, subset_by_index=wanted) for M in matrices]
        E, X = (torch.from_numpy(np.stack(part)).reshape(A.shape[:-2] + part[0].shape) for part in zip(*pairs))
        return (E.flip(-1), X.flip(-1)) if self.case.largest else (E, X)


class Scipy(SciPyPeer):
    """scipy.sparse.linalg.lobpcg; its tolerance is an absolute residual."""

    def solve(self, A, B, seed, tol):
        product = self.counted(self.A)
        iK = None if self.iK is None else self.counted(self.iK)
        absolute = 0.0 if self.case.truncated else tol / self.case.tol * self.instance.target()
        E, X, history = scipy.sparse.linalg.lobpcg(
            product,
            self.random(seed, self.case.k),
            B=self.B,
            M=iK,
            tol=absolute,
            maxiter=self.case.niter or 1000,
            largest=self.case.largest,
            retResidualNormsHistory=True,
        )
        self.counts = {"iterations": len(history) - 1, "columns": product.columns}
        if iK is not None:
            self.counts["columns_iK"] = iK.columns
        return _tensors(E, X)


class Eigsh(SciPyPeer):
    """scipy.sparse.linalg.eigsh, implicitly restarted Lanczos."""

    def solve(self, A, B, seed, tol):
        product, more = self.counted(self.A), {}
        if scipy.sparse.issparse(self.B):
            more["Minv"] = self.counted(_Factor(self.B))
        E, X = scipy.sparse.linalg.eigsh(
            product,
            self.case.k,
            self.B,
            which="LA" if self.case.largest else "SA",
            v0=self.random(seed),
            tol=tol,
            maxiter=100 * self.instance.m,
            **more,
        )
        self.counts = {"columns": product.columns}
        return self.ordered(E, X)


class ShiftInvert(SciPyPeer):
    """The same on (A - s B)^-1, s below the spectrum."""

    def solve(self, A, B, seed, tol):
        s = self.instance.shift
        shifted = self.A
        if s != 0:
            shifted = self.A - s * (scipy.sparse.eye_array(self.instance.m) if self.B is None else self.B)
        inverse = self.counted(_Factor(shifted))
        E, X = scipy.sparse.linalg.eigsh(
            self.A, self.case.k, self.B, sigma=s, OPinv=inverse, which="LM", v0=self.random(seed), tol=tol
        )
        self.counts = {"columns_iK": inverse.columns}
        return self.ordered(E, X)


class Adjoint(SciPyPeer):
    """Pairs by SciPy's fastest way, the adjoint equations by hand: see adjoint.py."""

    def solve(self, A, B, seed, tol):
        if B is not None or self.case.largest:
            raise NotOffered("smallest pairs, gradients in A alone")
        return adjoint.ByHand.apply(A, self.A, self.case.k, self.random(seed), tol)


class _Factor:
    """The inverse of a sparse symmetric matrix by its factorisation."""

    def __init__(self, A):
        self.factor = matrices.factored(A.tocsc())

    def __matmul__(self, block):
        return self.factor.solve(block)


class Primme(SciPyPeer):
    """PRIMME's eigsh: generalised Davidson and Jacobi-Davidson."""

    variants = ("PRIMME_DYNAMIC", "PRIMME_GD_Olsen_plusK", "PRIMME_JDQMR")

    def __init__(self, instance, options):
        import primme

        super().__init__(instance, options)
        self.eigsh = primme.eigsh

    def solve(self, A, B, seed, tol):
        E, X, stats = self.eigsh(
            self.A,
            self.case.k,
            M=self.B,
            which="LA" if self.case.largest else "SA",
            v0=self.random(seed, 1),
            tol=tol,
            OPinv=self.iK,
            method=self.variant,
            return_stats=True,
        )
        self.counts = {"iterations": stats["numOuterIterations"], "columns": stats["numMatvecs"]}
        if self.iK is not None:
            self.counts["columns_iK"] = stats["numPreconds"]
        return self.ordered(E, X)


class Xitorch(Peer):
    """xitorch.linalg.symeig."""

    direct = True

    def __init__(self, instance, options):
        import xitorch.linalg  # noqa: F401

        super().__init__(instance, options)

    def solve(self, A, B, seed, tol):
        torch.manual_seed(seed)
        return xitorch_pairs(A, self.case.k, B, self.case.largest, **self._options(tol))

    def _options(self, tol):
        return {"method": "exacteig"}


class XitorchDavidson(Xitorch):
    """Davidson forward, conjugate gradients backward."""

    direct = False

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
    "beside": Patched,
    "upstream": Upstream,
    "eigh": Eigh,
    "evr": Evr,
    "scipy": Scipy,
    "eigsh": Eigsh,
    "shift-invert": ShiftInvert,
    "adjoint": Adjoint,
    "primme": Primme,
    "xitorch": Xitorch,
    "xitorch-davidson": XitorchDavidson,
}
