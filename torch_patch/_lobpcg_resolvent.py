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
from typing import Any, List, Optional, Tuple, Union

import torch
from torch import Tensor
from torch._lobpcg_complement import solve_on_complement
from torch._lobpcg_function import (
    accepts_legacy_vmap,
    batched_first,
    refuse_nested_forward_mode,
    save,
    saved,
    without_autocast,
)
from torch._lobpcg_pattern import _sum_to, apply, hermitian_apply, hermitian_outer
from torch.autograd import Function


class SolveOptions:
    """What a solve needs besides its tensors: the end of the spectrum, and the tolerance, one for all pairs or (k,)."""

    def __init__(self, largest: bool, tol: Union[float, Tensor]) -> None:
        self.largest, self.tol = largest, tol


def reduced_resolvent(
    A: Any,
    B: Any,
    E: Tensor,
    X: Tensor,
    b: Tensor,
    Y: Optional[Tensor],
    iK: Any,
    options: SolveOptions,
    T: Optional[Tensor] = None,
) -> Tensor:
    """R_j b_j for all pairs as one block, differentiable in A, B, E, X and b.

    E: (*, k), X and b: (*, m, k); b may have further leading dimensions.  Y (*, m, p), more approximate eigenvectors,
    with their eigenvalues T (*, p), and the preconditioner iK change the cost of the solve, not its result.
    """
    return ReducedResolvent.apply(A, B, E, X, b, Y, iK, T, options)


class ReducedResolvent(Function):
    @staticmethod
    def forward(
        A: Any, B: Any, E: Tensor, X: Tensor, b: Tensor, Y: Any, iK: Any, T: Any, options: SolveOptions
    ) -> Tensor:
        with without_autocast(X):
            return solve_on_complement(A, B, E, X, b, Y, iK, options.largest, options.tol, T=T)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        A, B, E, X, b, Y, iK, T, ctx.options = inputs
        save(ctx, A=A, B=B, E=E, X=X, b=b, Y=Y, iK=iK, T=T, z=output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, gz: Optional[Tensor]) -> Any:
        if gz is None:
            return (None,) * 9
        s = saved(ctx)
        A, B, E, X, b, z = s["A"], s["B"], s["E"], s["X"], s["b"], s["z"]
        need_A, need_B, need_E, need_X = ctx.needs_input_grad[:4]
        gA = gB = gE = gX = None
        with without_autocast(X):
            w = reduced_resolvent(A, B, E, X, gz, s["Y"], s["iK"], ctx.options, s["T"])
            if need_A:
                gA = hermitian_outer(A, -w, z)
            if need_E:
                gE = _sum_to(_real((w.conj() * apply(B, z)).sum(-2)), E.shape)
            if need_B or need_X:
                c, v = X.mH @ b, X.mH @ gz  # (*, k, k)
            if need_B:
                gB = hermitian_outer(B, torch.cat([w * E.unsqueeze(-2) - X @ v, -w], -1), torch.cat([z, X @ c], -1))
            if need_X:
                gX = _sum_to(-apply(B, w @ c.mH + z @ v.mH), X.shape)
        return gA, gB, gE, gX, w, None, None, None, None

    @staticmethod
    @accepts_legacy_vmap
    def jvp(ctx: Any, dA: Any, dB: Any, dE: Any, dX: Any, db: Any, _dY: Any, _diK: Any, _dT: Any, _options: Any) -> Any:
        refuse_nested_forward_mode()
        s = saved(ctx)
        A, B, E, X, b, z = s["A"], s["B"], s["E"], s["X"], s["b"], s["z"]
        with without_autocast(X):
            rhs = torch.zeros_like(z) if db is None else db
            if dA is not None:
                rhs = rhs - hermitian_apply(dA, z)
            if dB is not None:
                rhs = rhs + hermitian_apply(dB, z) * E.unsqueeze(-2)
            if dE is not None:
                rhs = rhs + apply(B, z) * dE.unsqueeze(-2)
            dBX = None if dB is None else hermitian_apply(dB, X)
            if dX is not None:
                dBX = apply(B, dX) if dBX is None else dBX + apply(B, dX)
            if dBX is None:
                return reduced_resolvent(A, B, E, X, rhs, s["Y"], s["iK"], ctx.options, s["T"])
            rhs = rhs - dBX @ (X.mH @ b)
            return reduced_resolvent(A, B, E, X, rhs, s["Y"], s["iK"], ctx.options, s["T"]) - X @ (dBX.mH @ z)

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], *arguments: Any) -> Any:
        A, B, E, X, b, Y, iK, T, options = arguments
        in_dims = in_dims[:4] + in_dims[5:8] + in_dims[4:5]
        A, B, E, X, Y, iK, T, b = _mapped(info.batch_size, in_dims, A, B, E, X, Y, iK, T, b)
        return ReducedResolvent.apply(A, B, E, X, b, Y, iK, T, options), 0


