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

from typing import Any, Optional

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
    """What a solve needs besides tensors: which end of the spectrum, the tolerance of the forward.

    probe: the solution only has to show how close to singular the operator is.
    """

    def __init__(self, largest: bool, tol: float, probe: bool = False) -> None:
        self.largest, self.tol, self.probe = largest, tol, probe


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
    def forward(A, B, E, X, b, Y, iK, T, options):
        with without_autocast(X):
            return solve_on_complement(A, B, E, X, b, Y, iK, options.largest, options.tol, T=T, probe=options.probe)

    @staticmethod
    def setup_context(ctx, inputs, output):
        A, B, E, X, b, Y, iK, T, ctx.options = inputs
        save(ctx, A=A, B=B, E=E, X=X, b=b, Y=Y, iK=iK, T=T, z=output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx, gz):
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
    def jvp(ctx, dA, dB, dE, dX, db, dY, diK, dT, _options):
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
    def vmap(info, in_dims, A, B, E, X, b, Y, iK, T, options):
        tensors = [A, B, E, X, b, Y, iK, T]
        size = info.batch_size
        (A, B, E, X, b, Y, iK, T), _ = batched_first(size, in_dims[:-1], tensors, trailing=(2, 2, 1, 2, 2, 2, 2, 1))
        # A mapped b alone stays a set of further columns for one operator; anything else mapped maps the operator.
        operator_mapped = any(dim is not None for i, dim in enumerate(in_dims[:-1]) if i != 4)
        if in_dims[4] is None:
            b = b.expand((size,) + tuple(b.shape))
        if operator_mapped and in_dims[2] is None:
            E = E.expand((size,) + tuple(E.shape))
        if operator_mapped and in_dims[3] is None:
            X = X.expand((size,) + tuple(X.shape))
        return ReducedResolvent.apply(A, B, E, X, b, Y, iK, T, options), 0


def _real(x: Tensor) -> Tensor:
    return torch.real(x) if x.is_complex() else x
