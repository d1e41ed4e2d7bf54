"""The reduced resolvent z_j = R_j b_j of k eigenpairs as a differentiable operation, to any order and in both modes.

z_j is the unique solution of (A - E_j B) z_j = (I - B X X^H) b_j with X^H B z_j = 0, that is, with c = X^H b, of

    [A - E_j B   B X] [z_j]   [b_j]
    [X^H B        0 ] [c_j] = [ 0 ]

whose matrix is Hermitian.  Reverse mode, with w_j = R_j gz_j and v_j = X^H gz_j:

    gb = w                        gE_j = Re w_j^H B z_j
    gA = -Herm(w z^H)             gB   = Herm((w E) z^H - w (X c)^H - (X v) z^H)
    gX = -B (w c^H + z v^H)

Forward mode:

    dz_j = R_j (db_j - (dA - E_j dB) z_j + dE_j B z_j - d(B X) c_j) - X d(B X)^H z_j
"""

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.blocks import pairwise
from torch._lobpcg_impl.complement import (
    is_small,
    mixed_with_others,
    nearest_on_complement,
    residuals_in_double,
    solve_on_complement,
    system_tolerance,
)
from torch._lobpcg_impl.graph import (
    hold_pencil,
    in_graphs,
    MATRICES,
    NUMBERS,
    Outputs,
    restore_pencil,
)
from torch._lobpcg_impl.operand import Pencil
from torch._lobpcg_impl.pairs import Pairs, root_of_masses
from torch._lobpcg_impl.transforms import (
    accepts_legacy_vmap,
    apply,
    batched_first,
    broadcast,
    Constant,
    in_transform,
    refuse_nested_forward_mode,
    sum_to,
    without_autocast,
)
from torch.autograd import Function


def reduced_resolvent(pairs: Pairs, b: Tensor, E: Optional[Tensor] = None) -> Tensor:
    """R_j b_j for all pairs as one block, differentiable in the pencil's parameters, E, X and b.

    b: (*, m, k), with any further leading dimensions; E: (*, k), where other shifts than pairs.E are meant.  The
    further pairs and the preconditioner change the cost of the solve, not its result.
    """
    shifts = pairs.E if E is None else E
    constants = (pairs.T, pairs.Y, pairs.residual)
    pencil = pairs.pencil
    return apply(
        ReducedResolvent,
        pencil.bare(),
        pairs.options,
        shifts,
        pairs.X,
        b,
        *constants,
        *pencil.parameters,
    )


def _block_shape(*tensors: Any, **numbers: Any) -> Outputs:
    X, b = tensors[4:6]
    return [((*broadcast(X.shape[:-2], b.shape[:-2]), *X.shape[-2:]), X.dtype)]


