"""Rayleigh-Ritz on the basis [X P W] as algebra on small matrices (TorchScript dialect).

Small matrices only, (*, q, q) with q <= 3 n: no function here sees a tall block. Vectors that are zero (a masked direction, a
lost rank of P) are coordinates that are not valid; they are sent beyond the end of the spectrum and never enter a result.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Ritz(NamedTuple):
    """e: (*, n) eigenvalues, wanted ones first; C: (*, n + p, q) rows are the coordinates of the new X, then P, in [X P W];
    G: (*, n + p, n + p) the new [X P]^H A [X P]; lost: (*, n + p) whether a vector is zero; d: (*, p) spectrum of W's Gram matrix."""

    e: Tensor
    C: Tensor
    G: Tensor
    lost: Tensor
    d: Tensor


def hermitian(M: Tensor) -> Tensor:
    return 0.5 * (M + M.mH)


def real_diagonal(M: Tensor) -> Tensor:
    d = M.diagonal(0, -2, -1)
    return d.real if d.is_complex() else d


def whiten(M: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """T with T^H M T = I on the eigenvectors of M above drop, zero columns for the others; the spectrum d; what was dropped.

    M: (*, p, p) Hermitian, positive semidefinite to rounding, with a diagonal of order one or zero (lower triangle read).
    Guarantee: finite for every finite M; T^H M T = I to eps / drop.
    """
    d, U = torch.linalg.eigh(M)
    dropped = d <= drop
    return U * d.masked_fill(dropped, float("inf")).rsqrt().unsqueeze(-2), d, dropped


def whiten_scaled(M: Tensor, drop: float, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for an M of any diagonal, scaled to a unit one: within a factor p of the best scaling (van der Sluis 1969)."""
    s = real_diagonal(M).clamp_min(tiny).rsqrt()
    T, d, dropped = whiten(M * s.unsqueeze(-1) * s.unsqueeze(-2), drop)
    return s.unsqueeze(-1) * T, d, dropped


def extreme(G: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of G (lower triangle read; overwritten), ascending, coordinates marked in lost (*, q) last."""
    beyond = 2.0 * G.abs().sum([-2, -1])
    G.diagonal(0, -2, -1).add_(lost * beyond.unsqueeze(-1))
    return torch.linalg.eigh(G)


def next_P(C: Tensor, n: int, columns: Optional[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Q (*, q - n, p) such that C[:, n:] Q are coordinates of the next P: what the new X has outside the old one.

    C: (*, q, q) all eigenvectors, the first n wanted. (I - C_X C_X^H) [0; C_2] = -C_rest (top of C_rest)^H C_1, so an
    orthonormal basis of the last two factors' product does it, orthogonal to the new X as eigh's vectors are (Duersch et al.
    2018, section 3.2). columns (*, p) restricts P to active columns; None means all. Columns with less than rounding noise
    of their own (R's diagonal) are zero and marked.
    """
    Z = C[..., :n, n:].mH
    if columns is not None:
        C1 = C[..., :n, :n]
        Z = Z @ C1.gather(-1, columns.unsqueeze(-2).expand(list(C1.shape[:-1]) + [columns.size(-1)]))
    Q, R = torch.linalg.qr(Z)
    lost = R.diagonal(0, -2, -1).abs() <= 8.0 * C.size(-1) * eps
    return Q.masked_fill(lost.unsqueeze(-2), 0.0), lost


def ritz_step(
    G: Tensor, lost: Tensor, gram_A: Tensor, gram_B: Tensor, n: int, sign: float, columns: Optional[Tensor], eps: float, tiny: float
) -> Ritz:
    """Rayleigh-Ritz on S = [X P W] from W^H A S and W^H B S, (*, p, q), when [X P] is B-orthonormal with [X P]^H A [X P] = G.

    W enters through W_o = (W - [X P] H) T, H = [X P]^H B W and T whitening the Gram matrix of W - [X P] H, so that [X P W_o]
    is orthonormal and the Ritz problem a standard one. Loses eps / d digits, d the smallest kept value of Ritz.d.
    """
    known = G.size(-1)
    HH = gram_B[..., :known]  # (*, p, known)
    H = HH.mH
    T, d, dropped = whiten_scaled(gram_B[..., known:] - HH @ H, eps**0.5, tiny)
    V = torch.cat([-(H @ T), T], -2)  # W_o = S V: (*, q, p)
    top = torch.cat([G, gram_A[..., :known].mH], -1)
    rows = V.mH @ torch.cat([top, gram_A], -2)  # W_o^H A S
    full = torch.cat([top, torch.cat([rows[..., :known], rows @ V], -1)], -2)
    if sign < 0:
        full = -full
    e, C = extreme(full, torch.cat([lost, dropped], -1))
    Q, lost_P = next_P(C, n, columns, eps)
    C_rest = C[..., n:]
    inner = Q.mH @ (e[..., n:].unsqueeze(-1) * Q)
    coordinates = torch.cat([C[..., :n], C_rest @ Q], -1)
    raw = V @ coordinates[..., known:, :]
    raw[..., :known, :] += coordinates[..., :known, :]
    e = e[..., :n]
    new_G = block_diagonal(e, inner)
    if sign < 0:
        new_G = -new_G
    return Ritz(e * sign, raw.mT, new_G, torch.cat([torch.zeros_like(e, dtype=torch.bool), lost_P], -1), d)


def block_diagonal(e: Tensor, inner: Tensor) -> Tensor:
    """diag(e) (+) inner."""
    n, p = e.size(-1), inner.size(-1)
    G = torch.zeros(list(e.shape[:-1]) + [n + p, n + p], dtype=inner.dtype, device=inner.device)
    G.diagonal(0, -2, -1)[..., :n].copy_(e)
    G[..., n:, n:] = inner
    return G


def ritz_fresh(gram_A: Tensor, gram_B: Tensor, n: int, sign: float, eps: float, tiny: float) -> Ritz:
    """The same from the full Gram matrices of [X P], (*, q, q): its span is kept, X the n wanted Ritz vectors, P the others."""
    T, d, dropped = whiten_scaled(gram_B, eps**0.5, tiny)
    e, C = extreme(hermitian(T.mH @ gram_A @ T) * sign, dropped)
    lost = torch.sort(dropped.to(torch.int8), -1)[0].to(torch.bool)
    inner = torch.diag_embed(e[..., n:].masked_fill(lost[..., n:], 0.0).to(C.dtype))
    e = e[..., :n]
    return Ritz(e * sign, (T @ C).mT, block_diagonal(e, inner) * sign, lost, d)
