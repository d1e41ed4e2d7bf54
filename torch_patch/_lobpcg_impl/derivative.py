"""Forward- and reverse-mode derivatives of k extreme eigenpairs, tensors in, tensors out.

A X = B X diag(E), X^H B X = I.  Herm and Skew are the parts of a square matrix.  With G = X^H gX, the reduced
resolvents R_j of module resolvent, and F_ij = 1 / (E_j - E_i), but 0 on the diagonal and inside a cluster
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

import dataclasses
import math
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import gram, norms
from torch._lobpcg_impl.complement import (
    in_double,
    is_small_and_dense,
    solve_on_complement,
)
from torch._lobpcg_impl.gauge import (
    generic_basis,
    pair_factors,
    SecondOrderAtMost,
    Seen,
)
from torch._lobpcg_impl.operand import Pencil
from torch._lobpcg_impl.pairs import in_masses, longer, missed, Pairs, pencil_size
from torch._lobpcg_impl.report import OneWarning
from torch._lobpcg_impl.resolvent import (
    distance_of_quotient,
    nearest_outside,
    reduced_resolvent,
)
from torch._lobpcg_impl.solver import found_in_double
from torch._lobpcg_impl.transforms import in_transform


def corrected(pairs: Pairs) -> Pairs:
    """Pairs fit for a derivative, where one may follow: a generic basis of vectors that rounding leaves undetermined (see
    `generic_basis`), residuals in the scale of module pairs, and, as for every small dense pencil, a Newton step.

    Derivatives take the pairs as exact, so their error is |r| / gap.  The step x_j - R_j r_j, then Rayleigh-Ritz, makes
    that error quadratic in |r|: at m = 200 and tol = 1e-8 it fell from 2e-7 to 1e-13.  Single precision is corrected in
    double, which leaves the rounding of the result: at m = 100, gap 1e-3, the gradient's error fell from 2e-4 to 1e-6.
    Pairs that have not converged stay as they are, to be reported as such.
    """
    wanted = pairs.options.differentiated
    # Without B a dense solve is as good as the step.
    if not (wanted or pairs.pencil.generalized) or not pairs.X.numel():
        return pairs
    k, n = pairs.E.shape[-1], pairs.residual.shape[-1]
    late = missed(pairs)
    E, X, residual = _newton_step(pairs, late)
    residual = torch.cat([residual, pairs.residual[..., k:]], -1)
    pairs = dataclasses.replace(pairs, E=E, X=X, residual=residual)
    if not wanted:
        return pairs
    size = pencil_size(pairs)
    X = generic_basis(E, X, size[..., :k].to(E.dtype), torch.finfo(E.dtype).eps)
    if pairs.pencil.generalized:
        V = torch.cat([X, pairs.Y], -1)[..., :n]
        values = torch.cat([E, pairs.T], -1)[..., :n]
        pencil = pairs.pencil
        pencil = pencil if pencil.dtype == V.dtype else pencil.in_double()
        pairs = dataclasses.replace(pairs, X=X)
        residual = in_masses(pairs, _residuals(pencil, values, V))
    scale = torch.where(late, -size[..., :k], size[..., :k])
    scale = torch.cat([scale, size[..., k:]], -1)
    return dataclasses.replace(pairs, X=X, residual=residual, scale=scale)


def _newton_step(pairs: Pairs, late: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """E, X, residual after the step, in the precision of the step, or as they were where it does not help."""
    pencil, E, X = pairs.pencil, pairs.E, pairs.X
    m, k = X.shape[-2:]
    residual, scale = pairs.residual[..., :k], pairs.scale[..., :k]
    eps = torch.finfo(E.dtype).eps
    if k == m or not is_small_and_dense(pencil) or bool(late.any()):
        return E, X, residual
    # A dense forward in double is at rounding level already: nothing to win.
    if eps < 1e-10 and pairs.all_known and not pencil.generalized:
        return E, X, residual
    if eps < 1e-10 and bool((residual <= math.sqrt(m) * eps * scale).all()):
        return E, X, residual
    # One step alone: a second one would settle on whatever eigenvalue is near, the next one beyond k for one.
    pencil, E, X = pencil.in_double(), in_double(E), in_double(X)
    r, largest = _residuals(pencil, E, X), pairs.options.largest
    before = norms(r)
    # A relative error of the step is as good as the square of what it corrects.
    Z = X - solve_on_complement(pencil, E, X, r, largest, 1e-4, use="step")
    L, info = torch.linalg.cholesky_ex(gram(Z, pencil.B.apply(Z)))
    Z = torch.linalg.solve_triangular(L, Z.mH, upper=False).mH
    H = gram(Z, pencil.A.apply(Z))
    ritz, V = torch.linalg.eigh((H + H.mH) / 2)
    if largest:
        ritz, V = ritz.flip(-1), V.flip(-1)
    Z = Z @ V
    after = norms(_residuals(pencil, ritz, Z))
    better = ((after.amax(-1) < before.amax(-1)) & (info == 0)).unsqueeze(-1)
    return (
        torch.where(better, ritz, E),
        torch.where(better.unsqueeze(-1), Z, X),
        torch.where(better, after, before),
    )


def _residuals(pencil: Pencil, E: Tensor, X: Tensor) -> Tensor:
    return pencil.A.apply(X) - pencil.B.apply(X) * E.unsqueeze(-2)


def _factors(
    pairs: Pairs,
    G: Optional[Tensor],
    gE: Optional[Tensor],
    b: Optional[Tensor],
    Z: Optional[Tensor],
    forward_mode: bool = False,
) -> Tuple[Tensor, bool]:
    """F, and whether some of the pairs are a cluster to it.  Z = [R_j b_j]; without b, in reverse mode, gX is 0."""
    known = pairs.constant()
    T, left = known.T, None
    if b is not None and Z is not None:
        b, Z = b.detach(), Z.detach()
        left = norms(b - known.pencil.B.product(known.X) @ (known.X.mH @ b))
    residual = known.residual[..., : known.E.shape[-1]]
    if not pairs.all_known:
        T = _with_values_outside(known, Z)
        if Z is not None and pairs.pencil.generalized:
            residual = residual * longer(known, Z)
    E, eps = pairs.E, torch.finfo(known.E.dtype).eps
    if eps > 1e-10 and _was_in_double(known):
        values, nearest = _values_in_double(known)
        first = nearest.shape[-1]
        nearest = nearest.expand(tuple(T.shape[:-1]) + (first,))
        E, T = values + (E - known.E), torch.cat([nearest, T[..., first:]], -1)
        eps = eps * eps
    seen = Seen(
        E, known.X, T, residual, known.late, known.size, G, gE, b, Z, left
    )
    F, clustered = pair_factors(seen, pairs.options, eps, forward_mode)
    return F.to(known.E.dtype), clustered


def _was_in_double(pairs: Pairs) -> bool:
    """Whether the pairs have gone through double precision, in `corrected` or in a dense solve."""
    if is_small_and_dense(pairs.pencil):
        return True
    return pairs.all_known and pairs.pencil.is_known() and found_in_double(pairs.pencil)


def _values_in_double(pairs: Pairs) -> Tuple[Tensor, Tensor]:
    """E and the first of T before they were rounded to single precision, but for the square of that rounding: gaps
    below eps |E| are told then.  They are Rayleigh quotients of the rounded vectors."""
    k = pairs.E.shape[-1]
    V = in_double(torch.cat([pairs.X, pairs.Y[..., :4]], -1))
    pencil = pairs.pencil.in_double()
    BV = pencil.B.product(V)
    values = (V.conj() * pencil.A.product(V)).sum(-2) / (V.conj() * BV).sum(-2)
    values = torch.real(values) if values.is_complex() else values
    return values[..., :k], values[..., k:]


def _with_values_outside(pairs: Pairs, Z: Optional[Tensor]) -> Tensor:
    """T with more Ritz values of the complement: guard columns may be missing, or miss an eigenvalue.

    The Rayleigh quotients of Z = [R_j b_j] lie at the near end of the spectrum: R_j amplifies that end most.
    """
    if Z is None:
        distance = nearest_outside(pairs, pairs.late > 0)
    else:
        distance = distance_of_quotient(
            pairs.pencil, pairs.E, Z, pairs.options.largest
        )
    found = pairs.E[..., -distance.shape[-1] :] + distance
    T = pairs.T.expand(tuple(found.shape[:-1]) + (pairs.T.shape[-1],))
    return torch.cat([T, found], -1)


Cotangents = Tuple[Optional[Tensor], ...]


def reverse_mode(
    pairs: Pairs, gE: Optional[Tensor], gX: Optional[Tensor], need_A: bool, need_B: bool
) -> Tuple[Cotangents, Cotangents]:
    """Cotangents of the parameters of A and of those of B, None where not needed.

    gE: (*, k) or None, gX: (*, m, k) or None, not both None.  Without gX there is no linear system to solve.
    """
    A, B, E, X = pairs.pencil.A, pairs.pencil.B, pairs.E, pairs.X
    G = None if gX is None else X.mH @ gX  # (*, k, k)
    with OneWarning():
        Z = None if gX is None else reduced_resolvent(pairs, gX)
        F, clustered = _factors(pairs, G, gE, gX, Z)
    N = None
    if clustered and _may_be_differentiated():
        E, F, N = _in_cluster(pairs, F)
    W: Any = None if gE is None else X * gE.unsqueeze(-2)
    if G is not None and gX is not None:
        K = (G - G.mH) / 2
        C = K * F
        if N is not None:
            C = (K + N @ C - C @ N) * F
            Z = reduced_resolvent(pairs, gX, E)
            Z = Z + reduced_resolvent(pairs, B.product(Z @ N), E)
        W = X @ C - Z if W is None else W + X @ C - Z
    if N is not None:
        W = SecondOrderAtMost.apply(W, F.detach(), 0)
    gA: Cotangents = A.pullback((W, X)) if need_A else (None,) * len(A.parameters)
    if not need_B:
        return gA, (None,) * len(B.parameters)
    V = W * E.unsqueeze(-2)
    if N is not None:
        V = V + W @ N
    if G is not None:
        V = V + X @ ((G + G.mH) / 4)
    return gA, B.pullback((-V, X))


def _may_be_differentiated() -> bool:
    """Whether what is computed now can be differentiated later: create_graph=True, or any forward mode or
    torch.func."""
    return torch.is_grad_enabled() or in_transform()


def _in_cluster(pairs: Pairs, F: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """E and F constant in clustered pairs, and N = 0 that varies in their place; see the top of the module."""
    E, X = pairs.E, pairs.X
    apart = (F.detach() == 0).to(
        E.dtype
    )  # 1 between pairs of a cluster, and on the diagonal
    clustered = (apart.sum(-1) > 1).to(E.dtype)  # (*, k)
    S = X.mH @ (
        pairs.pencil.A.product(X) - pairs.pencil.B.product(X) * E.detach().unsqueeze(-2)
    )
    N = (S + S.mH) / 2 * (apart * clustered.unsqueeze(-1))
    E = E.detach() * clustered + E * (1 - clustered)
    difference = E.unsqueeze(-2) - E.unsqueeze(-1)
    F = (1 - apart) / torch.where(apart > 0, torch.ones_like(difference), difference)
    return E, F, N - N.detach()


def forward_mode(
    pairs: Pairs, dA: Sequence[Optional[Tensor]], dB: Sequence[Optional[Tensor]]
) -> Tuple[Tensor, Tensor]:
    """Tangents of E and X for tangents of the parameters of A and B, not all None."""
    A, B, E, X = pairs.pencil.A, pairs.pencil.B, pairs.E, pairs.X
    moves_B = any(tangent is not None for tangent in dB)
    b = A.tangent(dA, X)
    dBX = B.tangent(dB, X) if moves_B else None
    if dBX is not None:
        b = b - dBX * E.unsqueeze(-2)
    S = X.mH @ b  # (*, k, k)
    H = (S + S.mH) / 2
    with OneWarning():
        Z = reduced_resolvent(pairs, b)
        F, _ = _factors(pairs, H, None, b, Z, forward_mode=True)
    inside = H * F if dBX is None else H * F - X.mH @ dBX / 2
    dX = X @ inside - Z
    return _real_diagonal(S), dX


def _real_diagonal(G: Tensor) -> Tensor:
    d: Any = torch.diagonal(G, dim1=-2, dim2=-1)
    return torch.real(d) if d.is_complex() else d