@in_graphs(
    "resolvent",
    f"({MATRICES}, Tensor E, Tensor X, Tensor b, Tensor T, Tensor Y, Tensor residual, *, {NUMBERS}) -> Tensor",
    _block_shape,
    hold_pencil,
    restore_pencil,
)
class ReducedResolvent(Function):
    """(pencil, options, E, X, b, T, Y, residual, parameters of the pencil ...) -> [R_j b_j]."""

    @staticmethod
    def forward(
        pencil: Pencil,
        options: Options,
        E: Tensor,
        X: Tensor,
        b: Tensor,
        T: Tensor,
        Y: Tensor,
        residual: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        k = E.shape[-1]
        tol: Any = options.tol
        if k + T.shape[-1] < pencil.m:
            length: Any = pencil.space.norms(X) if pencil.generalized else 1
            tol = system_tolerance(E, length, T, residual[..., :k], tol)
        with without_autocast(X.device):
            return solve_on_complement(
                pencil.with_parameters(parameters),
                E,
                X,
                b,
                options.sign,
                tol,
                further=(T, Y),
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pencil, ctx.options, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, gz: Optional[Tensor]) -> Any:
        if gz is None:
            return (None,) * len(ctx.needs_input_grad)
        z, b, pairs = _saved(ctx)
        pencil, E, X = pairs.pencil, pairs.E, pairs.X
        need_E, need_X = ctx.needs_input_grad[2:4]
        need_A, need_B, *_ = (
            any(needed) for needed in pencil.split(ctx.needs_input_grad[8:])
        )
        gE = gX = None
        gA: Sequence[Any] = [None] * len(pencil.A.parameters)
        gB: Sequence[Any] = [None] * len(pencil.B.parameters)
        with without_autocast(X.device):
            w = reduced_resolvent(pairs, gz)
            if need_A:
                gA = pencil.A.pullback((-w, z))
            if need_E:
                gE = sum_to(_real((w.conj() * pencil.B.product(z)).sum(-2)), E.shape)
            if need_B or need_X:
                c, v = X.mH @ b, X.mH @ gz  # (*, k, k)
            if need_B:
                gB = pencil.B.pullback((w * E.unsqueeze(-2) - X @ v, z), (-w, X @ c))
            if need_X:
                gX = sum_to(-pencil.B.product(w @ c.mH + z @ v.mH), X.shape)
        rest = [None] * (len(ctx.needs_input_grad) - 8 - len(gA) - len(gB))
        return (None, None, gE, gX, w, None, None, None, *gA, *gB, *rest)

    @staticmethod
    @accepts_legacy_vmap
    def jvp(
        ctx: Any, _pencil: Any, _options: Any, dE: Any, dX: Any, db: Any, *others: Any
    ) -> Any:
        refuse_nested_forward_mode()
        z, b, pairs = _saved(ctx)
        A, B, E, X = pairs.pencil.A, pairs.pencil.B, pairs.E, pairs.X
        dA, dB, *_ = pairs.pencil.split(others[3:])
        with without_autocast(X.device):
            rhs = torch.zeros_like(z) if db is None else db
            if _any(dA):
                rhs = rhs - A.tangent(dA, z)
            if _any(dB):
                rhs = rhs + B.tangent(dB, z) * E.unsqueeze(-2)
            if dE is not None:
                rhs = rhs + B.product(z) * dE.unsqueeze(-2)
            dBX = B.tangent(dB, X) if _any(dB) else None
            if dX is not None:
                dBX = B.product(dX) if dBX is None else dBX + B.product(dX)
            if dBX is None:
                return reduced_resolvent(pairs, rhs)
            rhs = rhs - dBX @ (X.mH @ b)
            return reduced_resolvent(pairs, rhs) - X @ (dBX.mH @ z)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Tuple[Any, ...],
        pencil: Pencil,
        options: Options,
        *tensors: Any,
    ) -> Any:
        pencil, mapped = _mapped(info.batch_size, in_dims[2:], pencil, tensors)
        return ReducedResolvent.apply(pencil, options, *mapped), 0


def _any(tangents: Tuple[Any, ...]) -> bool:
    return any(tangent is not None for tangent in tangents)


def _saved(ctx: Any) -> Tuple[Tensor, Tensor, Pairs]:
    """z, b and the pairs."""
    z, E, X, b, T, Y, residual, *parameters = ctx.saved_tensors
    return (
        z,
        b,
        Pairs(
            ctx.pencil.with_parameters(parameters),
            ctx.options,
            E,
            X,
            T,
            Y,
            residual,
            residual,
        ),
    )


def _mapped(
    size: int, in_dims: Tuple[Any, ...], pencil: Pencil, tensors: Tuple[Any, ...]
) -> Tuple[Pencil, List[Any]]:
    """The pencil; E, X, b, T, Y, residual, parameters with the mapped dimension first, so that they broadcast."""
    pencil, parameters, (E, X, b, *others), _ = pencil.mapped(
        size, in_dims[6:], tensors[6:], tensors[:6], in_dims[:6], (1, 2, 2, 1, 2, 1)
    )
    # A mapped b alone stays a set of further columns for one operator; anything else mapped maps the operator.
    if in_dims[2] is None:
        b = b.expand((size,) + tuple(b.shape))
    if any(dim is not None for i, dim in enumerate(in_dims) if i != 2):
        E = E.expand((size,) + tuple(E.shape)) if in_dims[0] is None else E
        X = X.expand((size,) + tuple(X.shape)) if in_dims[1] is None else X
    return pencil, [E, X, b, *others, *parameters]


