"""From a pencil to eigenpairs, without autograd: a dense solve or the iteration, batches under a tracker."""

import itertools
import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.blocks import inner, is_single, norms, numbers_of
from torch._lobpcg_impl.iteration import EigenPairs, LOBPCG
from torch._lobpcg_impl.operand import operand, Pencil
from torch._lobpcg_impl.report import members, warn
from torch._lobpcg_impl.ritz import hermitian


# With a preconditioner that is any good eigh costs as much as the iterations near m = 128; where a start block speaks
# for them, near 512.
_DENSE_UP_TO, _DENSE_UP_TO_WITH_IK = 512, 128
# Elsewhere up to c + c' k + c'' k^2.  Measured on one thread: dense matrices with the spectrum of the Gaussian ensemble
# break even at m = 630, 630, 750, 1170 and about 2100 for k = 1, 5, 20, 50 and 100 in double, at 600, 600, 840, 1390
# and about 2500 in single: the small matrices of an iteration, (3 n)^3 with n = 2 k, outgrow its products.
_DENSE_DOUBLE, _DENSE_SINGLE = (610.0, 5.0, 0.115), (570.0, 10.0, 0.12)
# Up to this order a standard problem in single precision is solved in double: eigh takes 1.4 to 1.6 times as long, and
# what corrected its pairs in double before took more.  Above, eigh in single precision, backward stable as well.
_DOUBLE_UP_TO = 256
# Bytes of a row from which on eigh reads the upper triangle of a matrix on a CPU: with MKL that takes 0.89 to 0.98 of
# the time of the lower one, beyond m = 200 in double and m = 400 in single precision; below 1.0 to 1.1.
_UPPER_FROM = 1600


def solve(pencil: Pencil, X: Optional[Tensor], options: Options) -> EigenPairs:
    """n >= k eigenpairs of each pencil; X: (*, m, n), the start block, or None.  Dense A and B are Hermitian to the
    bit.

    Raises ValueError on NaN, infinity, asymmetry and a B or iK that shows itself not to be positive definite.
    """
    pencil, batch = pencil.checked(), pencil.batch
    if X is not None:
        operand(X, "X").check_finite(lambda: X)
    if 0 in batch:
        return _no_pairs(pencil, options.n)
    if dense_is_cheaper(pencil, options):
        return dense_solve(pencil, options)
    if options.tracker is None or not batch:
        return iterate(pencil, X, options)
    # One worker a matrix, so that a tracker sees one problem at a time; batch in row-major order.
    positions = itertools.product(*(range(size) for size in batch))
    start = _start(pencil, X, options)
    pairs = [iterate(pencil.member(p), start[p], options) for p in positions]
    stacked: Any = (
        torch.stack(field).reshape([*batch, *field[0].shape])
        for field in list(zip(*pairs))[:6]
    )
    at_rounding = all(one.at_rounding for one in pairs)
    return EigenPairs(*stacked, at_rounding=at_rounding)  # type: ignore[misc]


def _start(pencil: Pencil, X: Optional[Tensor], options: Options) -> Tensor:
    start = X
    if start is None:
        start = pencil.space.fixed_block(pencil.m, options.n, 0, pencil.empty())
    return start.expand([*pencil.batch, *start.shape[-2:]])


def iterate(pencil: Pencil, X: Optional[Tensor], options: Options) -> EigenPairs:
    """Run the worker on one problem or on a batch in lockstep; the pencil is checked."""
    iparams = {
        "m": pencil.m,
        "n": options.n,
        "k": options.k,
        "niter": options.niter,
        "chosen": options.chosen,
    }
    fparams = {"tol": options.tol}
    bparams = {
        "largest": options.largest,
        "separate": options.differentiated,
        "accurate": options.accurate,
    }
    given: Any = (options.ortho_iparams, options.ortho_fparams, options.ortho_bparams)
    workers: Any = (iparams, fparams, bparams)
    for shown, ortho in zip(workers, given):
        shown.update({"ortho_" + name: value for name, value in ortho.items()})
    A, B, iK = (
        getattr(M, "tensor", getattr(M, "call", None))
        for M in (pencil.A, pencil.B, pencil.iK)
    )
    # A start block of ours is handed over: nothing here keeps it alive.
    worker = LOBPCG(
        A,
        B,
        _start(pencil, X, options),
        iK,
        iparams,
        fparams,
        bparams,
        options.method,
        options.tracker,
        pencil,
    )
    with torch.no_grad():
        worker.run()
    return worker.result()


