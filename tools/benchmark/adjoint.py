"""What a program does without a differentiable solver: pairs from SciPy, and the adjoint equations solved by hand.

Dense: LAPACK's partial solver, and a bordered system a pair. Sparse: one factorisation of A for the pairs, which then
preconditions conjugate gradients a pair. Gradients in A alone.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import torch
from benchmark.matrices import factored


class ByHand(torch.autograd.Function):
    """A (strided or CSR) -> E, X of the k smallest pairs."""

    @staticmethod
    def forward(ctx, A, matrix, k, start, tol):
        if scipy.sparse.issparse(matrix):
            ctx.inverse = factored(matrix.tocsc())
            m = matrix.shape[0]
            OPinv = scipy.sparse.linalg.LinearOperator((m, m), ctx.inverse.solve, dtype=matrix.dtype)
            E, X = scipy.sparse.linalg.eigsh(matrix, k, sigma=0.0, OPinv=OPinv, v0=start, tol=tol)
            order = np.argsort(E)
            E, X = E[order], X[:, order]
        else:
            E, X = scipy.linalg.eigh(matrix, subset_by_index=(0, k - 1))
        ctx.matrix, ctx.pairs, ctx.tol = matrix, (E, X), tol
        ctx.save_for_backward(A)
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (E, X))

    @staticmethod
    def backward(ctx, gE, gX):
        E, X = ctx.pairs
        gE, gX = gE.numpy(), gX.numpy()
        G = X.T @ gX
        gap = E[None, :] - E[:, None]
        same = np.abs(gap) <= 1e-9 * np.abs(E).max()
        W = X @ (np.diag(gE) + np.where(same, 0.0, G) / np.where(same, 1.0, gap))
        # (A - E_j) z_j = -(I - X X^T) gX_j, X^T z_j = 0
        solve = _sparse if scipy.sparse.issparse(ctx.matrix) else _dense
        W += solve(ctx, X @ G - gX)
        return _symmetric(ctx.saved_tensors[0], torch.from_numpy(W), torch.from_numpy(X)), None, None, None, None


def _dense(ctx, right):
    (E, X), A = ctx.pairs, ctx.matrix
    m, k = X.shape
    Z = np.empty_like(right)
    for j in range(k):
        bordered = np.block([[A - E[j] * np.eye(m), X], [X.T, np.zeros((k, k))]])
        Z[:, j] = scipy.linalg.solve(bordered, np.concatenate([right[:, j], np.zeros(k)]), assume_a="sym")[:m]
    return Z


def _sparse(ctx, right):
    (E, X), A = ctx.pairs, ctx.matrix
    m, Z = A.shape[0], np.empty_like(right)
    project = lambda v: v - X @ (X.T @ v)
    M = scipy.sparse.linalg.LinearOperator((m, m), lambda v: project(ctx.inverse.solve(project(v))), dtype=A.dtype)
    for j in range(len(E)):
        shifted = lambda v, j=j: project(A @ v - E[j] * v)
        operator = scipy.sparse.linalg.LinearOperator((m, m), shifted, dtype=A.dtype)
        Z[:, j], _ = scipy.sparse.linalg.cg(operator, right[:, j], rtol=1e-8, M=M)
    return project(Z)


def _symmetric(A, W, X):
    """The symmetric part of W X^T: dense, or on the entries of A."""
    if A.layout == torch.strided:
        P = W @ X.mT
        return (P + P.mT) / 2
    rows = torch.repeat_interleave(torch.arange(A.shape[0]), A.crow_indices().diff())
    columns = A.col_indices()
    values = sum(W[rows, j] * X[columns, j] + W[columns, j] * X[rows, j] for j in range(X.shape[1])) / 2
    return torch.sparse_csr_tensor(A.crow_indices(), columns, values, A.shape)
