"""How accurate a derivative of eigenpairs is: residuals over gaps, in the share that this loss has in them.

The formulas take E and X as exact.  A residual r_j moves x_j by |r_j| / d_j, d_j the distance of E_j to the eigenvalues
that were not wanted, and with it the terms of W that pair j enters: gE_j x_j, and Z_j by |R_j| |gX_j|, where
|R_j| = |Z_j| / |(I - B X X^H) gX_j|.  Divided by the largest term that is a bound on the relative error.  It is 3 to 20
times the error on ordinary problems, so in single precision, where little room is left, a warning is given where a
third of it exceeds 1e-2; in double precision where all of it exceeds 1e-3.
"""

import math
from typing import Any, List

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.blocks import is_single, norms, pairwise
from torch._lobpcg_impl.complement import report_cut_cluster, TOLD_APART
from torch._lobpcg_impl.report import doubt, first, found, left_out, members


# The relative error of a gradient from which on a second word is said on pairs that have not converged.
LATE = 1e-3
# Pairs up to which a loop over them on the host takes less time than the kernels that it spares.
FEW = 16


def check_accuracy(
    seen: Any, gaps: Any, setting: Any, skew: Tensor, lost: Tensor, mask: Tensor
) -> None:
    """Report the pair, or the two, with the largest error, if it is large.  seen, gaps, setting: of module gauge.

    skew: (+, *, k, k), what is divided by the gaps; lost: what rounding and residuals change in that; mask: where a
    factor is used.
    """
    width = torch.where(gaps.gap > 0, gaps.gap, torch.ones_like(gaps.gap))
    share, total = _shares(seen, gaps, skew / width, setting)
    left_out(lambda: (lost / width).masked_fill(mask, 0.0))
    relative = lost / width * pairwise(seen.x) / total.unsqueeze(-1)
    # More than half of the digits: 4e-7 in double precision, 1e-2 in single.  A loss of vectors alone, or of values
    # alone, has no terms in gE and G that could cancel: a tenth of what is worth a word.
    most = 30 * math.sqrt(torch.finfo(seen.x.dtype).eps)
    if seen.gE is None or seen.g is None:
        most = max(most, 1e-4)
    bad = relative > most
    _doubt_estimates(seen, gaps, setting, relative, share)
    # Of late pairs this is no estimate below what is told of them at all.
    inside = torch.where(bad, relative.clamp(min=LATE), relative)
    _check_outside(seen, gaps, setting, share, inside)
    if bool(bad.any()):
        worst = torch.where(bad, relative, torch.zeros_like(relative))
        i, j = first(worst == worst.max(), 2)
        gap, size = (float(T[..., i, j].min()) for T in (gaps.gap, pairwise(seen.size)))
        where = members(bad[..., i, j], seen.E.dim() - 1)
        # Vectors that were turned are not those which others are found beside.
        used = gaps.gap > 2 * pairwise(gaps.rounding)
        used = bool(used.expand_as(bad)[..., i, j].all())
        least = 0.0 if is_single(torch.finfo(seen.x.dtype).eps) else most
        found(
            f"lobpcg: the loss distinguishes eigenpairs {i} and {j}, whose gap {gap:.1e} beside a pencil of size "
            f"{size:.1e} is so small that the gradient has a relative error of about {{estimate}}{where}. "
            "Tighten tol, or use a loss that treats the two alike.",
            float(worst.max()),
            _at_most_one(worst),
            least if used else None,
        )


def _doubt_estimates(
    seen: Any, gaps: Any, setting: Any, inside: Tensor, share: Tensor
) -> None:
    """Doubt estimates within a hundredth of what is worth a word, and gaps of which rounding leaves four digits."""
    outside = seen.moved * share
    close = gaps.rounding / torch.where(gaps.rest > 0, gaps.rest, gaps.rounding)
    most = 1e-4 if is_single(torch.finfo(seen.x.dtype).eps) else 1e-5
    near = torch.maximum(outside, (close * share).expand_as(outside))
    if not bool((inside < most).all() & (near < most).all()):
        doubt()


