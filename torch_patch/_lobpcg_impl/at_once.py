"""The reverse mode of small dense matrices with nothing to say, in a few operations, where no further derivative is to
be taken.

Of a matrix of a hundred rows a kernel takes as long as the dispatch of it, and a decision as long as the transfer of
its number.  Here all numbers that decide come to the host at once; of a batch, they are few on the device.
"""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.accuracy import batch_is_clear, FEW, rows_are_clear
from torch._lobpcg_impl.blocks import gram, norms, numbers_of, pairwise
from torch._lobpcg_impl.pairs import Pairs
from torch._lobpcg_impl.transforms import in_transform, is_traced


Rows = List[List[float]]


def weights_at_once(
    pairs: Pairs, gE: Optional[Tensor], gX: Optional[Tensor]
) -> Optional[Tensor]:
    """W of module derivative, (m, k), to the bit; or None: where all pairs are not known in double precision, a second
    derivative may be asked for, or the report has something to say, or cannot tell.

    Real matrices without B, of which a dense solve has found all pairs, in their order.  In the orthonormal basis
    [X Y] of these, norms are those of coefficients.
    """
    E, X, T = pairs.exact, pairs.X, pairs.T
    if (
        E is None
        or not T.shape[-1]
        or not E.numel()
        or X.is_complex()
        or pairs.pencil.generalized
        or torch.is_grad_enabled()
        or in_transform()
        or is_traced(E, gE, gX)
        or (gX is not None and gX.dim() > X.dim())
        or (gE is not None and gE.dim() > E.dim())
    ):
        return None
    if gX is not None:
        c = gram(pairs.Y, gX.to(E.dtype))  # (*, m - k, k)
        q = c / (T.unsqueeze(-1) - E.unsqueeze(-2))
        sizes = (norms(q), norms(c), gram(X, gX))
    else:
        sizes = None
    if E.dim() == 1:
        if X.shape[-1] > FEW:
            return None
        found = _of_one(pairs, E, gE, sizes)
    else:
        found = _of_batch(pairs, E, gE, sizes)
    if found is None:
        return None
    if sizes is None:
        return None if gE is None else X * gE.unsqueeze(-2)
    C, inside = found
    if inside is not None:
        q = q.masked_fill(inside, 0.0)
    return X @ C - (pairs.Y @ q).to(X.dtype)


# Norms of the columns of q and c, (*, k) each, and G.
Sizes = Optional[Tuple[Tensor, Tensor, Tensor]]
# diag(gE) + Skew(G) o F, (*, k, k), and which columns of gX, (*, 1, k), lie inside span X; None where none does.
Inside = Optional[Tuple[Tensor, Optional[Tensor]]]


def _of_one(pairs: Pairs, E: Tensor, gE: Optional[Tensor], sizes: Sizes) -> Inside:
    """What weights_at_once needs of one matrix; or None, where it is not clear that there is nothing to report."""
    k, T, X = E.shape[-1], pairs.T, pairs.X
    rows = [pairs.residual, pairs.scale]
    if gE is not None:
        rows.append(gE)
    if sizes is not None:
        rows += [*sizes[:2], sizes[2].reshape(-1)]
    numbers = numbers_of(E, T, *rows)
    start = k + T.shape[-1]
    each = [numbers[i : i + k] for i in range(start, len(numbers), k)]
    if gE is None:
        each.insert(2, [0.0] * k)
    if sizes is None:
        each += [[0.0] * k] * (2 + k)
    inside = _clear_columns(pairs, numbers[:start], each)
    if inside is None:
        return None
    _, _, weights, _, _, *G = each
    C = X.new_tensor(_inside(numbers[:k], weights, G))
    return C, torch.tensor(inside, device=X.device) if any(inside) else None


def _of_batch(pairs: Pairs, E: Tensor, gE: Optional[Tensor], sizes: Sizes) -> Inside:
    """The same of a batch."""
    k, m, T = E.shape[-1], pairs.pencil.m, pairs.T
    own, eps = (torch.finfo(V.dtype).eps for V in (pairs.X, E))
    residual, size = (V[..., :k].to(E.dtype) for V in (pairs.residual, pairs.scale))
    zero, one = torch.zeros_like(E), torch.ones_like(E)
    weights = zero if gE is None else gE.to(E.dtype)
    g = z = left = zero
    inside = zero > 0
    if sizes is not None:
        z, left, G = sizes
        G = G.to(E.dtype)
        g = torch.hypot(left, norms(G))
        inside = left <= 16 * own * (1 + k) * g
        z = z.masked_fill(inside, 0.0)
    rest = (T[..., :1] - E) * pairs.options.sign
    wide = torch.maximum(E[..., :1].abs(), T[..., -1:].abs())
    least = 0.99 * max(pairs.options.tol, 16 * math.sqrt(m) * eps)
    if not bool(((rest > m * eps * wide) & (residual <= least * size)).all()):
        return None
    seen = [E, residual, zero, size, one, weights, g, z, left, rest]
    if not batch_is_clear(seen, m, own, eps):
        return None
    if sizes is None:
        return E, None
    skew = (G - G.mT) / 2
    F = E.unsqueeze(-2) - E.unsqueeze(-1)
    # The rule of module gauge: across a narrow gap no factor where the loss does not tell the two apart.
    # Twice that of module gauge, as |x| = 1.
    amplitude = g.unsqueeze(-1) + g.unsqueeze(-2)
    close = F.abs() <= own ** (1 / 3) * pairwise(size)
    close = close & (skew.abs() <= 4 * math.sqrt(m) * own * amplitude)
    F = F.masked_fill_(close, math.inf).reciprocal_()
    C = (skew * F).to(pairs.X.dtype)
    if gE is not None:
        C = C + torch.diag_embed(gE)
    return C, inside.unsqueeze(-2) if bool(inside.any()) else None


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