def distance_of_quotient(pencil: Pencil, E: Tensor, Z: Tensor, sign: float) -> Tensor:
    """(+, *, k): z^H (A - E_j B) z / z^H B z, from E_j to the Rayleigh quotient of z; infinitely far where z = 0.

    From fresh products, k columns: z is known by a right-hand side to its tolerance only, and a quotient that claims a
    missed pair must not lie below the next eigenvalue by noise.
    """
    # Divided out first: squares of 1e200 leave the range.
    length = pencil.space.largest_entries(Z)
    there = length > 0
    Z = Z / torch.where(there, length, torch.ones_like(length)).unsqueeze(-2)
    BZ = pencil.B.product(Z)
    R = pencil.A.product(Z) - BZ * E.unsqueeze(-2)
    forms = [_real((Z.conj() * V).sum(-2)) for V in (R, BZ)]
    top, bottom = pencil.space.joined(forms)
    far = sign * math.inf
    return torch.where(there, top / torch.where(there, bottom, 1.0), far)


def nearest_outside(pairs: Pairs, late: Tensor) -> Tensor:
    """(*, 1): distance from E_k to a Ritz value of the complement close to it.  A constant to autograd.

    Infinity where that is known: the guard T nearest to E_k, with its residual, shows that none is there, or a pair is
    late, (*, k), and the gradient inaccurate.  Otherwise it costs a rough solution for one column, or, of a small
    pencil, all eigenvalues on the complement, in double precision.
    """
    tensors = (
        pairs.E,
        pairs.X,
        late,
        pairs.T,
        pairs.Y,
        pairs.residual,
        *pairs.pencil.parameters,
    )
    tensors = tuple(T if T is None else T.detach() for T in tensors)
    return apply(_NearestOutside, pairs.pencil.bare(), pairs.options, *tensors)


def _number_shape(*tensors: Any, **numbers: Any) -> Outputs:
    E = tensors[3]
    return [((*E.shape[:-1], 1), E.dtype)]


@in_graphs(
    "nearest_outside",
    f"({MATRICES}, Tensor E, Tensor X, Tensor late, Tensor T, Tensor Y, Tensor residual, *, {NUMBERS}) -> Tensor",
    _number_shape,
    hold_pencil,
    restore_pencil,
)
class _NearestOutside(Constant):
    @staticmethod
    def forward(
        pencil: Pencil,
        options: Options,
        E: Tensor,
        X: Tensor,
        late: Tensor,
        T: Tensor,
        Y: Tensor,
        residual: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        k, m, p = E.shape[-1], pencil.m, T.shape[-1]
        last, far = E[..., -1:], options.sign * math.inf
        if k < m and is_small(pencil):
            pencil = pencil.with_parameters(parameters)
            with without_autocast(X.device):
                return nearest_on_complement(pencil, X, options.sign).to(E.dtype)
        if bool(late.any()):
            return torch.full_like(last, far)
        # In a small space a vector is found by chance, without the rest of its cluster; there the solve is cheap, too.
        if p > 0 and 16 * (k + p) <= m:
            nearest, column = (T - last).abs().min(-1, keepdim=True)
            spread = (residual[..., k:] * pencil.space.norms(Y)).gather(-1, column)
            # The eigenvalue meant by the guard is within `spread` of it.
            if bool((spread <= nearest / 2).all()):
                return torch.full_like(last, far)
        probe = pencil.space.fixed_block(m, 1, 1 << 23, X)
        b = torch.cat([torch.zeros_like(X[..., :-1]), probe.expand_as(X[..., -1:])], -1)
        pencil = pencil.with_parameters(parameters)
        # The component along one eigenvector is about 1 / sqrt(m) of the whole.
        tol = 0.1 / math.sqrt(m)
        with without_autocast(X.device):
            z = solve_on_complement(
                pencil, E, X, b, options.sign, tol, (T, Y), use="probe"
            )
            return distance_of_quotient(pencil, E[..., -1:], z[..., -1:], options.sign)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Tuple[Any, ...],
        pencil: Pencil,
        options: Options,
        *tensors: Any,
    ) -> Any:
        (late,), _ = batched_first(info.batch_size, in_dims[4:5], tensors[2:3], (1,))
        # X stands in the place of b, too, mapped as it is: what is mapped decides how many dimensions there are.
        dims = in_dims[2:4] + in_dims[3:4] + in_dims[5:]
        pencil, (E, X, _, *others) = _mapped(
            info.batch_size, dims, pencil, tensors[:2] + (tensors[1],) + tensors[3:]
        )
        return _NearestOutside.apply(pencil, options, E, X, late, *others), 0