def is_clear(seen: Any, setting: Any) -> bool:
    """Whether one problem has nothing to report, by bounds on what is computed for the report, ten times below it.

    Eigenvalues far apart and small residuals are the rule, and a small problem spends its time in kernels: this costs
    a dozen, and one transfer.  False, where it cannot tell.
    """
    E, T, G, g, z = seen.E, seen.T, seen.G, seen.g, seen.z
    k = E.shape[-1]
    if E.dim() > 1 or k > FEW or (G is not None and G.is_complex()):
        return False
    if (g is None) != (z is None) or (g is not None and g.dim() > 1):
        return False
    if (seen.gE is not None and seen.gE.dim() > 1) or T.dim() > 1 or not T.shape[-1]:
        return False
    options = setting.options
    nearest = T.amax(-1, keepdim=True) if options.largest else T.amin(-1, keepdim=True)
    rows = [E, seen.residual, seen.late, seen.size, seen.x]
    if seen.gE is not None:
        rows.append(seen.gE)
    if g is not None:
        rows += [g, z, seen.left]
    numbers = torch.cat([*rows, nearest]).tolist()
    each = [numbers[i : i + k] for i in range(0, len(numbers) - 1, k)]
    zero = [0.0] * k
    if seen.gE is None:
        each.insert(5, zero)
    if g is None:
        each += [zero, zero, zero]
    # Negative, where a pair was missed.
    rest = [(numbers[-1] - value) * options.sign for value in each[0]]
    own = torch.finfo(seen.x.dtype).eps
    return rows_are_clear([*each, rest], setting.m, own, setting.eps)


def rows_are_clear(rows: List[List[float]], m: int, own: float, eps: float) -> bool:
    """The same from numbers on the host, a row of k each: E, residual, late, size, x, gE, g, z, left of Seen, and the
    distance to the rest.  own: unit rounding of the cotangents; eps: of the arithmetic of the pairs."""
    E, r, late, size, x, gE, g, z, left, rest = rows
    total = max([abs(w) * a for w, a in zip(gE, x)] + z)
    if not total > 0.0 or any(late) or not min(rest) > 0.0:
        return False
    blur = [10 * eps * s for s in size]
    most = 3e-3 if is_single(own) else 1e-4
    for j in range(len(E)):
        amplified = z[j] * max(1.0, g[j] / left[j] if left[j] > 0.0 else 1.0)
        seen = abs(gE[j]) * x[j] + max(amplified, g[j] / (rest[j] * m**0.5))
        if rest[j] <= 100 * blur[j] or r[j] * seen > most * rest[j] * total:
            return False
        for i in range(j):
            gap = abs(E[i] - E[j])
            if gap <= own ** (1 / 3) * max(size[i], size[j]):
                return False
            mixing = max(blur[i], blur[j]) + 4 * r[i] * r[j] / min(rest[i], rest[j])
            amplitude = (x[i] * g[j] + x[j] * g[i]) / 2
            lost = mixing * (amplitude / gap + abs(gE[i] - gE[j])) + own * amplitude
            if lost * max(x[i], x[j]) > 3 * own**0.5 * gap * total:
                return False
    return True


def batch_is_clear(rows: List[Tensor], m: int, own: float, eps: float) -> bool:
    """The same of a batch, from tensors (*, k) in double precision, without a transfer for each member."""
    E, r, late, size, x, gE, g, z, left, rest = rows
    zero = torch.zeros_like(z)
    total = torch.maximum(gE.abs() * x, z).amax(-1, keepdim=True)
    blur = 10 * eps * size
    most = 3e-3 if is_single(own) else 1e-4
    share = torch.where(left > 0, g / left, zero).clamp_min(1.0)
    seen = gE.abs() * x + torch.maximum(z * share, g / (rest * m**0.5))
    clear = (total > 0) & (rest > 100 * blur) & (r * seen <= most * rest * total)
    clear = clear & (rest > 0) & (late == 0)
    gap = (E.unsqueeze(-2) - E.unsqueeze(-1)).abs()
    mixing = 4 * r.unsqueeze(-1) * r.unsqueeze(-2)
    mixing = pairwise(blur) + mixing * pairwise(1.0 / rest)
    amplitude = x.unsqueeze(-1) * g.unsqueeze(-2)
    amplitude = (amplitude + amplitude.mT) / 2
    # A gap times what is lost of its factor, so that the diagonal divides by nothing.
    lost = mixing * (amplitude + gap * (gE.unsqueeze(-2) - gE.unsqueeze(-1)).abs())
    lost = (lost + own * gap * amplitude) * pairwise(x)
    wide = pairwise(size)
    least = 0.3 * own**0.5 + 2.7 * own**0.5 * (gap > own ** (1 / 3) * wide)
    apart = gap > eps ** (1 / 3) * wide
    apart = apart & (lost <= least * gap.square() * total.unsqueeze(-1))
    apart.diagonal(dim1=-2, dim2=-1).fill_(True)
    return bool(clear.all() & apart.all())


