"""What torch.lobpcg and its peers offer: a row is a feature, and its answer is compared with one found another way."""

from __future__ import annotations

import functools
import sys
import warnings

import torch
from benchmark import peers, upstream
from benchmark.peers import NotOffered


class Wrong(Exception):
    """An answer, and how far off it is."""


# --- the interfaces: pairs(A, k, B, largest, **more) -> E, X ------------------------------------------------------


def eigh(A, k, B=None, largest=False, **more):
    """torch.linalg.eigh."""
    if B is not None or more or callable(A):
        raise NotOffered
    return peers.dense_pairs((A + A.mH) / 2, k, largest)


def xitorch(A, k, B=None, largest=False, X=None, **more):
    """xitorch.linalg.symeig, a method of its own choice."""
    if more:
        raise NotOffered
    return peers.xitorch_pairs(A, k, B, largest, None if X is None else X.shape[-2])


def scipy(A, k, B=None, largest=False, X=None, iK=None, tol=1e-8, niter=1000):
    """scipy.sparse.linalg.lobpcg: arrays in and out, no gradient."""
    import numpy
    import scipy.sparse.linalg

    def matrix(A):
        if A is None or callable(A):
            return None if A is None else lambda V: A(torch.from_numpy(V)).numpy()
        if A.requires_grad or A.dim() > 2:
            raise NotOffered
        return scipy.sparse.coo_array(A.to_dense().numpy()).tocsr() if A.is_sparse else A.numpy()

    dtype = "float64" if callable(A) else str(A.dtype).split(".")[1]
    start = numpy.random.default_rng(0).standard_normal((A.shape[-1] if X is None else X.shape[-2], k)).astype(dtype)
    options = {"B": matrix(B), "M": matrix(iK), "tol": tol, "maxiter": niter, "largest": largest}
    return tuple(map(torch.from_numpy, scipy.sparse.linalg.lobpcg(matrix(A), start, **options)))


def lobpcg(A, k, largest=False, **more):
    """torch.lobpcg."""
    return torch.lobpcg(A, k=k, largest=largest, **more)


def unpatched(A, k, largest=False, **more):
    """torch.lobpcg before the patch."""
    return _unpatched()(A, k=k, largest=largest, **more)


@functools.cache
def _unpatched():
    return upstream.load().lobpcg


PEERS = {"lobpcg": lobpcg, "eigh": eigh, "xitorch": xitorch, "scipy": scipy, "unpatched": unpatched}


# --- matrices with a known answer ---------------------------------------------------------------------------------


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def prescribed(e, dtype=torch.float64, seed=0):
    """A = Q diag(e) Q^H and Q."""
    Q = torch.linalg.qr(randn(len(e), len(e), dtype=dtype, seed=seed)).Q
    A = (Q * e) @ Q.mH
    return (A + A.mH) / 2, Q


def ladder(m, dtype=torch.float64):
    """Eigenvalues with relative gaps that neither grow nor vanish."""
    return prescribed(torch.linspace(1, 2, m, dtype=torch.float64) ** 3, dtype)


def path(m):
    """The second difference as a COO tensor, and its eigenvalues 4 sin^2(j pi / (2 m + 2))."""
    i, one = torch.arange(m), torch.ones(m, dtype=torch.float64)
    index = torch.cat([torch.stack([i, i]), torch.stack([i[1:], i[:-1]]), torch.stack([i[:-1], i[1:]])], 1)
    A = torch.sparse_coo_tensor(index, torch.cat([2 * one, -one[1:], -one[1:]]), (m, m)).coalesce()
    return A, 4 * torch.sin(torch.arange(1, m + 1) * torch.pi / (2 * m + 2)).double() ** 2