# |R_j r_j| is looked at where residuals over gaps reach the first of these, and is found to the second of them.
_LOOK, _ROUGH = 1e-3, 1e-2
# Residuals in the arithmetic that they are computed in: from so many times eps N on they are no noise.
_ABOVE_NOISE = 100.0


def moved_by_residuals(pairs: Pairs, residual: Tensor, nearest: Tensor) -> Tensor:
    """(+, *, k): how far x_j is from its eigenvector, but for the others in X, of length one in B.  A constant.

    residual: |r_j|, nearest: distances of E_j to the rest of the spectrum, (+, *, k).  The bound |r_j| / nearest, or,
    where that is not small, |R_j r_j| to a hundredth of that bound: a residual at rounding level points everywhere, and
    of m directions one is amplified by the nearest eigenvalue.  Cost then: a rough solution for k columns.  Where pairs
    are late they may not even be the wanted ones: a small pencil then is solved densely, of others the bound is all.
    """
    tensors = (
        pairs.E,
        pairs.X,
        pairs.late,
        pairs.T,
        pairs.Y,
        residual,
        nearest,
        pairs.size,
        *pairs.pencil.parameters,
    )
    tensors = tuple(T if T is None else T.detach() for T in tensors)
    return apply(_MovedByResiduals, pairs.pencil.bare(), pairs.options, *tensors)


def _rows_shape(*tensors: Any, **numbers: Any) -> Outputs:
    residual, nearest = tensors[8:10]
    return [(broadcast(residual.shape, nearest.shape), residual.dtype)]


@in_graphs(
    "moved_by_residuals",
    f"({MATRICES}, Tensor E, Tensor X, Tensor late, Tensor T, Tensor Y, Tensor residual, Tensor nearest, Tensor size, "
    f"*, {NUMBERS}) -> Tensor",
    _rows_shape,
    hold_pencil,
    restore_pencil,
)
class _MovedByResiduals(Constant):
    @staticmethod
    def forward(
        pencil: Pencil,
        options: Options,
        E: Tensor,
        X: Tensor,
        late: Tensor,
        T: Tensor,
        Y: Tensor,
        residual: Tensor,
        nearest: Tensor,
        size: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        far = torch.where(nearest > 0, nearest, torch.ones_like(nearest))
        bound = residual / far.to(residual.dtype)
        pencil, some_late = pencil.with_parameters(parameters), bool(late.any())
        if some_late and is_small(pencil):
            with without_autocast(X.device):
                mixed = mixed_with_others(pencil, X, options.sign).to(bound.dtype)
            # Vectors far off are not the only thing that is: the gaps are those of others.
            return torch.where(mixed < 1e-2, mixed, torch.maximum(mixed, bound))
        if some_late or not bool((bound > _LOOK).any()):
            return bound
        with without_autocast(X.device):
            e, R = residuals_in_double(pencil, X)
            eps = torch.finfo(e.dtype).eps
            clear = residual > _ABOVE_NOISE * eps * size
            if not bool(clear.any()):
                return bound
            z = solve_on_complement(
                pencil, E, X, R.to(X.dtype), options.sign, _ROUGH, (T, Y), use="probe"
            )
            form = pencil.space.inner(z, pencil.B.product(z))
            length = form.clamp_min(0).sqrt()
        # What is solved with is the residual itself, however large one must be taken to be.
        R = R / root_of_masses(pencil) if pencil.generalized else R
        left = _ROUGH * (pencil.space.norms(R) / far).to(bound.dtype)
        found = torch.minimum(length.to(bound.dtype) + left, bound)
        return torch.where(clear, found, bound)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Tuple[Any, ...],
        pencil: Pencil,
        options: Options,
        *tensors: Any,
    ) -> Any:
        pencil, arguments = _mapped_rows(
            info.batch_size, in_dims[2:], pencil, tensors, (1, 1, 1, 1)
        )
        return _MovedByResiduals.apply(pencil, options, *arguments), 0


