"""The reverse mode of one small dense matrix in two dozen operations, where nothing is to be said and no further
derivative to be taken.

Of a matrix of a hundred rows a kernel takes as long as the dispatch of it, and a decision as long as the transfer of
its number.  Here all numbers that decide come to the host at once.
"""

import math
from typing import List, Optional

import torch
from torch import Tensor
from torch._lobpcg_impl.accuracy import FEW, rows_are_clear
from torch._lobpcg_impl.blocks import gram, norms, numbers_of
from torch._lobpcg_impl.pairs import Pairs
from torch._lobpcg_impl.transforms import in_transform, is_traced


Rows = List[List[float]]


def weights_at_once(
    pairs: Pairs, gE: Optional[Tensor], gX: Optional[Tensor]
) -> Optional[Tensor]:
    """W of module derivative, (m, k), to the bit; or None: where all pairs are not known in double precision, a second
    derivative may be asked for, or the report has something to say, or cannot tell.

    A single real matrix without B, of which a dense solve has found all pairs, in their order.  In the orthonormal
    basis [X Y] of these, norms are those of coefficients.
    """
    E, X, T = pairs.exact, pairs.X, pairs.T
    k = X.shape[-1]
    if (
        E is None
        or E.dim() > 1
        or k > FEW
        or not T.shape[-1]
        or X.is_complex()
        or pairs.pencil.generalized
        or torch.is_grad_enabled()
        or in_transform()
        or is_traced(E, gE, gX)
    ):
        return None
    rows = [pairs.residual, pairs.scale]
    if gE is not None:
        rows.append(gE)
    if gX is not None:
        c = gram(pairs.Y, gX.to(E.dtype))  # (m - k, k)
        q = c / (T.unsqueeze(-1) - E)
        rows += [norms(q), norms(c), gram(X, gX).reshape(-1)]
    numbers = numbers_of(E, T, *rows)
    start = k + T.shape[-1]
    each = [numbers[i : i + k] for i in range(start, len(numbers), k)]
    if gE is None:
        each.insert(2, [0.0] * k)
    if gX is None:
        each += [[0.0] * k] * (2 + k)
    inside = _clear_columns(pairs, numbers[:start], each)
    if inside is None:
        return None
    if gX is None:
        return None if gE is None else X * gE
    _, _, weights, _, _, *G = each
    W = X @ X.new_tensor(_inside(numbers[:k], weights, G))
    if all(inside):
        return W
    if any(inside):
        q = q.masked_fill(torch.tensor(inside, device=q.device), 0.0)
    return W - (pairs.Y @ q).to(W.dtype)


def _clear_columns(
    pairs: Pairs, spectrum: List[float], rows: Rows
) -> Optional[List[bool]]:
    """Of which columns of gX rounding alone leads out of span X, which is no direction to solve for, as in module
    complement; or None, where it is not clear that there is nothing to report.

    spectrum: E and T; rows of k numbers: residual, scale, gE, |q|, |c|, and those of G.
    """
    (k, m), own = pairs.X.mT.shape, torch.finfo(pairs.X.dtype).eps
    residual, size, gE, z, left, *G = rows
    E, nearest, farthest = spectrum[:k], spectrum[k], spectrum[-1]
    g = [math.hypot(v, *column) for v, column in zip(left, zip(*G))]
    inside = [v <= 16 * own * (1 + k) * w for v, w in zip(left, g)]
    z = [0.0 if zero else v for zero, v in zip(inside, z)]
    sign, eps = pairs.options.sign, torch.finfo(pairs.T.dtype).eps
    rest = [(nearest - value) * sign for value in E]
    if min(rest) <= m * eps * max(abs(E[0]), abs(farthest)):
        return None
    # The rule of `missed`, but for the rounding of its numbers.
    reachable = 0.99 * max(pairs.options.tol, 16 * math.sqrt(m) * eps)
    for r, s in zip(residual, size):
        if r > reachable * s:
            return None
    zero, one = [0.0] * k, [1.0] * k
    seen = [E, residual, zero, size, one, gE, g, z, left, rest]
    return inside if rows_are_clear(seen, m, own, eps) else None


def _inside(E: List[float], gE: List[float], G: Rows) -> Rows:
    """diag(gE) + Skew(G) o F, (k, k), for distinct E; rounded as module derivative does it, in graphs for one."""
    k = range(len(E))
    return [
        [
            gE[i] if i == j else (G[i][j] - G[j][i]) / 2 * (1.0 / (E[j] - E[i]))
            for j in k
        ]
        for i in k
    ]
