"""How far the gradient of a small problem is off, measured: beside the same gradient of pairs that are found anew.

Bounds by residuals and gaps multiply the worst of everything, and say nothing of what a sparse gradient does not store.
Here A and B are solved again densely in double precision, some times, each entry changed by its rounding, and the
formulas of module derivative applied to all of their eigenpairs; the cotangents change by the rounding of the precision
that they were computed in.  What comes out differs from the gradient by what residuals and rounding do to it.

Cotangents belong to the pairs that were returned.  The new vectors are turned towards these where the loss does not
tell two from each other; what a loss that tells them apart gains from another basis is left in.
"""

import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import fixed_block, gram, norms
from torch._lobpcg_impl.complement import in_double
from torch._lobpcg_impl.operand import Operand
from torch._lobpcg_impl.pairs import Pairs


# Their mean is within a factor of two of the error that is to be expected, nearly always.
_SAMPLES = 3
# The skew part of X^H gX is G's size times gap over distance for smooth functions of E, and of G's size for others.
_SMOOTH = 1e-2
# Of the terms of a gradient that cancel, this part is as good as zero.
_LEAST = 1e-3


class Gradient(NamedTuple):
    """gE: (*, k) or None, gX: (*, m, k) or None, F: (*, k, k), the factors, 0 where none is used; gA = Herm(W X^H), gB
    = -Herm(V X^H), W and V (*, m, k).  hidden: (*, k, k), of what X C in W lacks, the size of C, or None."""

    gE: Optional[Tensor]
    gX: Optional[Tensor]
    F: Tensor
    W: Tensor
    V: Tensor
    hidden: Optional[Tensor] = None


def measured_error(
    pairs: Pairs, gradient: Gradient, need_A: bool, need_B: bool
) -> Tuple[Tensor, Tensor]:
    """(*) each: the relative error of the worse of gA and gB, NaN where it cannot be found; and the narrowest of the
    gaps between the first k + 1 eigenvalues.

    Cost: some dense solves of order m in double precision.
    """
    eps = torch.finfo(pairs.pencil.dtype).eps
    pencil = pairs.pencil.in_double()
    A = pencil.A.dense().detach()
    B = pencil.B.dense().detach() if pencil.generalized else None
    X = in_double(pairs.X)
    tensors: Any = (T if T is None else in_double(T.detach()) for T in gradient)
    given = Gradient(*tensors)
    lacks = (
        torch.zeros_like(X) if given.hidden is None else X @ given.hidden.to(X.dtype)
    )
    told, E = _distinguished(given, X, eps), in_double(pairs.E).unsqueeze(-2)
    late = pairs.missed is not None and bool(pairs.missed.any())
    errors: List[Tensor] = []
    unknown = X.new_full((), math.nan, dtype=X.dtype.to_real())
    for sample in range(_SAMPLES):
        noise = _noise(A, sample)
        exact = _pairs_anew(A, B, noise, pairs.options.largest)
        if exact is None:
            return unknown, unknown
        e, U = exact
        if _is_undecided(e, X.shape[-1], late):
            return unknown, unknown
        again, turned, sizes = _gradient_of(
            e, U, X, B, _rounded(given, eps, sample), told
        )
        for M, mine, Y, size, needed in (
            (pencil.A, given.W - lacks, again.W, sizes[0], need_A),
            (pencil.B, given.V - lacks * E, again.V, sizes[1], need_B),
        ):
            if needed:
                errors.append(_relative(M, (mine, X), (Y, turned), size))
    error = torch.stack(errors).reshape(_SAMPLES, -1, *errors[0].shape).mean(0)
    error = error.amax(0) * _factor_of_cotangents(pairs, e)
    return error, _gaps(e, X.shape[-1]).amin(-1)


def _factor_of_cotangents(pairs: Pairs, e: Tensor) -> Tensor:
    """(*), at least 1: how far eigenvalues are off, beside themselves and the width of as many more.  By so much the
    cotangents of a loss that grows with them have changed, which were computed from these."""
    k = pairs.E.shape[-1]
    E, wanted = in_double(pairs.E), e[..., :k]
    behind = min(2 * k, e.shape[-1] - 1)
    size = torch.maximum(wanted.abs(), (e[..., behind : behind + 1] - wanted).abs())
    off = (E - wanted).abs() / torch.where(size > 0, size, torch.ones_like(size))
    return off.amax(-1).clamp_min(1.0)


def _noise(A: Tensor, sample: int) -> Tensor:
    """Symmetric numbers with the variance of uniform ones in (-1, 1), (m, m), in the precision of A but real."""
    m = A.shape[-1]
    like = A.new_empty((), dtype=A.dtype.to_real())
    H = fixed_block(m, m, (1 << 21) + sample * m, like)
    return (H + H.mT) * math.sqrt(0.5)


def _pairs_anew(
    A: Tensor, B: Optional[Tensor], noise: Tensor, largest: bool
) -> Optional[Tuple[Tensor, Tensor]]:
    """All eigenpairs, wanted ones first, of A and B with entries changed by half of their last digit; None where B is
    singular."""
    change = 1 + noise * (torch.finfo(noise.dtype).eps / 2)
    A = A * change
    if B is None:
        e, U = torch.linalg.eigh(A)
    else:
        L, info = torch.linalg.cholesky_ex(B * change.flip(-1, -2))
        if bool((info > 0).any()):
            return None
        C = torch.linalg.solve_triangular(L, A, upper=False)
        C = torch.linalg.solve_triangular(L, C.mH, upper=False)
        e, U = torch.linalg.eigh((C + C.mH) / 2)
        U = torch.linalg.solve_triangular(L.mH, U, upper=True)
    return (e.flip(-1), U.flip(-1)) if largest else (e, U)


