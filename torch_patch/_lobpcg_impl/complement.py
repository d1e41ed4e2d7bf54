"""Numerical solution of (A - E_j B) z_j = b_j on the B-orthogonal complement of k eigenvectors, no autograd.

On the complement of k extreme pairs s (A - E_j B) is positive definite, s = -1 for the largest and +1 for the
smallest, and its eigenvalues are s (mu_i - E_j) over the eigenvalues mu_i not computed.  Three routes, chosen by cost:

* factorised: one Cholesky factorisation of s (A - E_j B) + sigma (B X)(B X)^H per pair j, for small m;
* conjugate gradients on all columns at once (module conjugate_gradient), for anything else; a dense A gets one
  Cholesky factorisation as preconditioner as soon as plain iterations have cost as much as that factorisation;
* spectral: all eigenpairs on the complement, where a dense forward found them, for k a good part of m, and where the
  operator turns out indefinite or singular to rounding (an eigenvalue cluster cut at k, or pairs that are not extreme).
"""

import math
from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from torch import Tensor
from torch._lobpcg_impl.blocks import (
    columns,
    deduct,
    gram,
    inner,
    is_single,
    norms,
    take,
)
from torch._lobpcg_impl.chebyshev import polynomial
from torch._lobpcg_impl.conjugate_gradient import conjugate_gradients, Deflation, State
from torch._lobpcg_impl.operand import Pencil
from torch._lobpcg_impl.projected import Complement
from torch._lobpcg_impl.report import found, members


# Measured on one core: while k m^3 is below this, k factorisations take less time than one with iterations on top.
_FACTORISE_FLOPS = 5e7
# From k = m / 16 on, k >= 8, all eigenpairs on the complement cost less than k systems (measured at m = 100 to 500).
_SPECTRAL_FROM = 8
_SPECTRAL_FRACTION = 16
# A factorisation of order m costs as much as m / 100 products with a dense A and a thin block (measured at 2000).
_PRODUCTS_PER_FACTOR = 100
# Largest order at which an O(m^3) eigendecomposition is an acceptable answer to an indefinite operator.
_SPECTRAL_BELOW = 2049
_MOST_REFINEMENTS = 4
# Elements of the batch of factorised matrices held at one time: 64 MiB of float64.
_FACTOR_ELEMENTS = 1 << 23
_MOST_ITERATIONS = 20000
# A vector of single precision in which residuals mix less than this of another is told from it, however near the
# eigenvalues are.
TOLD_APART = 0.1
# Up to this order one more dense solve costs a few per cent of the forward (measured: 5 to 35 ms at m = 200).
_SMALL_BELOW = 257


def is_small(pencil: Pencil) -> bool:
    """Whether a further dense solve, or one in double precision, costs little compared with the forward."""
    return pencil.is_known() and pencil.m < _SMALL_BELOW


def system_tolerance(
    E: Tensor, length: Any, T: Tensor, residual: Tensor, tol: float
) -> Tensor:
    """Relative residuals (k,) for the systems of a derivative: half of the relative error that x_j itself has.

    E: (*, k), length: |x_j|, (*, k) or 1, T: (*, p) further eigenvalues, residual: (*, k).  With e_j = |r_j| |x_j| /
    gap_j, the bound on that error, z_j inherits up to e_j |b_j| / gap_j from x_j; a residual tol |b_j| of its own adds
    tol |b_j| / gap_j.  At least tol and at most 1e-3; tol without T, which leaves the gap unknown.  Ritz values in T
    lie too far inside: the gap comes out too large and the tolerance too small, never the other way.
    """
    if T.shape[-1] == 0 or E.numel() == 0:
        return E.new_full((E.shape[-1],), tol)
    gap = (E.unsqueeze(-1) - T.unsqueeze(-2)).abs().amin(-1)  # (*, k)
    error = residual * length / gap
    return (
        (error / 2)
        .reshape(-1, E.shape[-1])
        .amin(0)
        .clamp(max=1e-3)
        .clamp(min=tol)
        .nan_to_num(tol)
    )


