"""Rayleigh-Ritz on the basis [X P W] as algebra on small matrices (TorchScript dialect).

Small matrices only, (*, q, q) with q <= 3 n: no function here sees a tall block. Vectors that are zero (a masked
direction, a lost rank of P) are coordinates that are not valid; they are sent beyond the end of the spectrum and never
enter a result.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Ritz(NamedTuple):
    """e: (*, n) eigenvalues, wanted ones first; C: (*, n + p, q) rows are the coordinates of the new X, then P, in [X P
    W];
    G: (*, n + p, n + p) the new [X P]^H A [X P]; lost: (*, n + p) whether a vector is zero, None if none is; d: (*, p)
    spectrum of W's Gram matrix."""

    e: Tensor
    C: Tensor
    G: Tensor
    lost: Optional[Tensor]
    d: Tensor


def hermitian(M: Tensor) -> Tensor:
    return 0.5 * (M + M.mH)


def real_diagonal(M: Tensor) -> Tensor:
    d = M.diagonal(0, -2, -1)
    return d.real if d.is_complex() else d


def whiten(M: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """T with T^H M T = I on the eigenvectors of M above drop, zero columns for the others; the spectrum d; what was
    dropped.

    M: (*, p, p) Hermitian, positive semidefinite to rounding, with a diagonal of order one or zero (lower triangle
    read).
    Guarantee: finite for every finite M; T^H M T = I to eps / drop.
    """
    d, U = torch.linalg.eigh(M)
    dropped = d <= drop
    return U * d.masked_fill(dropped, float("inf")).rsqrt().unsqueeze(-2), d, dropped


def whiten_scaled(M: Tensor, drop: float, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for an M of any diagonal, scaled to a unit one: within a factor p of the best scaling (van der Sluis
    1969)."""
    s = real_diagonal(M).clamp_min(tiny).rsqrt()
    T, d, dropped = whiten(M * s.unsqueeze(-1) * s.unsqueeze(-2), drop)
    return s.unsqueeze(-1) * T, d, dropped


def extreme(G: Tensor, lost: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenpairs of G (lower triangle read; overwritten), ascending, coordinates marked in lost (*, q) last."""
    if lost is not None:
        beyond = 2.0 * G.abs().sum([-2, -1]) + 1.0  # more than the largest eigenvalue, and not zero
        G.diagonal(0, -2, -1).add_(lost * beyond.unsqueeze(-1))
    return torch.linalg.eigh(G)


def next_P(
    C_X: Tensor, C_rest: Tensor, columns: Optional[Tensor], noise: float, host: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """Q (*, q - n, p) such that C_rest Q are coordinates of the next P, what the new X has outside the old one; which
    are lost.

    A column with no more than noise of its own is zero and marked as lost; None where none is.

    C_X (*, q, n), C_rest (*, q, q - n): the eigenvectors, wanted ones and the others. (I - C_X C_X^H) [0; C_2] =
    -C_rest (top of C_rest)^H C_1, so an orthonormal basis of the last two factors' product does it, orthogonal to the
    new X as eigh's vectors are (Duersch et al. 2018, section 3.2). columns (*, p) restricts P to active columns; None
    means all.
    """
    n = C_X.size(-1)
    Z = C_rest.narrow(-2, 0, n).mH
    if columns is not None:
        C_1 = C_X.narrow(-2, 0, n)
        Z = Z @ C_1.gather(-1, columns.unsqueeze(-2).expand(list(C_1.shape[:-1]) + [columns.size(-1)]))
    if host:
        Q, R = torch.linalg.qr(Z)
        own = R.diagonal(0, -2, -1).abs()
        if own.min().item() > noise:
            return Q, None
    # Longest columns first: the direction that Q invents for a column of noise must not be taken out of a true one.
    order = torch.sort(torch.linalg.vector_norm(Z, dim=-2), dim=-1, descending=True)[1]
    Q, R = torch.linalg.qr(Z.gather(-1, order.unsqueeze(-2).expand(Z.shape)))
    lost = R.diagonal(0, -2, -1).abs() <= noise
    return Q.masked_fill(lost.unsqueeze(-2), 0.0), lost


def span_of_W(
    gram_W: Tensor, HH: Tensor, eps: float, tiny: float, host: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """V (*, q, p) with W_o = [X P W] V B-orthonormal and B-orthogonal to [X P]; its spectrum d (*, p); what was
    dropped.

    gram_W = W^H B W, HH = W^H B [X P]. By Cholesky where the host may look (one matrix on the CPU) and sees no loss,
    since that costs a third; else by eigenvalues, which drop dependent directions. d: squared sines of the angles that
    W's directions make with [X P] and with each other (Cholesky: pivots, p times the least eigenvalue at most).
    """
    H = HH.mH
    M = gram_W - HH @ H
    if host:
        L, info = torch.linalg.cholesky_ex(M)
        length, pivots = real_diagonal(gram_W), real_diagonal(L)
        d = (pivots * pivots) / (length * pivots.size(-1))
        if info.item() == 0 and d.min().item() > 1e-3:
            unit = torch.eye(M.size(-1), dtype=M.dtype, device=M.device)
            return torch.linalg.solve_triangular(L.mH, torch.cat([-H, unit], -2), upper=True, left=False), d, None
    T, d, dropped = whiten_scaled(M, eps**0.5, tiny)
    return torch.cat([-(H @ T), T], -2), d, dropped


def ritz_step(
    G: Tensor,
    lost: Optional[Tensor],
    gram_A: Tensor,
    gram_B: Tensor,
    n: int,
    sign: float,
    columns: Optional[Tensor],
    eps: float,
    tiny: float,
    host: bool,
) -> Ritz:
    """Rayleigh-Ritz on S = [X P W] from W^H A S and W^H B S, (*, p, q), when [X P] is B-orthonormal with [X P]^H A [X
    P] = G.

    W enters through W_o = (W - [X P] H) T, H = [X P]^H B W and T whitening the Gram matrix of W - [X P] H, so that [X P
    W_o] is orthonormal and the Ritz problem a standard one. Loses eps / d digits, d the smallest kept value of Ritz.d.
    host: one matrix in host memory, where looking at a number costs less than masking.
    """
    known, p, q = G.size(-1), gram_B.size(-2), gram_B.size(-1)
    HH, gram_W = gram_B.split([known, p], -1)
    V, d, dropped = span_of_W(gram_W, HH, eps, tiny, host)
    top = torch.cat([G, gram_A.narrow(-1, 0, known).mH], -1)
    rows = V.mH @ torch.cat([top, gram_A], -2)  # W_o^H A S
    full = torch.cat([top, torch.cat([rows.narrow(-1, 0, known), rows @ V], -1)], -2)
    if sign < 0:
        full = -full
    if lost is not None or dropped is not None:
        before = torch.zeros_like(G.narrow(-1, 0, 1).squeeze(-1), dtype=torch.bool) if lost is None else lost
        after = torch.zeros_like(d, dtype=torch.bool) if dropped is None else dropped
        lost = torch.cat([before, after], -1)
    e, C = extreme(full, lost)
    e, e_rest = e.split([n, q - n], -1)
    C_X, C_rest = C.split([n, q - n], -1)
    Q, gone = next_P(C_X, C_rest, columns, 8.0 * q * eps, host)
    lost_P: Optional[Tensor] = None
    if gone is not None:
        lost_P = torch.cat([torch.zeros_like(e, dtype=torch.bool), gone], -1)
    new_G = block_diagonal(e, Q.mH @ (e_rest.unsqueeze(-1) * Q))
    if sign < 0:
        e, new_G = -e, -new_G
    coordinates = torch.cat([C_X, C_rest @ Q], -1)
    top, bottom = coordinates.split([known, p], -2)
    raw = V @ bottom
    raw.narrow(-2, 0, known).add_(top)
    return Ritz(e, raw.mT, new_G, lost_P, d)


def block_diagonal(e: Tensor, inner: Tensor) -> Tensor:
    """diag(e) (+) inner."""
    n, p = e.size(-1), inner.size(-1)
    G = torch.zeros(list(e.shape[:-1]) + [n + p, n + p], dtype=inner.dtype, device=inner.device)
    G.diagonal(0, -2, -1).narrow(-1, 0, n).copy_(e)
    G.narrow(-2, n, p).narrow(-1, n, p).copy_(inner)
    return G


def ritz_fresh(gram_A: Tensor, gram_B: Tensor, n: int, sign: float, eps: float, tiny: float) -> Ritz:
    """The same from the full Gram matrices of [X P], (*, q, q): its span is kept, X the n wanted Ritz vectors, P the
    others."""
    T, d, dropped = whiten_scaled(gram_B, eps**0.5, tiny)
    e, C = extreme(hermitian(T.mH @ gram_A @ T) * sign, dropped)
    lost = torch.sort(dropped.to(torch.int8), -1)[0].to(torch.bool)
    inner = torch.diag_embed(e[..., n:].masked_fill(lost[..., n:], 0.0).to(C.dtype))
    e = e[..., :n]
    return Ritz(e * sign, (T @ C).mT, block_diagonal(e, inner) * sign, lost, d)