def _gaps(e: Tensor, k: int) -> Tensor:
    """Between the first k + 1, or of all if there are no more."""
    return (e[..., 1 : k + 1] - e[..., : min(k, e.shape[-1] - 1)]).abs()


def _is_undecided(e: Tensor, k: int, late: bool) -> bool:
    """Whether eigenvalues k and k + 1 are equal, or, of late pairs, some before: what moves one of them from the other
    may be no rounding of entries, some of which are zero."""
    gap, size = _gaps(e, k), e.abs()
    size = torch.maximum(size[..., 1 : k + 1], size[..., : gap.shape[-1]])
    equal = gap <= 2 * torch.finfo(e.dtype).eps * size
    return bool((equal if late else equal[..., k - 1 :]).any())


def _distinguished(gradient: Gradient, X: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """(*, k, k) each: pairs that the loss tells from each other, and those that it tells as no smooth function of E
    does.  eps: of the cotangents."""
    if gradient.gX is None:
        none = torch.zeros_like(gradient.F, dtype=torch.bool)
        return none, none
    G = gram(X, gradient.gX)
    skew = (G - G.mH).abs()
    amplitude = norms(X).unsqueeze(-1) * norms(gradient.gX).unsqueeze(-2)
    amplitude = amplitude + amplitude.mT
    noise = 8 * math.sqrt(X.shape[-2]) * eps * amplitude
    return skew > noise, skew > _SMOOTH * amplitude


def _rounded(gradient: Gradient, eps: float, sample: int) -> Gradient:
    """The cotangents, changed by the rounding of their precision."""
    gE, gX = gradient.gE, gradient.gX
    if gE is not None:
        k = gE.shape[-1]
        noise = fixed_block(k, 1, (1 << 22) + sample, gE)[:, 0]
        gE = gE * (1 + eps * noise)
    if gX is not None:
        m, k = gX.shape[-2:]
        like = gX.new_empty((), dtype=gX.dtype.to_real())
        noise = fixed_block(m, k, (1 << 23) + sample * k, like)
        gX = gX + noise * (norms(gX, keepdim=True) * (2 * eps / math.sqrt(m)))
    return gradient._replace(gE=gE, gX=gX)


def _gradient_of(
    e: Tensor,
    U: Tensor,
    X: Tensor,
    B: Optional[Tensor],
    given: Gradient,
    told: Tuple[Tensor, Tensor],
) -> Tuple[Gradient, Tensor, Tuple[Tensor, Tensor]]:
    """W and V by all eigenpairs e, U; the wanted vectors, turned towards X; sizes of the terms of W X^H and V X^H, (*)
    each."""
    k = X.shape[-1]
    E, Y = e[..., :k], U[..., k:]
    gap = E.unsqueeze(-2) - E.unsqueeze(-1)
    # Of late pairs residuals, not gaps, may have made two equal.
    least = 100 * torch.finfo(e.dtype).eps * e.abs().amax(-1)[..., None, None]
    used = (given.F != 0) | (told[0] & (gap.abs() > least))
    free = ~used | ~told[1]
    overlap = gram(U[..., :k], X if B is None else B @ X)
    left, _, right = torch.linalg.svd(overlap * free)
    turned = U[..., :k] @ (left @ right)
    lengths = norms(turned)
    W = torch.zeros_like(turned)
    terms = torch.zeros_like(lengths)
    if given.gE is not None:
        W = W + turned * given.gE.unsqueeze(-2)
        terms = given.gE.abs() * lengths.square()
    V = W * E.unsqueeze(-2)
    if given.gX is not None:
        G = gram(turned, given.gX)
        used = used & (gap != 0)
        factor = used / torch.where(used, gap, torch.ones_like(gap))
        rest = e[..., k:].unsqueeze(-1) - E.unsqueeze(-2)
        rest = torch.where(rest == 0, torch.full_like(rest, math.inf), rest)
        W = W + turned @ ((G - G.mH) / 2 * factor)
        W = W - Y @ (gram(Y, given.gX) / rest)
        V = W * E.unsqueeze(-2) + turned @ ((G + G.mH) / 4)
        if rest.shape[-2]:
            # What is stored of a gradient may have no part in the narrowest gap.
            amplified = norms(given.gX) * lengths / rest.abs().median(-2)[0]
            terms = torch.maximum(terms, amplified)
    in_B = terms * E.abs()
    if given.gX is not None:
        in_B = torch.maximum(in_B, norms(given.gX) * lengths)
    return given._replace(W=W, V=V), turned, (terms.amax(-1), in_B.amax(-1))


def _relative(
    M: Operand,
    found: Tuple[Tensor, Tensor],
    exact: Tuple[Tensor, Tensor],
    size: Tensor,
) -> Tensor:
    """(*): relative difference of Herm(U X^H) and Herm(Y Z^H) on what M stores."""
    P, Q = (V @ X.mH for V, X in (found, exact))
    P, Q = (P + P.mH) / 2, (Q + Q.mH) / 2
    stored = M.where_stored()
    if stored is not None:
        P, Q = P * stored, Q * stored
    length = torch.linalg.vector_norm(Q, dim=(-2, -1))
    difference = torch.linalg.vector_norm(P - Q, dim=(-2, -1))
    length = torch.maximum(length, _LEAST * size)
    return difference / torch.where(length > 0, length, torch.ones_like(length))