def solve_on_complement(
    pencil: Pencil,
    E: Tensor,
    X: Tensor,
    b: Tensor,
    sign: float,
    tol: Union[float, Tensor],
    further: Optional[Tuple[Tensor, Tensor]] = None,
    use: str = "derivative",
) -> Tensor:
    """z_j with (A - E_j B) z_j = (I - B X X^H) b_j and X^H B z_j = 0.

    E: (*, k), X: (*, m, k), b: (+, *, m, k) with any further leading dimensions, further: T (*, p) and Y (*, m, p),
    more approximate eigenpairs; E, T and Y may be in double where X and b are in single precision.  Relative residual
    at most `tol`, or tol[j], in column j, or the smallest that rounding allows; a column that misses both is reported.
    A column inside span X, to rounding, is zero.  Components along which the operator is singular to rounding are left
    out, which is reported; where the use is a "probe" they are divided by that rounding.  A probe and a "step" of
    Newton's report nothing.
    """
    eps = torch.finfo(E.dtype).eps
    # Whether all pairs are at hand.
    found = further is not None and X.shape[-1] + further[0].shape[-1] == pencil.m
    alone = not pencil.generalized and b.shape == X.shape
    if further is not None and found and alone and not is_single(eps):
        z = _by_known_pairs(E, b, *further)
        if z is not None:
            return z.to(b.dtype)
    if E.dtype != X.dtype.to_real():
        E = E.to(X.dtype.to_real())
        eps = torch.finfo(E.dtype).eps
    # With all pairs a solution in double precision costs products alone.
    wide = is_small(pencil) or (found and pencil.is_known() and not pencil.space.split)
    z = None
    if not (is_single(eps) and wide):
        z = _solve(pencil, E, X, b, sign, tol, further, use, eps)
    if z is None:
        z = _solve_in_double(pencil, X, b, sign, tol, further, use)
    return z.to(b.dtype)


def _by_known_pairs(E: Tensor, b: Tensor, T: Tensor, Y: Tensor) -> Optional[Tensor]:
    """z_j = Y (Y^H b_j / (T - E_j)), where dense `eigh` has found all pairs; None where a gap is at rounding level.

    As accurate as a solve: rounding in Y^H b_j is divided by the gap in both.
    """
    m, k = b.shape[-2:]
    if not T.shape[-1]:
        return torch.zeros_like(b)
    eps, own = (torch.finfo(dtype).eps for dtype in (E.dtype, b.dtype))
    gap = T.unsqueeze(-1) - E.unsqueeze(-2)  # (*, m - k, k)
    size = torch.maximum(T.abs().amax(-1), E.abs().amax(-1))[..., None, None]
    if bool((gap.abs() <= m * eps * size).any()):
        return None
    c = gram(Y, b.to(Y.dtype))
    # The rule of `_right_hand_side`, with its bound on what rounding leaves of a column inside span X.
    inside = norms(c, keepdim=True) <= 16 * own * (1 + k) * norms(b, keepdim=True)
    return Y @ (c / gap).masked_fill(inside, 0.0)