def _mapped_rows(
    size: int,
    in_dims: Tuple[Any, ...],
    pencil: Pencil,
    tensors: Tuple[Any, ...],
    trailing: Tuple[int, ...],
) -> Tuple[Pencil, Tuple[Any, ...]]:
    """The pencil and the arguments of a Function of E, X, row, T, Y, residual and more rows, parameters, with the
    mapped dimension first.  trailing: dimensions of the rows that are not batches."""
    last = 4 + len(trailing)
    (E, X, row, T, Y, residual), (_, _, at, _, _, own) = tensors[:6], in_dims[:6]
    if own is None:  # the result has the mapped dimension at least
        expanded, own = residual.expand((size, *residual.shape)), 0
    else:
        expanded = residual
    rows, dims = [row, expanded, *tensors[6:last]], [at, own, *in_dims[6:last]]
    (row, *rows), _ = batched_first(size, dims, rows, trailing)
    pencil, (E, X, _, T, Y, _, *parameters) = _mapped(
        size,
        (*in_dims[:2], None, *in_dims[3:6], *in_dims[last:]),
        pencil,
        (E, X, X, T, Y, residual, *tensors[last:]),
    )
    return pencil, (E, X, row, T, Y, *rows, *parameters)


def mixed_by_residuals(pairs: Pairs, residual: Tensor, gap: Tensor) -> Tensor:
    """(+, *, k, k): what mixes x_i and x_j, times the gap between the two.  A constant to autograd.

    residual: |r_j|, (+, *, k), gap: (*, k, k).  The bound max(|r_i|, |r_j|), or, where it is not small beside the gap,
    |x_i^H r_j| from residuals in double precision where they are to be had: Rayleigh-Ritz leaves much less of it than
    of r_j, and of graded matrices the bound is thousands of times what is there.  On the diagonal then, what E_j is off
    by from the Rayleigh quotient.  Cost: a product with k columns.
    """
    tensors: Any = (pairs.E, pairs.X, gap, pairs.T, pairs.Y, residual, pairs.size)
    tensors = (*tensors, *pairs.pencil.parameters)
    if torch.is_grad_enabled() or in_transform():
        tensors = (T.detach() for T in tensors)
    return apply(_MixedByResiduals, pairs.pencil.bare(), pairs.options, *tensors)


def _square_shape(*tensors: Any, **numbers: Any) -> Outputs:
    gap, residual = tensors[5], tensors[8]
    return [(broadcast(gap.shape, [*residual.shape, 1]), residual.dtype)]


@in_graphs(
    "mixed_by_residuals",
    f"({MATRICES}, Tensor E, Tensor X, Tensor gap, Tensor T, Tensor Y, Tensor residual, Tensor size, *, {NUMBERS}) -> "
    "Tensor",
    _square_shape,
    hold_pencil,
    restore_pencil,
)
class _MixedByResiduals(Constant):
    @staticmethod
    def forward(
        pencil: Pencil,
        options: Options,
        E: Tensor,
        X: Tensor,
        gap: Tensor,
        T: Tensor,
        Y: Tensor,
        residual: Tensor,
        size: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        bound = pairwise(residual)
        bound = bound.expand(broadcast(bound.shape, gap.shape))
        distinct = ~torch.eye(E.shape[-1], dtype=torch.bool, device=E.device)
        if not bool((distinct & (bound > _LOOK * gap)).any()):
            return bound.clone()
        with without_autocast(X.device):
            pencil = pencil.with_parameters(parameters)
            e, R = residuals_in_double(pencil, X)
            S = pencil.space.gram(X.to(R.dtype), R).abs()
            S = (S + torch.diag_embed((e - E).abs()).to(S.dtype)).to(bound.dtype)
        noise = torch.finfo(e.dtype).eps * size
        S = torch.maximum(S, S.mT) + pairwise(noise)
        return torch.minimum(bound, S)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Tuple[Any, ...],
        pencil: Pencil,
        options: Options,
        *tensors: Any,
    ) -> Any:
        pencil, arguments = _mapped_rows(
            info.batch_size, in_dims[2:], pencil, tensors, (2, 1, 1)
        )
        return _MixedByResiduals.apply(pencil, options, *arguments), 0


def _real(x: Tensor) -> Tensor:
    return torch.real(x) if x.is_complex() else x
