"""Forward- and reverse-mode derivatives of k extreme eigenpairs, tensors in, tensors out.

A X = B X diag(E), X^H B X = I.  Herm and Skew are the parts of a square matrix.  With G = X^H gX, the reduced
resolvents R_j of module _lobpcg_resolvent, and F_ij = 1 / (E_j - E_i), but 0 on the diagonal and inside a cluster
(Magnus 1985; Giles 2008, NA-08-01; generalized to B != I):

    reverse   W    = X (diag(gE) + Skew(G) o F) - [R_j gX_j]
              gA   = Herm(W X^H)
              gB   = -Herm(W diag(E) X^H) - 1/2 X Herm(G) X^H

    forward   b    = dA X - dB X diag(E),  S = X^H b
              dE   = Re diag(S)
              dX   = X (Herm(S) o F - 1/2 X^H dB X) - [R_j b_j]

Textbooks have G o F and S o F with the diagonals of Herm(G) and X^H dB X only, which is the same for distinct
eigenvalues: F is antisymmetric, so Herm(G) o F cancels in gA and leaves 1/2 Herm(G) in gB, and Skew(S) o F is
-1/2 X^H dB X off the diagonal.  Here no such part is divided by a gap, and the formulas hold inside a cluster as well:
there the normalisation X^H B X = I still ties the vectors to each other, whatever basis of the cluster X is.

All of it consists of differentiable operations, so every order of derivative follows from this one.  Only a cluster
needs more: there diag(E) varies as a full matrix, L = diag(E) + N, N_ij = Herm(X^H (A X - B X diag(E)))_ij for i and j
in one cluster.  N is 0, and its differential is Herm(S).  The equations with L in the place of diag(E),

    C L - L C = Skew(G),    A Z - B Z L = (I - B X X^H) gX,    W = X (diag(gE) + C) - Z,    V = W L  in gB,

are solved to first order in N, which makes the second derivative exact; diag(E) itself is a constant there.
"""

import math
from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_complement import in_double, is_small_and_dense, solve_on_complement
from torch._lobpcg_function import in_transform
from torch._lobpcg_gauge import CheckOptions, generic_basis, is_late, pair_factors, SecondOrderAtMost
from torch._lobpcg_pattern import apply, hermitian_apply, hermitian_outer, multiply
from torch._lobpcg_resolvent import nearest_outside, rayleigh_quotient, reduced_resolvent, SolveOptions