def _solve(
    pencil: Pencil,
    E: Tensor,
    X: Tensor,
    b: Tensor,
    sign: float,
    tol: Union[float, Tensor],
    further: Optional[Tuple[Tensor, Tensor]],
    use: str,
    eps: float,
) -> Optional[Tensor]:
    """The same in the precision of X, or None where single precision does not suffice; eps: unit rounding of the
    precision that b was computed in."""
    k = E.shape[-1]
    batch = X.shape[:-2]
    b, more = _columns_of_further_dimensions(b, len(batch))
    shifts = (
        E.repeat((1,) * len(batch) + (more.numel() // k,)) if more.numel() != k else E
    )
    op = Complement(pencil, shifts, X, sign)
    op.quiet, op.probe = use != "derivative", use == "probe"
    b, size = _right_hand_side(op, b, eps)
    if bool((size == 0).all()):
        return _further_dimensions_of_columns(torch.zeros_like(b), more, len(batch))
    op.set_scale(b)
    m, z = pencil.m, None
    if pencil.space.split:
        # No process could hold a matrix of order m.
        z = _iterate(op, b, further, tol)
    elif m == k:
        z = torch.zeros_like(b)
    elif further is not None and further[0].shape[-1] == m - k:
        z = _by_all_pairs(op, b, *further)
        # Where that fails, those are of use that an iteration would have carried.
        further = (further[0][..., : k + 4], further[1][..., : k + 4])
    if z is not None:
        pass
    elif k >= _SPECTRAL_FROM and _SPECTRAL_FRACTION * k >= m and m < _SPECTRAL_BELOW:
        z = _spectral(op, b, *op.dense())
    elif k * m**3 <= _FACTORISE_FLOPS:
        z = _factorised(op, b, k)
    else:
        z = _iterate(op, b, further, tol)
    if z is None:
        return None
    z = op.project(z) * (size * op.sign / op.scale)
    return _further_dimensions_of_columns(z, more, len(batch))


def _right_hand_side(op: Complement, b: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """(I - B X X^H) b in columns of norm one or zero, and what to multiply them by; b: (*, m, q).

    Of a column inside span X, the cotangent of a norm for one, the projection leaves rounding alone: at most 16 eps of
    b and of the terms that were subtracted.  It is zero then, and not a direction to solve for.  The projector is as
    exact as X is orthonormal, so it is applied to what it left once more: what lies in the complement keeps its length.
    """
    space = op.space
    size = space.safe_norms(b)
    b = columns(b / _nonzero(size))
    longest, c = space.joined([norms(op.BX), gram(op.X, b)], 1)
    longest = longest.unsqueeze(-2).to(b.real.dtype)
    terms = 1 + longest @ c.abs()  # (*, 1, q)
    b = deduct(b, op.BX, c)
    left, c = space.joined([norms(b, keepdim=True), gram(op.X, b)], 1)
    inside = left <= 16 * eps * terms  # false for NaN, which goes on to be seen
    b = deduct(b, op.BX, c) / _nonzero(left)
    again = space.norms(b, keepdim=True)
    inside = inside | (again < 0.5)
    b = b.div_(_nonzero(again)).masked_fill_(inside, 0.0)
    return b, (size * left * again).masked_fill(inside, 0.0)


def _nonzero(size: Tensor) -> Tensor:
    """size, and 1 where it is 0."""
    return torch.where(size == 0, torch.ones_like(size), size)


def in_double(M: Tensor) -> Tensor:
    """A real or complex tensor in double precision."""
    return M.to(torch.promote_types(M.dtype, torch.float64))


def _solve_in_double(
    pencil: Pencil,
    X: Tensor,
    b: Tensor,
    sign: float,
    tol: Union[float, Tensor],
    further: Optional[Tuple[Tensor, Tensor]],
    use: str,
) -> Tensor:
    """The same in double precision: eps / gap of single precision would be up to three of its seven digits."""
    eps = torch.finfo(b.dtype).eps
    if further is not None:
        further = (in_double(further[0]), in_double(further[1]))
    pencil, E, X = _pairs_in_double(pencil, X)
    z = _solve(pencil, E, X, in_double(b), sign, tol, further, use, eps)
    assert z is not None
    return z


def _pairs_in_double(pencil: Pencil, X: Tensor) -> Tuple[Pencil, Tensor, Tensor]:
    """Pencil, E and X in double precision.

    X is orthonormal to its own precision; a Newton-Schulz step squares what is missing.  Eigenvalues are the Rayleigh
    quotients of X, whose error is the square of X's rounding.
    """
    pencil, X = pencil.in_double(), in_double(X)
    X = 1.5 * X - 0.5 * X @ gram(X, pencil.B.apply(X))
    E = inner(X, pencil.A.apply(X)) / inner(X, pencil.B.apply(X))
    return pencil, E, X


def residuals_in_double(pencil: Pencil, X: Tensor) -> Tuple[Tensor, Tensor]:
    """Rayleigh quotients E of X, (*, k), and A X - B X E: in double precision where that is to be had, which excludes
    callables alone."""
    if pencil.is_known():
        pencil, X = pencil.in_double(), in_double(X)
    AX, BX = pencil.A.product(X), pencil.B.product(X)
    top, bottom = pencil.space.joined([inner(X, AX), inner(X, BX)])
    E = top / bottom
    return E, AX - BX * E.unsqueeze(-2)


def mixed_with_others(pencil: Pencil, X: Tensor, sign: float) -> Tensor:
    """(*, k): the part of each x_j, of length one in B, that is not the j-th eigenvector from the wanted end, all of
    which are computed in double precision."""
    pencil, X = pencil.in_double(), in_double(X)
    A = pencil.A.dense()
    if pencil.generalized:
        L = _factor_of_mass(pencil.B.dense())
        A, X = _relative_to(L, A), L.mH @ X
    V = torch.linalg.eigh(A)[1]
    C = gram(V if sign > 0 else V.flip(-1), X)
    C.diagonal(dim1=-2, dim2=-1).zero_()
    return norms(C) / norms(X)


def nearest_on_complement(pencil: Pencil, X: Tensor, sign: float) -> Tensor:
    """(*, 1): from E_k to the eigenvalue nearest to the wanted end on the complement, in double precision."""
    pencil, E, X = _pairs_in_double(pencil, X)
    op = Complement(pencil, E[..., -1:], X, sign)
    K, M, _ = _restricted(op, *op.dense())
    if M is None:
        return torch.linalg.eigvalsh(K)[..., :1] * op.sign
    # 1 / the largest eigenvalue of M relative to K, where K is positive definite: with a mass that is singular or
    # graded the rounding of eigenvalues relative to M is that of the largest, in this way that of the one asked for.
    L, info = torch.linalg.cholesky_ex(K)
    positive = info == 0
    one = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    L = torch.where(positive[..., None, None], L, one)
    nearest = 1.0 / torch.linalg.eigvalsh(_relative_to(L, M))[..., -1:]
    if not bool(positive.all()):
        C = _relative_to(_factor_of_mass(M), K)
        other = torch.linalg.eigvalsh(C)[..., :1]
        nearest = torch.where(positive.unsqueeze(-1), nearest, other)
    return nearest * op.sign


def _columns_of_further_dimensions(b: Tensor, batch_dims: int) -> Tuple[Tensor, Tensor]:
    """b: (+, *, m, k) as (*, m, + k), and an empty tensor of shape (+, k) that remembers how to go back."""
    further = b.dim() - batch_dims - 2
    shape = tuple(b.shape[:further]) + (b.shape[-1],)
    remember = torch.empty(shape, device="meta")
    if further == 0:
        return b, remember
    # Sizes in full: -1 cannot be inferred in an empty batch.
    b = b.reshape((math.prod(shape[:-1]),) + tuple(b.shape[further:])).movedim(
        0, -2
    )  # (*, m, +, k)
    return b.reshape(tuple(b.shape[:-2]) + (math.prod(shape),)), remember


def _further_dimensions_of_columns(
    z: Tensor, remember: Tensor, batch_dims: int
) -> Tensor:
    if remember.dim() == 1:
        return z
    z = z.reshape(
        tuple(z.shape[:-1]) + (math.prod(remember.shape[:-1]), remember.shape[-1])
    ).movedim(-2, 0)
    return z.reshape(tuple(remember.shape[:-1]) + tuple(z.shape[1:]))


# ---------------------------------------------------------------------------------------------- factorised


def _positive_matrix(
    op: Complement, A: Tensor, B: Optional[Tensor], shifts: Tensor
) -> Tensor:
    """s (A - E_j B) / scale + sigma (B X)(B X)^H for shifts (*, q): (*, q, m, m), positive definite.

    On span X the quadratic form is s (E_i - E_j) / scale + sigma: sigma exceeds twice the spread of the shifts, and
    is of the size of the operator (1 after scaling) so that it does not spoil the condition.
    """
    m = op.BX.shape[-2]
    spread = (op.shifts.amax(-1) - op.shifts.amin(-1))[..., None, None] / op.scale
    factor = (op.sign / op.scale).unsqueeze(-3)
    moved = shifts[..., None, None] * factor  # (*, q, 1, 1)
    K = (A.unsqueeze(-3) * factor).expand(tuple(moved.shape[:-2]) + (m, m)).contiguous()
    if B is None:
        K.diagonal(dim1=-2, dim2=-1).sub_(moved.squeeze(-1))
    else:
        K.sub_(B.unsqueeze(-3) * moved)
    return K.add_((((1 + 2 * spread) * op.BX) @ op.BX.mH).unsqueeze(-3))


def _factorised(op: Complement, b: Tensor, k: int) -> Tensor:
    """All columns by Cholesky factors, one per distinct shift (the first k), then one step of refinement."""
    A, B = op.dense()
    m, q = b.shape[-2:]
    rhs = b.reshape(tuple(b.shape[:-1]) + (q // k, k)).movedim(
        -1, -3
    )  # (*, k, m, q / k)
    step = max(1, _FACTOR_ELEMENTS // (m * m * max(1, b[..., 0, 0].numel())))
    pieces: List[Tensor] = []
    for start in range(0, k, step):
        part = rhs[..., start : start + step, :, :]
        K = _positive_matrix(op, A, B, op.shifts[..., start : min(start + step, k)])
        L, info = torch.linalg.cholesky_ex(K)
        z = torch.cholesky_solve(part, L)
        correction = torch.cholesky_solve(part - K @ z, L)
        z = z + correction
        # 1 / |z| bounds the smallest eigenvalue: at sqrt(eps) half of the digits are gone and the cause, a
        # cluster cut at k, deserves to be looked at.
        limit = torch.finfo(op.shifts.dtype).eps ** -0.5
        if bool((info != 0).any() | ~(z.abs().amax() < limit)):
            return _spectral(op, b, A, B)
        pieces.append(z)
    z = torch.cat(pieces, -3).movedim(-3, -1)  # (*, m, q / k, k)
    return z.reshape(b.shape)


# ------------------------------------------------------------------------------------------------ spectral


def _spectral(op: Complement, b: Tensor, A: Tensor, B: Optional[Tensor]) -> Tensor:
    """All columns by the eigenpairs mu, U of the pencil on the complement: z_j = U ((U^H b_j) / (mu - E_j)).

    Components with mu equal to E_j to rounding belong to a cluster cut at k: no derivative exists along them; they
    are left out, with a warning unless b does not see them.
    """
    shift = op.shifts[..., :1, None]
    C, Q, L = _reduced(op, A, B)
    mu, U = torch.linalg.eigh(C)
    if L is not None:
        U = torch.linalg.solve_triangular(L.mH, U, upper=True)
    U = Q @ U
    gap = mu.unsqueeze(-1) - (op.shifts.unsqueeze(-2) - shift) * (
        op.sign / op.scale
    )  # (*, m - k, q)
    return _divide(op, b, U, gap, mu.abs().amax(-1))


def _reduced(
    op: Complement, A: Tensor, B: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """C = L^-1 K L^-H, Q and L, the Cholesky factor of M, for `_restricted`'s K, M and Q; without B, K, Q and None."""
    K, M, Q = _restricted(op, A, B)
    if M is None:
        return K, Q, None
    L = _factor_of_mass(M)
    return _relative_to(L, K), Q, L


def _restricted(
    op: Complement, A: Tensor, B: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor], Tensor]:
    """K = Q^H s (A - E_1 B) Q / scale, M = Q^H B Q or None without B, and Q, whose columns span {z : X^H B z = 0}.

    Shifting by one of the E_j first keeps the digits of mu - E_j when the spectrum lies far from zero.
    """
    k = op.X.shape[-1]
    Q = torch.linalg.qr(op.BX, mode="complete").Q[..., k:]  # (*, m, m - k)
    BQ = Q if B is None else B @ Q
    K = Q.mH @ ((A @ Q - op.shifts[..., :1, None] * BQ) * (op.sign / op.scale))
    return (K + K.mH) / 2, None if B is None else Q.mH @ BQ, Q


def _relative_to(L: Tensor, K: Tensor) -> Tensor:
    """L^-1 K L^-H, Hermitian to the bit, for a Hermitian K."""
    C = torch.linalg.solve_triangular(L, K, upper=False)
    C = torch.linalg.solve_triangular(L, C.mH, upper=False)
    return (C + C.mH) / 2


def _factor_of_mass(M: Tensor) -> Tensor:
    """The Cholesky factor of M (*, p, p), which is positive definite, or singular to rounding: then M plus that
    rounding.  Directions without mass have infinite eigenvalues, which so become large ones; the finite ones keep their
    digits, unlike those of M without these directions."""
    L, info = torch.linalg.cholesky_ex(M)
    singular = info > 0
    if bool(singular.any()):
        p, eps = M.shape[-1], torch.finfo(M.dtype).eps
        size = M.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
        more = 4.0 * p * eps * size * singular
        L, info = torch.linalg.cholesky_ex(
            M + torch.diag_embed(more.unsqueeze(-1).expand(M.shape[:-1]))
        )
        if bool((info > 0).any()):
            raise ValueError(
                f"lobpcg: B is not positive definite{members(info > 0, info.dim())} beside the pairs that were found "
                "(its Cholesky factorisation fails); B must be Hermitian positive definite"
            )
    return L


def _by_all_pairs(op: Complement, b: Tensor, T: Tensor, Y: Tensor) -> Optional[Tensor]:
    """The same with pairs that the forward found, T: (*, m - k), Y: (*, m, m - k), and refinement.

    None where that does not converge in a few steps.  Of pairs that were rounded to single precision a step gains as
    many digits as their relative gap lies above its eps; a closer one needs a solution of its own.
    """
    gap = (T.unsqueeze(-1) - op.shifts.unsqueeze(-2)) * (op.sign / op.scale)
    size = T.abs().amax(-1) / op.scale[..., 0, 0]
    z = op.project(_divide(op, b, Y, gap, size))
    for _ in range(_MOST_REFINEMENTS):
        step = op.project(_divide(op, b - op(z), Y, gap, size, quiet=True))
        z = z + step
        # What is left is the square of the last step over the one before.
        if bool((norms(step) <= 1e-8 * norms(z)).all()):
            return z
    return None


def _divide(
    op: Complement, b: Tensor, U: Tensor, gap: Tensor, size: Tensor, quiet: bool = False
) -> Tensor:
    """U ((U^H b) / gap) but for gaps at rounding level, for U with U^H B U = I; size: (*) of the operator."""
    m, k = op.X.shape[-2:]
    eps = torch.finfo(gap.dtype).eps
    # Backward error of the eigensolver: m eps times the size of the operator, eigenvalues of the forward included.
    size = torch.maximum(size, op.shifts.abs().amax(-1) / op.scale[..., 0, 0])[
        ..., None, None
    ]
    lost = gap.abs() <= m * eps * size
    c = gram(U, b)
    if op.probe:
        return U @ (c / torch.where(lost, m * eps * size, gap))
    if bool(lost.any()):
        # Rounding of an inner product of length m with unit b.
        noise = 8 * math.sqrt(m) * eps * norms(U).unsqueeze(-1)
        seen = lost & (c.abs() > noise)
        if not (quiet or op.quiet) and bool(seen.any()):
            _report_cut_cluster(op, seen.any(-2), (gap.abs() * lost).amax(-2), k)
        c = torch.where(lost, torch.zeros_like(c), c)
    return U @ (c / torch.where(lost, torch.ones_like(gap), gap))


def _report_cut_cluster(op: Complement, cut: Tensor, gap: Tensor, k: int) -> None:
    """cut, gap: (*, q), the columns in which something was left out, and its distance."""
    report_cut_cluster(cut, gap * op.scale.squeeze(-2), k, cut.dim() - 1)


def report_cut_cluster(
    cut: Tensor, gap: Tensor, k: int, batch: int, measurable: bool = True
) -> None:
    """cut: (+, *, q), where eigenvalue q mod k equals one that was not asked for; gap: the distance of the two;
    measurable: whether no more than two are equal."""
    j = int(cut.reshape(-1, cut.shape[-1]).any(0).nonzero()[0]) % k
    width = float(gap.expand_as(cut)[cut].max())
    found(
        f"lobpcg: eigenvalue {j} of the k={k} asked for equals one that was not asked for (gap {width:.1e}, rounding "
        f"level){members(cut.any(-1), batch)}, so its eigenvector is not a differentiable function of the matrices; "
        "the part of the gradient that exists is returned. Raise k until the cluster is complete, or use a loss that "
        "does not depend on this vector.",
        measurable=0.0 if measurable else None,
    )


# -------------------------------------------------------------------------------------------- iterations


def _iterate(
    op: Complement,
    b: Tensor,
    further: Optional[Tuple[Tensor, Tensor]],
    tol: Union[float, Tensor],
) -> Optional[Tensor]:
    """Conjugate gradients with every fallback; the result of the first stage that meets the tolerance.

    None, in single precision alone, where none meets it that could in double."""
    eps = torch.finfo(op.shifts.dtype).eps
    m = op.pencil.m
    dense = op.pencil.is_dense()
    if op.pencil.iK is None:
        precondition = _polynomial(op, further)
    else:
        precondition = op.pencil.iK.apply
    z = torch.zeros_like(b)
    rtol = (
        torch.as_tensor(tol, dtype=op.shifts.dtype, device=b.device)
        .clamp(min=4 * eps)
        .reshape(-1)
    )
    rtol = rtol.repeat(b.shape[-1] // rtol.numel())  # (q,)
    deflation = None
    if further is not None and further[1].shape[-1] > 0:
        deflation = Deflation(op, further[1])
        deflation = deflation if deflation.usable else None
    # A dense A is factorised at once where that is cheap, and elsewhere when iterations have cost as much.
    budget = min(10 * m, _MOST_ITERATIONS)
    if dense:
        budget = (
            m // _PRODUCTS_PER_FACTOR
            if precondition is None
            else max(50, m // _PRODUCTS_PER_FACTOR)
        )
        budget = budget if budget >= 50 else 0
    none = torch.zeros_like(op.scale)
    state = State(math.inf, 0.0, False, True, False, none, none)
    if budget:
        z, state = conjugate_gradients(
            op, b, None, deflation, precondition, rtol, budget
        )
    # What single precision cannot resolve goes on in double.
    single = is_single(eps) and op.pencil.is_known() and not op.space.split
    if single and budget and state.lost:
        return None
    if state.all_done:
        return _without_cut_cluster(op, b, z, state, precondition, rtol)
    if dense and not state.indefinite:
        A, B = op.dense()
        first = op.shifts[..., :1]
        L, info = torch.linalg.cholesky_ex(
            _positive_matrix(op, A, B, first).squeeze(-3)
        )
        if not bool((info != 0).any()):

            def by_factor(r: Tensor) -> Tensor:
                return torch.cholesky_solve(r, L)

            z, state = conjugate_gradients(op, b, z, deflation, by_factor, rtol, 200)
            if state.all_done:
                return _without_cut_cluster(op, b, z, state, by_factor, rtol)
    elif precondition is not None and state.indefinite:
        z, state = conjugate_gradients(op, b, None, deflation, None, rtol, budget)
        if state.all_done:
            return z
    if single:
        return None
    if m < _SPECTRAL_BELOW and not op.space.split:
        return _spectral(op, b, *op.dense())
    if not op.quiet:
        _report_residual(state)
    return z


def _report_residual(state: State) -> None:
    found(
        f"lobpcg: a linear system of the derivative reached a relative residual of {state.residual:.1e} where "
        f"{state.asked:.1e} was asked for"
        + (
            " (its operator is not definite: an eigenvalue cluster is cut at k, or the pairs are inaccurate)"
            if state.indefinite
            else ""
        )
        + "; the gradient is less accurate than that by the inverse relative gap. Raise k or n past the cluster, "
        "pass a preconditioner iK, or tighten tol.",
        state.residual,
    )


def _polynomial(
    op: Complement, further: Optional[Tuple[Tensor, Tensor]]
) -> Optional[Callable[[Tensor], Tensor]]:
    """q(A) ~ (A - s)^-1 where A is sparse, s just beyond the wanted eigenvalues, from the last further one on.

    A product in it costs no inner product, projection or look at the residual, which are four fifths of an iteration.
    """
    if further is None or further[0].shape[-1] == 0 or op.pencil.is_dense():
        return None
    q = polynomial(op.pencil, op.sign)
    if q is None:
        return None
    E = op.shifts[..., : op.X.shape[-1]]
    q.aim(torch.cat([E, further[0]], -1), torch.cat([op.X, further[1]], -1))
    return q if q.chosen.degree > 1 else None


def _told_apart(
    op: Complement, b: Tensor, z: Tensor, u: Tensor, large: Tensor
) -> Tuple[Tensor, Tensor]:
    """z, (*, m, q), with the right length along u where residuals in double precision tell x_j from u_j; whether they
    do, of the columns `large`.  u: (*, m, p), null vectors to the rounding of single precision.

    That rounding points to one of m directions hardly ever, so eps |A| / gap is no bound on what it does to x_j.
    """
    E, R = residuals_in_double(op.pencil, op.X)
    pencil, u, pair = op.pencil.in_double(), in_double(u), large % E.shape[-1]
    factor = op.sign / in_double(op.scale)

    def apply(V: Tensor) -> Tensor:
        shifts = E[..., None, pair]
        return (pencil.A.apply(V) - pencil.B.apply(V) * shifts) * factor

    Ku, r = apply(u), take(R, pair) * factor
    gap = inner(u, Ku, keepdim=True)
    length = inner(u, pencil.B.apply(u), keepdim=True).sqrt()
    mixed = (u.conj() * r).sum(-2, keepdim=True).abs() * length
    told = (gap > 0) & (mixed <= TOLD_APART * gap)
    left = in_double(take(b, large)) - apply(in_double(take(z, large)))
    missing = (u.conj() * left).sum(-2, keepdim=True) / _nonzero(gap)
    step = (u * missing).masked_fill(~told, 0.0).to(z.dtype)
    return z.index_add(-1, large, step), told.squeeze(-2)


def _without_cut_cluster(
    op: Complement,
    b: Tensor,
    z: Tensor,
    state: State,
    precondition: Optional[Callable[[Tensor], Tensor]],
    rtol: Tensor,
) -> Tensor:
    """z, or where the operator is singular to rounding the solution without the component along its null vector.

    A solution of size 1 / eps relative to 1 / |K| is that null vector: it is excluded from its column, and the
    column solved again.  A further null vector is not seen by b - (B u) u^H b, so one vector per column is enough.
    """
    eps = torch.finfo(op.shifts.dtype).eps
    space = op.space
    amplification = (state.norm * state.lengths).reshape(-1, z.shape[-1]).amax(0)
    large = (amplification > eps**-0.5).nonzero()[:, 0]
    if large.numel() == 0 or op.probe:
        return z
    part = op.restrict(large)
    u = take(op.project(z), large)
    u = u / _nonzero(space.safe_norms(u))
    top, bottom = space.joined(
        [inner(u, V, keepdim=True) for V in (part(u), op.pencil.B.apply(u))]
    )
    gap = top / bottom
    # Rounding in the eigenvalues themselves: the two of a cluster agree to a modest multiple of eps |K|.
    cut = (gap.abs() <= 64 * eps * state.norm).squeeze(-2)
    if is_single(eps) and op.pencil.is_known() and bool(cut.any()):
        z, told = _told_apart(op, b, z, u, large)
        cut = cut & ~told
    singular = cut.reshape(-1, large.numel()).any(0)
    if not bool(singular.any()):
        if state.lost and not op.quiet:
            _report_residual(state)
        return z
    if not op.quiet:
        every = torch.zeros_like(
            op.shifts.expand(cut.shape[:-1] + op.shifts.shape[-1:])
        )
        where = every.bool().index_copy(-1, large, cut)
        widths = every.index_copy(-1, large, gap.abs().squeeze(-2))
        _report_cut_cluster(op, where, widths, op.X.shape[-1])
    large, u = large[singular], take(u, singular)
    excluded = op.restrict(large).exclude(u)
    again, state = conjugate_gradients(
        excluded,
        excluded.project_dual(take(b, large)),
        None,
        None,
        precondition,
        rtol[large],
        _MOST_ITERATIONS,
    )
    if not state.all_done and not op.quiet:
        _report_residual(state)
    return z.index_copy(-1, large, excluded.project(again))