def dense_is_cheaper(pencil: Pencil, options: Options) -> bool:
    """One dense factorisation instead of iterations: m < 3 n, where LOBPCG does not apply, or small dense matrices."""
    if options.iterate or not pencil.is_known():
        return False
    if pencil.m < 3 * options.n:
        return True
    return pencil.is_dense() and pencil.m <= _dense_up_to(pencil, options)


def _dense_up_to(pencil: Pencil, options: Options) -> int:
    """The largest order of a dense matrix that is factorised: the same on every device, since a graph is traced on none
    and must have the shapes of what will run."""
    if pencil.iK is not None:
        return _DENSE_UP_TO_WITH_IK
    if options.chosen > 0:
        return _DENSE_UP_TO
    single = is_single(torch.finfo(pencil.dtype).eps)
    constant, slope, curvature = _DENSE_SINGLE if single else _DENSE_DOUBLE
    return int(constant + options.k * (slope + options.k * curvature))


def pair_shapes(
    pencil: Pencil, options: Options
) -> List[Tuple[Sequence[int], torch.dtype]]:
    """Shape and dtype of the tensors of Pairs, in their order; behind E and X empty ones, where no derivative follows.
    No value decides how many pairs are found."""
    batch, m, k = pencil.batch, pencil.m, options.k
    dense = 0 not in batch and dense_is_cheaper(pencil, options)
    found, n = (m, k) if dense else (options.n, options.n)
    further, known = found - k, k
    if not options.differentiated:
        further = known = n = 0
    wide = keeps_double(pencil, options)
    dtype = torch.promote_types(pencil.dtype, torch.float64) if wide else pencil.dtype
    X, Y = ([*batch, m, k], pencil.dtype), ([*batch, m, further], dtype)
    E, residual, scale = (([*batch, p], pencil.dtype.to_real()) for p in (k, n, n))
    T, values = (([*batch, p], dtype.to_real()) for p in (further, k if wide else 0))
    return [E, X, T, Y, residual, scale, ([*batch, known], torch.bool), values]


def keeps_double(pencil: Pencil, options: Options) -> bool:
    """Whether what a derivative needs of single precision beyond E and X is kept in double, in which it was found: its
    linear systems are sums over the pairs then."""
    return (
        options.differentiated
        and is_single(torch.finfo(pencil.dtype).eps)
        and not pencil.generalized
        and pencil.m <= _DOUBLE_UP_TO
        and 0 not in pencil.batch
        and dense_is_cheaper(pencil, options)
    )


def found_in_double(pencil: Pencil) -> bool:
    """Whether a dense solve is in double precision, whatever the precision of the pencil."""
    return pencil.generalized or pencil.m <= _DOUBLE_UP_TO


