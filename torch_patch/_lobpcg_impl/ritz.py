"""Rayleigh-Ritz on the basis [X P W] as algebra on small matrices.

Small matrices only, (*, q, q) with q <= 3 n, in double precision: no function here sees a tall block; eps is the unit
rounding of the blocks that the Gram matrices come from. Vectors that are zero (a masked
direction, a lost rank of P) are coordinates that are not valid; they are sent beyond the end of the spectrum and never
enter a result.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import take_each


# A direction whose squared sine against [X P] is below this many roundings is noise: two of its digits at most are its
# own.
_NOISE = 100.0


class Ritz(NamedTuple):
    """e: (*, n) eigenvalues, wanted ones first; C: (*, q, n + p) columns are the coordinates of the new X, then P, in
    [X P W]; G: (*, n + p, n + p) the new [X P]^H A [X P]; lost: (*, n + p) whether a vector is zero, None if none is.

    d: (*, p) lower bounds of the squared sines of the angles that W's directions make with [X P] and with each other,
    zero for those left out; or empty and least the smallest of them, where the host has looked at it.
    """

    e: Tensor
    C: Tensor
    G: Tensor
    lost: Optional[Tensor]
    d: Tensor
    least: float


def hermitian(M: Tensor) -> Tensor:
    return 0.5 * (M + M.mH)


def real_diagonal(M: Tensor) -> Tensor:
    d = M.diagonal(dim1=-2, dim2=-1)
    return d.real if d.is_complex() else d


def whiten(M: Tensor, drop: float) -> Tuple[Tensor, Tensor, Tensor]:
    """T with T^H M T = I on the eigenvectors of M above drop, zero columns for the others; the spectrum d; what was
    dropped.

    M: (*, p, p) Hermitian, positive semidefinite to rounding, with a diagonal of order one or zero (lower triangle
    read).
    Guarantee: finite for every finite M; T^H M T = I to eps / drop.
    """
    d, U = torch.linalg.eigh(M)
    dropped = d <= drop
    return U * d.masked_fill(dropped, float("inf")).rsqrt().unsqueeze(-2), d, dropped


def whiten_scaled(M: Tensor, drop: float, tiny: float) -> Tuple[Tensor, Tensor, Tensor]:
    """The same for an M of any diagonal, scaled to a unit one: within a factor p of the best scaling (van der Sluis
    1969)."""
    s = real_diagonal(M).clamp_min(tiny).rsqrt()
    T, d, dropped = whiten(M * s.unsqueeze(-1) * s.unsqueeze(-2), drop)
    return s.unsqueeze(-1) * T, d, dropped


def extreme(G: Tensor, lost: Optional[Tensor], tiny: float) -> Tuple[Tensor, Tensor]:
    """Eigenpairs of G (lower triangle read; overwritten), ascending, coordinates marked in lost (*, q) last."""
    if lost is not None:
        beyond = 2.0 * G.abs().sum((-2, -1)).clamp_min(
            tiny
        )  # more than the largest eigenvalue, and not zero
        G.diagonal(dim1=-2, dim2=-1).add_(lost * beyond.unsqueeze(-1))
    return torch.linalg.eigh(G)


def none_lost(G: Tensor, count: int) -> Tensor:
    return torch.zeros(G.shape[:-2] + (count,), dtype=torch.bool, device=G.device)


def next_P(
    C_X: Tensor, C_rest: Tensor, columns: Optional[Tensor], noise: float, host: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """Q (*, q - n, p) such that C_rest Q are coordinates of the next P, what the new X has outside the old one; which
    are lost.

    A column with no more than noise of its own is zero and marked as lost; None where none is.

    C_X (*, q, n), C_rest (*, q, q - n): the eigenvectors, wanted ones and the others. (I - C_X C_X^H) [0; C_2] =
    -C_rest (top of C_rest)^H C_1, so an orthonormal basis of the last two factors' product does it, orthogonal to the
    new X as eigh's vectors are (Duersch et al. 2018, section 3.2). columns (*, p) restricts P to active columns; None
    means all.
    """
    n = C_X.shape[-1]
    Z = C_rest.narrow(-2, 0, n).mH
    if columns is not None:
        Z = Z @ take_each(C_X.narrow(-2, 0, n), columns)
    if host:
        Q, R = torch.linalg.qr(Z)
        own: List[float] = R.diagonal(dim1=-2, dim2=-1).abs().tolist()
        if min(own) > noise:
            return Q, None
    # Longest columns first: the direction that Q invents for a column of noise must not be taken out of a true one.
    order = torch.sort(torch.linalg.vector_norm(Z, dim=-2), dim=-1, descending=True)[1]
    Q, R = torch.linalg.qr(take_each(Z, order))
    lost = R.diagonal(dim1=-2, dim2=-1).abs() <= noise
    return Q.masked_fill(lost.unsqueeze(-2), 0.0), lost


class Coordinates(NamedTuple):
    """T: (*, q, q) with S T = [X P W_o] orthonormal, W_o = 0 where dropped (*, p) says so; d and least as in Ritz."""

    T: Tensor
    dropped: Optional[Tensor]
    d: Tensor
    least: float


def orthonormal_coordinates(
    gram_B: Tensor, unit: Tensor, eps: float, tiny: float, host: bool
) -> Coordinates:
    """Coordinates that make S = [X P W] B-orthonormal, from gram_B = W^H B S (*, p, q); [X P] is so already.

    By Cholesky where the host may look (a single problem) and sees no loss, since that costs a third; else by
    eigenvalues, which drop dependent directions.
    """
    p, q = gram_B.shape[-2], gram_B.shape[-1]
    if host:
        L, info = torch.linalg.cholesky_ex(
            torch.cat([unit.narrow(0, 0, q - p), gram_B])
        )
        # Pivots are at most p times the least eigenvalue.
        whole = torch.cat(
            [real_diagonal(L), real_diagonal(gram_B.narrow(-1, q - p, p))]
        )
        numbers: List[float] = whole.tolist()
        least = 1.0
        for i in range(p):
            pivot = numbers[q - p + i]
            least = min(least, pivot * pivot / (p * max(numbers[q + i], tiny)))
        if info.item() == 0 and least > 1e-3:
            none = torch.empty(0, dtype=whole.dtype, device=whole.device)
            return Coordinates(
                torch.linalg.solve_triangular(L.mH, unit, upper=True), None, none, least
            )
    HH, gram_W = gram_B.split((q - p, p), -1)
    H = HH.mH
    rest = gram_W - HH @ H
    # What is left of a column beside [X P] has the rounding errors of the whole column.
    left = real_diagonal(rest) / real_diagonal(gram_W).clamp_min(tiny)
    noise = left <= _NOISE * eps
    rest = rest.masked_fill(noise.unsqueeze(-1) | noise.unsqueeze(-2), 0.0)
    whitened, d, dropped = whiten_scaled(rest, eps**0.5, tiny)
    left = left.masked_fill(noise, 1.0).amin(-1, keepdim=True).clamp_max(1.0)
    d = (d * left).masked_fill(dropped, 0.0)
    V = torch.cat([-(H @ whitened), whitened], -2)
    unit = unit.narrow(-1, 0, q - p).expand(gram_B.shape[:-2] + (q, q - p))
    return Coordinates(torch.cat([unit, V], -1), dropped, d, 1.0)


def ritz_step(
    G: Tensor,
    lost: Optional[Tensor],
    gram_A: Tensor,
    gram_B: Tensor,
    unit: Tensor,
    n: int,
    sign: float,
    columns: Optional[Tensor],
    eps: float,
    tiny: float,
    host: bool,
) -> Ritz:
    """Rayleigh-Ritz on S = [X P W] from W^H A S and W^H B S, (*, p, q), when [X P] is B-orthonormal with [X P]^H A [X
    P] = G.

    In the orthonormal basis S T the Ritz problem is a standard one. Loses eps / d digits, d the smallest kept value of
    Ritz.d. unit: the identity of order q. host: one matrix in host memory, where looking at a number costs less than
    masking.
    """
    known, p, q = G.shape[-1], gram_B.shape[-2], gram_B.shape[-1]
    T, dropped, d, least = orthonormal_coordinates(gram_B, unit, eps, tiny, host)
    full = torch.cat([torch.cat([G, gram_A.narrow(-1, 0, known).mH], -1), gram_A], -2)
    full = T.mH @ full @ T
    if sign < 0:
        full = -full
    if lost is not None or dropped is not None:
        before = none_lost(G, known) if lost is None else lost
        lost = torch.cat([before, none_lost(G, p) if dropped is None else dropped], -1)
    e, C = extreme(full, lost, tiny)
    C_X, C_rest = C.split((n, q - n), -1)
    Q, gone = next_P(C_X, C_rest, columns, 8.0 * q * eps, host)
    lost_P: Optional[Tensor] = None
    if gone is not None:
        lost_P = torch.cat([none_lost(G, n), gone], -1)
    coordinates = torch.cat([C_X, C_rest @ Q], -1)
    new_G = coordinates.mH @ (full @ coordinates)
    e = e.narrow(-1, 0, n)
    if sign < 0:
        e, new_G = -e, -new_G
    return Ritz(e, T @ coordinates, new_G, lost_P, d, least)


def ritz_fresh(
    gram_A: Tensor, gram_B: Tensor, n: int, sign: float, eps: float, tiny: float
) -> Ritz:
    """The same from the full Gram matrices of [X P], (*, q, q): its span is kept, X the n wanted Ritz vectors, P the
    others."""
    T, d, dropped = whiten_scaled(gram_B, eps**0.5, tiny)
    e, C = extreme(hermitian(T.mH @ gram_A @ T) * sign, dropped, tiny)
    lost = torch.sort(dropped.to(torch.int8), -1)[0].to(torch.bool)
    kept = e.masked_fill(lost, 0.0)
    G = torch.diag_embed(torch.cat([e[..., :n], kept[..., n:]], -1).to(C.dtype))
    return Ritz(e[..., :n] * sign, T @ C, G * sign, lost, d, 1.0)