def projector_gradient(e, Q, W, k):
    """The gradient of Re tr(W P) in A = Q diag(e) Q^H, P the projector onto the first k columns of Q."""
    H = torch.zeros(len(e), len(e), dtype=torch.float64)
    H[:k, k:] = 1 / (e[:k, None] - e[None, k:])
    return Q @ ((Q.mH @ W @ Q) * (H + H.mT)) @ Q.mH


def close(value, reference, bound):
    error = float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))
    if not error <= bound:
        raise Wrong(f"{error:.0e} off")


def warned(action):
    """The result of action() and whether it warned."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = action()
    return result, bool(seen)


# --- the rows: NAME(pairs) returns where the feature is there -------------------------------------------------------


def generalized(pairs):
    """A x = λ B x with B ≠ I"""
    A, _ = ladder(60)
    B = torch.diag(torch.linspace(1, 3, 60, dtype=torch.float64))
    E, X = pairs(A, 3, B=B)
    close(A @ X, B @ X * E, 1e-5)


def sparse(pairs):
    """a sparse A, kept sparse"""
    A, e = path(100)
    close(pairs(A, 3, largest=True)[0], e.flip(0)[:3], 1e-5)


def callables(pairs):
    """A known by its products alone"""
    A, e = path(100)
    A, start = A.to_dense(), randn(100, 3)  # xitorch expands its blocks, which a sparse product does not take
    close(pairs(lambda V: A @ V, 3, largest=True, X=start)[0], e.flip(0)[:3], 1e-5)


def preconditioner(pairs):
    """a preconditioner that counts: done in 60 iterations"""
    d = torch.logspace(0, 6, 300, dtype=torch.float64)
    E, _ = pairs(torch.diag(d), 3, iK=torch.diag(1 / (d + 1)), niter=60, tol=1e-8)
    close(E, d[:3], 1e-6)


def batch(pairs):
    """a batch of matrices in one call"""
    matrices, e = zip(*[(M, (torch.linspace(1, 2, 20).double() + j) ** 3) for j, M in enumerate(_batch())])
    close(pairs(torch.stack(matrices), 2)[0], torch.stack(e)[:, :2], 1e-5)


def _batch():
    for j in range(3):
        yield prescribed((torch.linspace(1, 2, 20).double() + j) ** 3)[0]


def hermitian(pairs):
    """complex Hermitian A"""
    A, Q = ladder(60, torch.complex128)
    _, X = pairs(A, 3)
    close(X @ X.mH, Q[:, :3] @ Q[:, :3].mH, 1e-5)


def unconverged(pairs):
    """a result that has not converged is said to be so"""
    A, _ = ladder(300)
    if not warned(lambda: pairs(A, 3, niter=2))[1]:
        raise Wrong("silent")


def gradient(pairs):
    """gradient of eigenvectors, k = 20 of m = 200, float64"""
    _projector(pairs, 200, 20, torch.float64, 1e-6)


def gradient_single(pairs):
    """the same, k = 5 of m = 100, float32"""
    _projector(pairs, 100, 5, torch.float32, 1e-3)


def _projector(pairs, m, k, dtype, bound):
    e = torch.linspace(1, 2, m, dtype=torch.float64) ** 3
    A, Q = prescribed(e)
    W = randn(m, m, seed=1)
    W = (W + W.mT) / 2
    matrix = A.to(dtype).requires_grad_()
    _, X = pairs(matrix, k)
    ((W.to(dtype) @ X) * X).sum().backward()
    close((matrix.grad + matrix.grad.mT).double() / 2, projector_gradient(e, Q, W, k), bound)


def gradient_b(pairs):
    """gradient in B: dE = -E x^T dB x"""
    A, _ = ladder(30)
    B = torch.diag(torch.linspace(1, 3, 30, dtype=torch.float64)).requires_grad_()
    E, X = pairs(A, 2, B=B)
    E[0].backward()
    x = X[:, :1].detach()
    close((B.grad + B.grad.mT) / 2, -E[0].detach() * x @ x.mT, 1e-5)


def gradient_sparse(pairs):
    """gradient on the stored entries of a sparse A"""
    A, _ = path(100)
    values = A.values().clone().requires_grad_()
    E, X = pairs(torch.sparse_coo_tensor(A.indices(), values, A.shape), 2, largest=True)
    E[0].backward()
    x = X[:, 0].detach()
    close(values.grad, x[A.indices()[0]] * x[A.indices()[1]], 1e-5)


def small_gap(pairs):
    """gap 1e-12 inside the k, loss tr(W X X^T): error below 1e-8"""
    e = torch.linspace(1, 2, 60, dtype=torch.float64)
    e[:4] = torch.tensor([0.0, 0.2, 0.2 + 1e-12, 0.5], dtype=torch.float64)
    for seed in range(4):  # rounding can be lucky
        A, Q = prescribed(e, seed=seed)
        W = randn(60, 60, seed=seed + 10)
        W = (W + W.mT) / 2
        A.requires_grad_()
        _, X = pairs(A, 4)
        ((W @ X) * X).sum().backward()
        close((A.grad + A.grad.mT) / 2, projector_gradient(e, Q, W, 4), 1e-8)


def ill_posed(pairs):
    """one vector of a repeated eigenvalue: refused, or warned of"""
    A = prescribed(torch.tensor([1.0, 1.0, *range(2, 12)], dtype=torch.float64))[0].requires_grad_()

    def run():
        pairs(A, 2)[1][:, 0].pow(3).sum().backward()

    try:
        loud = warned(run)[1]
    except RuntimeError as error:
        loud = "equal" in str(error) or "ill" in str(error)
    if not loud and bool(A.grad.isfinite().all()):
        raise Wrong("a number, silently")
    if not loud:
        raise Wrong("NaN")


def second(pairs):
    """gradgradcheck"""
    A, _ = ladder(12)

    def loss(A):
        E, X = pairs((A + A.mT) / 2, 2)
        return E, X @ X.mT

    loss(A)
    if not torch.autograd.gradgradcheck(loss, A.requires_grad_()):
        raise Wrong("fails")


def forward_mode(pairs):
    """forward mode, against reverse mode"""
    A, _ = ladder(12)

    def loss(A):
        E, X = pairs((A + A.mT) / 2, 2)
        return E.sin().sum() + (X @ X.mT)[0, 1]

    dA = randn(12, 12, seed=1)
    tangent = torch.func.jvp(loss, (A,), (dA,))[1]
    matrix = A.clone().requires_grad_()
    loss(matrix).backward()
    close(tangent, (matrix.grad * dA).sum(), 1e-6)


def vmap(pairs):
    """torch.func.vmap of torch.func.grad"""
    A = torch.stack(list(_batch()))

    def loss(A):
        E, X = pairs((A + A.mT) / 2, 2)
        return E.sin().sum() + (X @ X.mT)[0, 1]

    close(torch.func.vmap(torch.func.grad(loss))(A), torch.stack([torch.func.grad(loss)(M) for M in A]), 1e-6)


ROWS = {
    "generalized": generalized,
    "sparse": sparse,
    "callables": callables,
    "preconditioner": preconditioner,
    "batch": batch,
    "hermitian": hermitian,
    "unconverged": unconverged,
    "gradient": gradient,
    "gradient-single": gradient_single,
    "gradient-b": gradient_b,
    "gradient-sparse": gradient_sparse,
    "small-gap": small_gap,
    "ill-posed": ill_posed,
    "second": second,
    "forward-mode": forward_mode,
    "vmap": vmap,
}


def ask(row, peer) -> str:
    """The cell: "yes", how far off, or "no"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ROWS[row](PEERS[peer])
    except ImportError:
        return "not installed"
    except Wrong as wrong:
        return str(wrong)
    except NotOffered:
        return "no"
    except Exception as error:  # whatever the peer raises is its answer
        print(f"{row}: {peer}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return "no"
    return "yes"
