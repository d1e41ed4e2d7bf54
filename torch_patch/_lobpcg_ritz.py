"""Rayleigh-Ritz on the basis [X P W] as algebra on small matrices (TorchScript dialect).

Small matrices only, (*, q, q) with q <= 3 n: no function here sees a tall block. Vectors that are zero (a masked direction, a
lost rank of P) are coordinates that are not valid; they are sent beyond the end of the spectrum and never enter a result.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Ritz(NamedTuple):
    """e: (*, n) eigenvalues, ascending; C: (*, n + p, q) rows are the coordinates of the new X, then P, in [X P W];
    G: (*, n + p, n + p) the new [X P]^H A [X P]; lost: (*, n + p) 1 where a vector is zero; d: (*, p) spectrum of W's Gram matrix."""

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


def whiten(M: Tensor, drop: float, tiny: float) -> tuple[Tensor, Tensor]:
    """T with T^H M T = I on the eigenvectors of the diagonally scaled M above drop, zero columns for the others; and that spectrum.

    M: (*, p, p) Hermitian, positive semidefinite to rounding. Guarantee: finite for every finite M; T^H M T = I to eps / drop.
    Scaling to a unit diagonal brings the condition within a factor p of the best diagonal scaling (van der Sluis 1969).
    """
    s = real_diagonal(M).clamp_min(tiny).rsqrt()
    d, U = torch.linalg.eigh(M * s.unsqueeze(-1) * s.unsqueeze(-2))
    root = torch.where(d > drop, d, float("inf")).rsqrt()
    return s.unsqueeze(-1) * U * root.unsqueeze(-2), d


def extreme(G: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of G (lower triangle read), ascending, coordinates marked in lost (*, q) last."""
    beyond = 2.0 * G.abs().sum([-2, -1]).unsqueeze(-1) + 1.0
    return torch.linalg.eigh(G + torch.diag_embed((lost * beyond).to(G.dtype)))


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
    lost = (R.diagonal(0, -2, -1).abs() <= 8.0 * C.size(-1) * eps).to(R.abs().dtype)
    return Q * (1.0 - lost).unsqueeze(-2), lost


def ritz_step(
    G: Tensor, lost: Tensor, gram_A: Tensor, gram_B: Tensor, n: int, sign: float, columns: Optional[Tensor], eps: float, tiny: float
) -> Ritz:
    """Rayleigh-Ritz on S = [X P W] from W^H A S and W^H B S, (*, p, q), when [X P] is B-orthonormal with [X P]^H A [X P] = G.

    W enters through W_o = (W - [X P] H) T, H = [X P]^H B W and T whitening the Gram matrix of W - [X P] H, so that [X P W_o]
    is orthonormal and the Ritz problem a standard one. Loses eps / d digits, d the smallest kept value of Ritz.d.
    """
    known = G.size(-1)
    drop = eps**0.5
    H = gram_B[..., :known].mH  # (*, known, p)
    K = gram_A[..., :known].mH
    T, d = whiten(gram_B[..., known:] - H.mH @ H, drop, tiny)
    GH = G @ H
    off = T.mH @ (K - GH).mH
    HK = H.mH @ K
    corner = T.mH @ (gram_A[..., known:] - HK - HK.mH + H.mH @ GH) @ T
    upper = torch.cat([G, off.mH], -1)
    full = torch.cat([upper, torch.cat([off, corner], -1)], -2)
    e, C = extreme(full * sign, torch.cat([lost, (d <= drop).to(lost.dtype)], -1))
    C_X, C_rest, e_rest = C[..., :n], C[..., n:], e[..., n:]
    Q, lost_P = next_P(C, n, columns, eps)
    inner = Q.mH @ (e_rest.unsqueeze(-1) * Q)
    coordinates = torch.cat([C_X, C_rest @ Q], -1)
    TC = T @ coordinates[..., known:, :]
    raw = torch.cat([coordinates[..., :known, :] - H @ TC, TC], -2).mT
    e = e[..., :n]
    return Ritz(e, raw, block_diagonal(e, inner) * sign, torch.cat([torch.zeros_like(e), lost_P], -1), d)


def block_diagonal(e: Tensor, inner: Tensor) -> Tensor:
    """diag(e) (+) inner."""
    n, p = e.size(-1), inner.size(-1)
    G = torch.zeros(list(e.shape[:-1]) + [n + p, n + p], dtype=inner.dtype, device=inner.device)
    G.diagonal(0, -2, -1)[..., :n].copy_(e)
    G[..., n:, n:] = inner
    return G


def ritz_fresh(gram_A: Tensor, gram_B: Tensor, n: int, sign: float, eps: float, tiny: float) -> Ritz:
    """The same from the full Gram matrices of [X P], (*, q, q): its span is kept, X the n wanted Ritz vectors, P the others."""
    drop = eps**0.5
    T, d = whiten(gram_B, drop, tiny)
    e, C = extreme(hermitian(T.mH @ gram_A @ T) * sign, (d <= drop).to(d.dtype))
    lost = torch.sort((d <= drop).to(d.dtype), -1)[0]
    inner = torch.diag_embed((e[..., n:] * (1.0 - lost[..., n:])).to(C.dtype))
    e = e[..., :n]
    return Ritz(e, (T @ C).mT, block_diagonal(e, inner) * sign, lost, d)