def _shares(seen: Any, gaps: Any, C: Tensor, setting: Any) -> Any:
    """(+, *, k): by what an error relative to x_j enters that of W = X (diag(gE) + C) - Z; and the size of W,
    (+, *, 1)."""
    x = seen.x
    total = (norms(C) * x).amax(-1, keepdim=True)
    weight = torch.zeros_like(x)
    if seen.gE is not None:
        weight = weight + seen.gE.abs() * x
        total = torch.maximum(total, weight.amax(-1, keepdim=True))
    if seen.z is not None:
        z, g = seen.z, seen.g
        there = (seen.left > 0) & (z > 0)
        left = torch.where(there, seen.left, torch.ones_like(g))
        weight_Z = z * torch.where(there, g / left, 1.0).clamp(min=1.0)
        # Where gX happens to be small along the nearest vector, of an even share of gX along it.
        rest = torch.where(
            gaps.rest > 0, gaps.rest, torch.full_like(gaps.rest, math.inf)
        )
        even = g / (rest * math.sqrt(setting.m))
        weight_Z = torch.where(there, torch.maximum(weight_Z, even), weight_Z)
        weight = weight + weight_Z
        # A cotangent in span X but for a ten thousandth leaves a gradient that is as good as zero; a tangent in span X,
        # vectors that do not move, beside the others that would.
        z = torch.maximum(z, (1.0 if setting.forward_mode else 1e-4) * weight_Z)
        total = torch.maximum(total, z.amax(-1, keepdim=True))
    total = torch.where(total > 0, total, torch.ones_like(total))
    return weight / total, total


def _check_outside(
    seen: Any, gaps: Any, setting: Any, share: Tensor, inside: Tensor
) -> None:
    """Pairs that missed the tolerance, are close to the rest of the spectrum, or are not the extreme ones."""
    E, T, k = seen.E, seen.T, seen.E.shape[-1]
    options, eps = setting.options, setting.eps
    nearest = gaps.rest
    # Vectors turned among each other are solved for as if their eigenvalues were equal.
    spread = (gaps.gap * gaps.exactly).amax(-1)
    apart = spread / torch.where(nearest > 0, nearest, torch.ones_like(nearest))
    error = torch.maximum(seen.moved, apart)
    residual = torch.maximum(
        seen.residual, least_residual(seen.residual, gaps.rounding)
    )
    if not T.shape[-1]:
        # Nothing is known of the rest: the gaps inside stand for it.
        equal = gaps.equal | torch.eye(k, dtype=torch.bool, device=E.device)
        nearest = gaps.gap.masked_fill(equal, math.inf).amin(-2)
        error = residual / torch.where(nearest > 0, nearest, torch.ones_like(nearest))
    error = torch.where(share > 0, error * share, torch.zeros_like(error))
    late = (share > 0) & (seen.late > 0)
    if bool(late.any()):
        # The forward has said that pairs have not converged; here it counts what that means for the gradient.
        error = torch.maximum(error, inside.amax(-2))
        if not setting.measured or bool((late & (error >= LATE)).any()):
            _report_late(seen, options, late, error)
            return
        doubt()
    if not T.shape[-1]:
        return
    single = is_single(torch.finfo(seen.x.dtype).eps)
    most = 3e-2 if single else 1e-3
    # In a special basis, as of unit vectors, a gradient may be blind to a cluster that the loss sees.
    seen_at_all = share > 0 if seen.g is None else (share > 0) | (seen.g > 0)
    width = gaps.rounding
    if not single:
        # Of single precision, the vectors are rounded after their residuals.
        width = torch.minimum(width, torch.maximum(100 * residual, width / 10))
    cut = seen_at_all & (nearest <= width)
    if is_single(eps):
        cut = cut & ~(seen.moved < TOLD_APART)
    bad = error > most
    if bool(cut.any()):
        larger = seen.g is not None and bool((gaps.equal.any(-1) & cut).any())
        report_cut_cluster(cut, nearest, k, E.dim() - 1, not larger)
    elif bool(bad.any()):
        _report_near(seen, nearest, bad, error)
    accuracy = (seen.residual + width).unsqueeze(-1)
    missed = (T.unsqueeze(-2) - E.unsqueeze(-1)) * options.sign < -accuracy
    if bool(missed.any()):
        _report_missed(seen, options, missed)