def _mapped(size: int, in_dims: Tuple[Any, ...], *arguments: Any) -> List[Any]:
    """A, B, E, X, Y, iK, T, b with the mapped dimension first, in such a way that they broadcast."""
    tensors, _ = batched_first(size, in_dims, arguments, trailing=(2, 2, 1, 2, 2, 2, 1, 2))
    A, B, E, X, Y, iK, T, b = tensors
    # A mapped b alone stays a set of further columns for one operator; anything else mapped maps the operator.
    operator_mapped = any(dim is not None for dim in in_dims[:-1])
    if b is not None and in_dims[-1] is None:
        b = b.expand((size,) + tuple(b.shape))
    if operator_mapped and in_dims[2] is None:
        E = E.expand((size,) + tuple(E.shape))
    if operator_mapped and in_dims[3] is None:
        X = X.expand((size,) + tuple(X.shape))
    return [A, B, E, X, Y, iK, T, b]


def rayleigh_quotient(B: Any, Z: Tensor, b: Tensor, largest: bool) -> Tensor:
    """(+, *, k): z^H (A - E_j B) z / z^H B z for z = R_j b_j, without a product with A; infinitely far where z = 0."""
    length = Z.abs().amax(-2)  # divided out first: squares of 1e200 leave the range
    there = length > 0
    length = torch.where(there, length, torch.ones_like(length))
    Z = Z / length.unsqueeze(-2)
    top, bottom = _real((Z.conj() * b).sum(-2)), _real((Z.conj() * apply(B, Z)).sum(-2))
    far = -math.inf if largest else math.inf
    return torch.where(there, top / length / torch.where(there, bottom, torch.ones_like(bottom)), far)


def nearest_outside(
    A: Any,
    B: Any,
    E: Tensor,
    X: Tensor,
    Y: Tensor,
    iK: Any,
    T: Tensor,
    residual: Tensor,
    late: Tensor,
    options: SolveOptions,
) -> Tensor:
    """(*, 1): distance from E_k to a Ritz value of the complement close to it.  A constant to autograd.

    Infinity where that is known: the guard T nearest to E_k, with its residual (*, k + p), shows that none is there, or
    a pair is late, (*, k), and the gradient inaccurate.  Otherwise it costs a rough solution for one column.
    """
    return _NearestOutside.apply(A, B, E, X, Y, iK, T, residual, late, options)


class _NearestOutside(Function):
    @staticmethod
    def forward(
        A: Any,
        B: Any,
        E: Tensor,
        X: Tensor,
        Y: Tensor,
        iK: Any,
        T: Tensor,
        residual: Tensor,
        late: Tensor,
        options: SolveOptions,
    ) -> Tensor:
        k, m, p = E.shape[-1], X.shape[-2], T.shape[-1]
        last, far = E[..., -1:], -math.inf if options.largest else math.inf
        if bool(late.any()):
            return torch.full_like(last, far)
        # In a small space a vector is found by chance, without the rest of its cluster; there the solve is cheap, too.
        if 0 < p and 16 * (k + p) <= m:
            nearest, column = (T - last).abs().min(-1, keepdim=True)
            spread = (residual[..., k:] * torch.linalg.vector_norm(Y, dim=-2)).gather(-1, column)
            # The eigenvalue meant by the guard is within `spread` of it.
            if bool((spread <= nearest / 2).all()):
                return torch.full_like(last, far)
        t = torch.arange(1, m + 1, dtype=E.dtype, device=E.device)
        probe = torch.sin(t * t).unsqueeze(-1).to(X.dtype)  # incommensurable with 2 pi: without symmetry
        b = torch.cat([torch.zeros_like(X[..., :-1]), probe.expand_as(X[..., -1:])], -1)
        with without_autocast(X):
            # The component along one eigenvector is about 1 / sqrt(m) of the whole.
            z = solve_on_complement(A, B, E, X, b, Y, iK, options.largest, 0.1 / math.sqrt(m), T=T, probe=True)
            return rayleigh_quotient(B, z, b, options.largest)[..., -1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return (None,) * 10

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], *arguments: Any) -> Any:
        pencil = _mapped(info.batch_size, in_dims[:7] + (None,), *arguments[:7], None)
        tested, _ = batched_first(info.batch_size, in_dims[7:9], arguments[7:9], trailing=(1, 1))
        return _NearestOutside.apply(*pencil[:7], *tested, arguments[9]), 0


def _real(x: Tensor) -> Tensor:
    return torch.real(x) if x.is_complex() else x