def dense_solve(pencil: Pencil, options: Options) -> EigenPairs:
    """The k wanted pairs by Cholesky of B and eigh, or all m, where a derivative may follow: E (*, p), X (*, m, p),
    residuals of the first k.  Cost: about 9 m^3.

    The pencil is checked.  The pairs beyond k cost nothing here, and with them the backward solve is a sum.  Single
    precision is solved in double, and the pairs are returned in it: with B always, since L^-1 A L^-H loses as many
    digits as B is ill-conditioned (13 to 75 % of an eigenvalue for a B graded by 1e6).
    """
    m, k, batch = pencil.m, options.k, pencil.batch
    count = m if options.differentiated else k
    wide = pencil.dtype
    if is_single(torch.finfo(wide).eps) and found_in_double(pencil):
        wide = torch.promote_types(wide, torch.float64)
    # Detached, since matmul chooses its way to a product by requires_grad too, and a graph's tensors have none.
    A = pencil.A.dense()
    A = (A.detach() if A.requires_grad else A).to(wide)
    single = not (A.dim() > 2 or batch or pencil.rescaled or pencil.generalized)
    # The largest are the smallest of -A: a batch that is negated costs less than all vectors put in order.
    negated = options.largest and count == m and not single
    if pencil.generalized:
        E, X, residual, scale = _generalized(pencil, A, options, count, negated)
    elif single:
        return _of_one(A, options)
    else:
        if negated:
            A = A.neg() if wide == pencil.dtype else A.neg_()
        E, X, every = _in_order(A, count, options.largest and not negated)
        first, values = X.narrow(-1, 0, k), E.narrow(-1, 0, k)
        off = torch.addcmul(A @ first, first, values.unsqueeze(-2), value=-1)
        if negated:
            E = torch.rsub(E, 0.0)  # no zero is negative
            values = E.narrow(-1, 0, k)
        residual = norms(off)
        size = torch.linalg.vector_norm(every, math.inf, -1, keepdim=True)
        scale = size + values.abs()
    if pencil.rescaled:
        up, root = (
            T.to(E.dtype).unsqueeze(-1)
            for T in (1.0 / pencil.scale_A, pencil.scale_B.sqrt())
        )
        E, X = E * up * root.square(), X * root.unsqueeze(-1)
        residual, scale = residual * up * root, scale * up * root
    if list(E.shape[:-1]) != batch:
        E, residual, scale = (
            T.expand([*batch, T.shape[-1]]) for T in (E, residual, scale)
        )
        X = X.expand([*batch, m, count])
    return EigenPairs(E, X, residual, scale, at_rounding=True)


def _eigh(A: Tensor) -> Tuple[Tensor, Tensor]:
    if A.shape[-1] * A.itemsize >= _UPPER_FROM and A.is_cpu:
        return torch.linalg.eigh(A, UPLO="U")
    return torch.linalg.eigh(A)