def least_residual(residual: Tensor, rounding: Tensor) -> Tensor:
    """What a residual is at least, however small it came out: that of the rounding of the products, eps N.

    By chance one entry of it may be smaller.  If all are, by a thousand, it is none: the matrix is diagonal, for one.
    """
    return torch.where(residual > 1e-4 * rounding, rounding / 10, residual)


def _report_late(seen: Any, options: Options, late: Tensor, error: Tensor) -> None:
    late, relative, error = torch.broadcast_tensors(late, seen.late, error)
    worst = float(relative[late].max())
    where = members(late.any(-1), seen.E.dim() - 1)
    found(
        f"lobpcg: gradient of eigenpairs that have not converged{where}: relative residual {worst:.1e} where "
        f"tol={options.tol:.1e} was asked for; estimated relative error of the gradient (residual over gap) "
        "{estimate}. Raise niter or n, pass a preconditioner iK, or loosen tol if that is accurate enough.",
        math.inf,
        _at_most_one(error[late]),
        0.0,
    )


def _at_most_one(error: Tensor) -> float:
    """The largest; vectors of length one are not farther apart, so beyond one a bound says no more."""
    return min(float(error.max()), 1.0)


def _report_near(seen: Any, nearest: Tensor, bad: Tensor, error: Tensor) -> None:
    k = seen.E.shape[-1]
    worst = torch.where(bad, error, torch.zeros_like(error))
    at = worst == worst.max()
    (j,) = first(at, 1)
    gap, r, size = (
        float(V.expand_as(at)[at][0]) for V in (nearest, seen.residual, seen.size)
    )
    found(
        f"lobpcg: the gradient has an estimated relative error of {{estimate}} (residual over gap): eigenvalue {j} "
        f"of the k={k} asked for is at a distance of {gap:.1e} from those that were not, beside a residual of {r:.1e} "
        f"and a pencil of size {size:.1e}{members(bad.any(-1), seen.E.dim() - 1)}. Raise k until the cluster is "
        "complete, tighten tol, or use a loss that does not depend on this pair.",
        float(worst.max()),
        _at_most_one(worst),
        0.0,
    )


def _report_missed(seen: Any, options: Options, missed: Tensor) -> None:
    distance = (seen.T.unsqueeze(-2) - seen.E.unsqueeze(-1)).abs()
    at = missed & (distance == distance[missed].max())
    value, width = float(seen.T.unsqueeze(-2).expand_as(at)[at][0]), distance[at][0]
    j = first(at, 2)[0]
    which = "largest" if options.largest else "smallest"
    where = members(missed.any(-1).any(-1), seen.E.dim() - 1)
    found(
        f"lobpcg: an eigenvalue near {value:.6g} was missed{where}, at a distance of {width:.1e} from eigenvalue {j}, "
        f"so the pairs are not the k={seen.E.shape[-1]} {which} ones, and the gradient is that of the pairs returned. "
        "Tighten tol, raise n, or pass another start block X.",
        1.0,
    )