def corrected(
    A: Any, B: Any, E: Tensor, X: Tensor, residual: Tensor, scale: Tensor, largest: bool, tol: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """k pairs fit for a derivative: one Newton step if the pencil is small and dense, and a generic basis of every
    repeated eigenvalue (see `generic_basis`).  E, X, residual.

    Derivatives take the pairs as exact, so their error is |r| / gap.  The step x_j - R_j r_j, then Rayleigh-Ritz, makes
    that error quadratic in |r|: at m = 200 and tol = 1e-8 it fell from 2e-7 to 1e-13.  Single precision is corrected in
    double, which leaves the rounding of the result: at m = 100, gap 1e-3, the gradient's error fell from 2e-4 to 1e-6.
    Pairs that have not converged stay as they are, to be reported as such.
    """
    m, k = X.shape[-2:]
    E, X, residual = _newton_step(A, B, E, X, residual, scale, largest, tol)
    return E, generic_basis(E, X, scale, CheckOptions(m, k, tol, _pair_eps(A, B, E, m), largest)), residual


def _pair_eps(A: Any, B: Any, E: Tensor, m: int) -> float:
    """Unit rounding of the arithmetic that the pairs have gone through."""
    return torch.finfo(torch.float64 if is_small_and_dense(A, B, m) else E.dtype).eps


def _newton_step(
    A: Any, B: Any, E: Tensor, X: Tensor, residual: Tensor, scale: Tensor, largest: bool, tol: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """E, X, residual after the step, or as they were where it does not help."""
    m, k = X.shape[-2:]
    eps = torch.finfo(E.dtype).eps
    if A is None or k == m or not is_small_and_dense(A, B, m):
        return E, X, residual
    if bool((residual > max(tol, 16 * math.sqrt(m) * eps) * scale).any()):
        return E, X, residual
    single = E.dtype == torch.float32
    # A dense forward is at rounding level already: nothing to win.
    if not single and bool((residual <= math.sqrt(m) * eps * scale).all()):
        return E, X, residual
    A, B, e, x = (in_double(M) for M in (A, B, E, X))
    r = multiply(A, x) - multiply(B, x) * e.unsqueeze(-2)
    before = torch.linalg.vector_norm(r, dim=-2)
    # A relative error of the step is as good as the square of what it corrects.
    Z = x - solve_on_complement(A, B, e, x, r, None, None, largest, 1e-4, quiet=True)
    L, info = torch.linalg.cholesky_ex(Z.mH @ multiply(B, Z))
    Z = torch.linalg.solve_triangular(L, Z.mH, upper=False).mH
    H = Z.mH @ multiply(A, Z)
    ritz, V = torch.linalg.eigh((H + H.mH) / 2)
    if largest:
        ritz, V = ritz.flip(-1), V.flip(-1)
    Z = Z @ V
    after = torch.linalg.vector_norm(multiply(A, Z) - multiply(B, Z) * ritz.unsqueeze(-2), dim=-2)
    better = ((after.amax(-1) < before.amax(-1)) & (info == 0)).unsqueeze(-1)
    return (
        torch.where(better, ritz, e).to(E.dtype),
        torch.where(better.unsqueeze(-1), Z, x).to(X.dtype),
        torch.where(better, after.to(E.dtype), residual),
    )


class ComputedPairs:
    """A pencil and what the forward found: E (*, k), X (*, m, k), further approximate pairs T (*, p), Y (*, m, p),
    residuals (*, k + p) with the scale they are measured against, the preconditioner, and how it was solved."""

    def __init__(
        self,
        A: Any,
        B: Any,
        E: Tensor,
        X: Tensor,
        T: Tensor,
        Y: Tensor,
        residual: Tensor,
        scale: Tensor,
        iK: Any,
        tol: float,
        options: SolveOptions,
    ) -> None:
        self.A, self.B, self.E, self.X, self.T, self.Y = A, B, E, X, T, Y
        self.residual, self.scale, self.iK = residual, scale, iK
        self.tol, self.options, self.largest = tol, options, options.largest

    def resolvent(self, b: Tensor, E: Optional[Tensor] = None) -> Tensor:
        shifts = self.E if E is None else E
        return reduced_resolvent(self.A, self.B, shifts, self.X, b, self.Y, self.iK, self.options, self.T)

    @property
    def all_known(self) -> bool:
        return self.E.shape[-1] + self.T.shape[-1] == self.X.shape[-2]

    def factors(
        self,
        G: Optional[Tensor],
        gE: Optional[Tensor],
        b: Optional[Tensor],
        Z: Optional[Tensor],
        forward_mode: bool = False,
    ) -> Tuple[Tensor, bool]:
        """F, and whether some of the pairs are a cluster to it.  Z = [R_j b_j]; without b, in reverse mode, gX is 0."""
        m, k = self.X.shape[-2:]
        eps = _pair_eps(self.A, self.B, self.E, m)
        options = CheckOptions(m, k, self.tol, eps, self.largest, forward_mode)
        gX = None if forward_mode else b
        T, Y = self.T, self.Y
        if not self.all_known:
            T = self._with_values_outside(b, Z)
            if self.B is not None and Z is not None:
                # Longer than the others where B is small: residuals count for more there.
                squared = (Z.conj() * apply(self.B, Z)).sum(-2, keepdim=True).abs().detach()
                Z = Z.detach() / torch.sqrt(torch.where(squared > 0, squared, torch.ones_like(squared)))
                Y = torch.cat([Y.expand(tuple(Z.shape[:-1]) + (Y.shape[-1],)), Z], -1)
        F = pair_factors(self.E, self.X, G, gE, gX, T, Y, self.residual, self.scale, options)
        return F, options.clustered

    def _with_values_outside(self, b: Optional[Tensor], Z: Optional[Tensor]) -> Tensor:
        """T with more Ritz values of the complement: guard columns may be missing, or miss an eigenvalue.

        The Rayleigh quotients of Z = [R_j b_j] lie at the near end of the spectrum: R_j amplifies that end most.
        """
        A, B, iK = (M.detach() if isinstance(M, Tensor) else M for M in (self.A, self.B, self.iK))
        E, X = self.E.detach(), self.X.detach()
        if b is None or Z is None:
            residual, options = self.residual, SolveOptions(self.largest, self.tol)
            late = is_late(residual, self.scale, X.shape[-2], E.shape[-1], self.tol)
            distance = nearest_outside(A, B, E, X, self.Y, iK, self.T, residual, late, options)
        else:
            distance = rayleigh_quotient(B, Z.detach(), b.detach(), self.largest)
        found = E[..., -distance.shape[-1] :] + distance
        T = self.T.expand(tuple(found.shape[:-1]) + (self.T.shape[-1],))
        return torch.cat([T, found], -1)


def reverse_mode(
    pairs: ComputedPairs, gE: Optional[Tensor], gX: Optional[Tensor], need_A: bool, need_B: bool
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Cotangents of A and B, each Hermitian and in the layout of its matrix, or None where not needed.

    gE: (*, k) or None, gX: (*, m, k) or None, not both None.  Without gX there is no linear system to solve.
    """
    E, X = pairs.E, pairs.X
    G = None if gX is None else X.mH @ gX  # (*, k, k)
    Z = None if gX is None or pairs.all_known else pairs.resolvent(gX)
    F, clustered = pairs.factors(G, gE, gX, Z)
    N = None
    if clustered and _may_be_differentiated():
        E, F, N = _in_cluster(pairs, F)
    W: Any = None if gE is None else X * gE.unsqueeze(-2)
    if G is not None and gX is not None:
        K = (G - G.mH) / 2
        C = K * F
        if Z is None or N is not None:
            Z = pairs.resolvent(gX, E)
        if N is not None:
            C, Z = (K + N @ C - C @ N) * F, Z + pairs.resolvent(apply(pairs.B, Z @ N), E)
        W = X @ C - Z if W is None else W + X @ C - Z
    if N is not None:
        W = SecondOrderAtMost.apply(W, 0)
    gA = hermitian_outer(pairs.A, W, X) if need_A else None
    gB = None
    if need_B:
        V = W * E.unsqueeze(-2)
        if N is not None:
            V = V + W @ N
        if G is not None:
            V = V + X @ ((G + G.mH) / 4)
        gB = hermitian_outer(pairs.B, -V, X)
    return gA, gB


def _may_be_differentiated() -> bool:
    """Whether what is computed now can be differentiated later: create_graph=True, or any forward mode or
    torch.func."""
    return torch.is_grad_enabled() or in_transform()


def _in_cluster(pairs: ComputedPairs, F: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """E and F constant in clustered pairs, and N = 0 that varies in their place; see the top of the module."""
    E, X = pairs.E, pairs.X
    apart = (F.detach() == 0).to(E.dtype)  # 1 between pairs of a cluster, and on the diagonal
    clustered = (apart.sum(-1) > 1).to(E.dtype)  # (*, k)
    S = X.mH @ (apply(pairs.A, X) - apply(pairs.B, X) * E.detach().unsqueeze(-2))
    N = (S + S.mH) / 2 * (apart * clustered.unsqueeze(-1))
    E = E.detach() * clustered + E * (1 - clustered)
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)
    F = (1 - apart) / torch.where(apart > 0, torch.ones_like(difference), difference)
    return E, F, N - N.detach()


def forward_mode(pairs: ComputedPairs, dA: Optional[Tensor], dB: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Tangents of E and X for tangents of A and B, which act through their Hermitian parts; not both None."""
    E, X = pairs.E, pairs.X
    dBX = None if dB is None else hermitian_apply(dB, X)
    b = torch.zeros_like(X) if dA is None else hermitian_apply(dA, X)
    if dBX is not None:
        b = b - dBX * E.unsqueeze(-2)
    S = X.mH @ b  # (*, k, k)
    H = (S + S.mH) / 2
    Z = pairs.resolvent(b)
    F, _ = pairs.factors(H, None, b, Z, forward_mode=True)
    inside = H * F if dBX is None else H * F - X.mH @ dBX / 2
    dX = X @ inside - Z
    return _real_diagonal(S), dX


def _real_diagonal(G: Tensor) -> Tensor:
    d: Any = torch.diagonal(G, dim1=-2, dim2=-1)
    return torch.real(d) if d.is_complex() else d