def _in_order(A: Tensor, count: int, last: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """`count` eigenpairs of Hermitian A, E (*, count) and X (*, m, count): the lowest in ascending order, or the last
    in descending order; and all eigenvalues in ascending order."""
    every, X = _eigh(A)
    start = A.shape[-1] - count if last else 0
    E, X = every.narrow(-1, start, count), X.narrow(-1, start, count)
    return (E.flip(-1), X.flip(-1), every) if last else (E, X, every)


def _of_one(A: Tensor, options: Options) -> EigenPairs:
    """The pairs of one matrix, with the numbers that they are judged by on the host, since a small matrix is solved
    before a few more kernels have started.  Of the largest ones E and X have memory of their own."""
    k, m, rest = options.k, A.shape[-1], None
    every, V = _eigh(A)
    if options.largest:
        E, X = every[m - k :].flip(0), V[:, m - k :].flip(1)
    else:
        E, X = every[:k], V[:, :k]
    if options.differentiated:
        # The others in their order, nearest ones first.
        if options.largest:
            rest = (every[: m - k].flip(0), V[:, : m - k].flip(1))
        else:
            rest = (every[k:], V[:, k:])
    residual = norms(torch.addcmul(A @ X, X, E, value=-1))
    numbers = numbers_of(every, residual)
    size = max(abs(numbers[0]), abs(numbers[m - 1]))
    wanted = numbers[m - k : m][::-1] if options.largest else numbers[:k]
    scale = [size + abs(value) for value in wanted]
    return EigenPairs(
        E,
        X,
        residual,
        E.abs().add_(size),
        at_rounding=True,
        rest=rest,
        numbers=[wanted, numbers[m:], scale],
    )


def _generalized(
    pencil: Pencil, A: Tensor, options: Options, count: int, negated: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """E, X, residual, scale of a pencil with B, of whose A a copy in the precision of the solve is given; negated:
    whether by way of -A."""
    k = options.k
    B = pencil.B.dense().detach().to(A.dtype)
    L, info = torch.linalg.cholesky_ex(B)
    if bool((info > 0).any()):
        raise ValueError(
            f"lobpcg: B is not positive definite{members(info > 0, info.dim())} (its Cholesky factorisation "
            "fails); B must be Hermitian positive definite"
        )
    half = torch.linalg.solve_triangular(L, A, upper=False)
    C = torch.linalg.solve_triangular(L, half.mH, upper=False)
    C = hermitian(C)
    if negated:
        E, V, _ = _in_order(C.neg_(), count, False)
        E = -E
    else:
        E, V, _ = _in_order(C, count, options.largest)
    X = torch.linalg.solve_triangular(L.mH, V, upper=True)
    # A product costs m^2 a column: for the pairs that are asked for, not for all.
    first = X.narrow(-1, 0, k)
    AX, BX = A @ first, B @ first
    # What B's condition has cost the eigenvalues, Rayleigh quotients have back: their error is of second order.
    quotients = inner(first, AX) / inner(first, BX)
    quotients = quotients.sort(-1, descending=options.largest)[0]
    E = torch.cat([quotients, E[..., k:]], -1)
    norm_A, norm_B = (
        torch.linalg.matrix_norm(M).unsqueeze(-1) / pencil.m**0.5 for M in (A, B)
    )
    scale = (norm_A + quotients.abs() * norm_B) * norms(first)
    return E, X, norms(AX - BX * quotients.unsqueeze(-2)), scale


def warn_unconverged(found: EigenPairs, pencil: Pencil, options: Options) -> None:
    """One warning if a wanted pair falls short of what was asked for."""
    k, tol = options.k, options.tol
    residual, scale = found.residual[..., :k], found.scale[..., :k]
    if residual.numel() == 0:
        return
    missed = residual > tol * scale if found.missed is None else found.missed
    if not bool(missed.any()):
        return
    rerr = residual / torch.where(scale > 0, scale, torch.ones_like(scale))
    rerr = rerr.masked_fill(~missed.to(rerr.device), 0.0).max()
    where = members(missed.any(-1), len(pencil.batch))
    reached = f"relative residual {float(rerr):.2e}, tolerance {tol:.2g}"
    if options.accurate and found.error is not None:
        error = found.error.masked_fill(~missed.to(found.error.device), 0.0).max()
        reached += f", eigenvalues to a relative {float(error):.1e}"
    # The iteration knows how far its eigenvalues may be off.
    if found.error is None:
        cause = "by a dense factorisation, whose rounding allows no better"
        remedy = "raise tol, rescale or regularise B, or pass double precision"
    elif found.at_rounding:
        cause = f"and rounding in {str(pencil.dtype)[6:]} allows no better"
        remedy = "raise tol, pass a preconditioner iK, or double precision"
    else:
        cause = f"niter={options.niter}"
        remedy = "raise niter or tol, pass a larger n or a preconditioner iK"
    warn(
        f"lobpcg: {int(missed.sum())} of {missed.numel()} eigenpairs have not converged{where}: {reached}, {cause}; "
        f"{remedy}",
        UserWarning,
    )


def _no_pairs(pencil: Pencil, n: int) -> EigenPairs:
    """The result for an empty batch."""
    X = pencil.empty(*pencil.batch, pencil.m, n)
    E = X.new_empty((*pencil.batch, n), dtype=X.dtype.to_real())
    return EigenPairs(E, X, E, E)
