"""Extreme eigenpairs as one differentiable operation: torch.autograd, forward mode, torch.func."""

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_complement import system_tolerance
from torch._lobpcg_constructor import around_constructor, keep_graph_of_values
from torch._lobpcg_derivative import ComputedPairs, corrected, forward_mode, reverse_mode
from torch._lobpcg_function import (
    accepts_legacy_vmap,
    batched_first,
    broadcast,
    in_transform,
    refuse_nested_forward_mode,
    save,
    saved,
    without_autocast,
)
from torch._lobpcg_pattern import by_rows, is_sparse, is_symmetric_pattern
from torch._lobpcg_resolvent import SolveOptions
from torch.autograd import Function


class Problem:
    """What an eigenproblem is besides its tensors: the number of pairs, which end, the tolerance, whether a derivative
    may be asked for, and how the pairs and their derivatives are computed; set by the forward, the tolerances (k,) of
    the derivative's linear systems."""

    def __init__(self, solve: Callable[..., Any], k: int, largest: bool, tol: float, differentiated: bool) -> None:
        self.solve, self.k, self.largest, self.tol, self.differentiated = solve, k, largest, tol, differentiated
        self.system_tol: Optional[Tensor] = None

    def pairs(self, A: Any, B: Any, X: Optional[Tensor], iK: Any) -> Tuple[Tensor, ...]:
        """E (*, k), X (*, m, k), further pairs T (*, p), Y (*, m, p), residual (*, n), scale (*, n)."""
        k = self.k
        found = self.solve(A, B, X, iK, self.differentiated)
        residual, scale = found.residual, found.scale
        wanted = (found.E[..., :k], found.X[..., :k], residual[..., :k], scale[..., :k])
        E, X, improved = corrected(A, B, *wanted, self.largest, self.tol)
        if self.differentiated:
            self.system_tol = system_tolerance(E, X, found.E[..., k:], improved, self.tol)
        residual = torch.cat([improved, residual[..., k:]], -1)
        last = found.E.shape[-1] if self.differentiated else k
        # Copies, so that what is returned neither aliases an argument nor keeps the whole block alive.
        parts = (E, X, found.E[..., k:last], found.X[..., k:last], residual, scale)
        return tuple(part.detach().clone(memory_format=torch.contiguous_format) for part in parts)

    def reverse(
        self, pairs: ComputedPairs, gE: Optional[Tensor], gX: Optional[Tensor], need_A: bool, need_B: bool
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Cotangents of A and B, None where not needed."""
        return reverse_mode(pairs, gE, gX, need_A, need_B)

    def tangent(self, pairs: ComputedPairs, dA: Optional[Tensor], dB: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Tangents of E and X."""
        return forward_mode(pairs, dA, dB)


def differentiable_eigenpairs(
    A: Any, B: Any, X: Optional[Tensor], iK: Any, solve: Callable[..., Any], k: int, largest: bool, tol: float
) -> Tuple[Tensor, Tensor]:
    """E (*, k), X (*, m, k) of A X = B X diag(E), differentiable in A and B.

    A, B: dense (*, m, m) or sparse, Hermitian, or a callable on blocks (*, m, p), which is a constant; B may be None.
    X (start block) and iK (preconditioner) never get a gradient.
    `solve(A, B, X, iK, differentiated)` is the forward: a tuple with E (*, n), X (*, m, n), residual (*, n), scale
    (*, n), n >= k; differentiated: whether a derivative may be asked for.
    `tol` is its relative tolerance; those of the derivative's linear systems follow from it, see system_tolerance.

    Raises ValueError if a sparse matrix whose gradient is asked for stores (r, c) but not (c, r).
    """
    A, B = with_gradients(A, B)
    X, iK = (M.detach() if isinstance(M, Tensor) else M for M in (X, iK))
    problem = Problem(solve, k, largest, tol, may_be_differentiated(A, B))
    if problem.differentiated:
        outputs = LOBPCGAutogradFunction.apply(A, B, X, iK, problem)
    else:
        # A Function with nothing to record costs a fifth of a small solve.
        with torch.no_grad():
            outputs = LOBPCGAutogradFunction.forward(A, B, X, iK, problem)
    return outputs[0], outputs[1]


def with_gradients(A: Any, B: Any) -> Tuple[Any, Any]:
    """A and B in layouts that gradients of any order exist in.  ValueError as above."""
    for name, M in (("A", A), ("B", B)):
        if is_sparse(M) and M.requires_grad and not is_symmetric_pattern(M.detach()):
            raise ValueError(
                f"lobpcg: the gradient of sparse {name} is Hermitian and lives on its stored positions, but {name} "
                "stores a position (r, c) without (c, r); make its pattern symmetric, with explicit zeros, or pass a "
                "dense matrix"
            )
        if is_sparse(M) and M.grad_fn is not None:
            keep_graph_of_values(M)
    A, B = (by_rows(around_constructor(M)) if is_sparse(M) and M.requires_grad else M for M in (A, B))
    return A, B


def may_be_differentiated(*operands: Any) -> bool:
    """Whether autograd records, or a transform is active (which may be vmap alone)."""
    recorded = torch.is_grad_enabled() and any(isinstance(M, Tensor) and M.requires_grad for M in operands)
    return recorded or in_transform()


class LOBPCGAutogradFunction(Function):
    """(A, B, X, iK, problem) -> E (*, k), X (*, m, k), and constants of the backward solve: further pairs T (*, p),
    Y (*, m, p), residual (*, n), scale (*, n)."""

    @staticmethod
    def forward(A: Any, B: Any, X: Optional[Tensor], iK: Any, problem: Problem) -> Tuple[Tensor, ...]:
        like = next(M for M in (A, B, X) if isinstance(M, Tensor))
        with without_autocast(like):
            return problem.pairs(A, B, X, iK)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        A, B, _, iK, ctx.problem = inputs
        E, X, T, Y, residual, scale = output
        ctx.mark_non_differentiable(T, Y, residual, scale)
        ctx.set_materialize_grads(False)
        save(ctx, A=A, B=B, iK=iK, E=E, X=X, T=T, Y=Y, residual=residual, scale=scale)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, gE: Optional[Tensor], gX: Optional[Tensor], *_: Any) -> Any:
        if gE is None and gX is None:
            return None, None, None, None, None
        pairs = _pairs(ctx)
        with without_autocast(pairs.X):
            gA, gB = ctx.problem.reverse(pairs, gE, gX, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return gA, gB, None, None, None

    @staticmethod
    @accepts_legacy_vmap
    def jvp(ctx: Any, dA: Optional[Tensor], dB: Optional[Tensor], _dX: Any, _diK: Any, _problem: Any) -> Any:
        refuse_nested_forward_mode()
        pairs = _pairs(ctx)
        if dA is None and dB is None:
            dE, dX = torch.zeros_like(pairs.E), torch.zeros_like(pairs.X)
        else:
            with without_autocast(pairs.X):
                dE, dX = ctx.problem.tangent(pairs, dA, dB)
        return dE, dX, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Tuple[Any, ...], A: Any, B: Any, X: Any, iK: Any, problem: Problem) -> Any:
        operands = mapped_operands(info.batch_size, in_dims, A, B, X, iK)
        return LOBPCGAutogradFunction.apply(*operands, problem), (0,) * 6


def mapped_operands(size: int, in_dims: Sequence[Any], *operands: Any) -> List[Any]:
    """A, B, X, iK with the mapped dimension as first batch dimension; A gets every batch dimension that another has."""
    tensors, deepest = batched_first(size, in_dims[:4], operands, trailing=(2, 2, 2, 2))
    A = tensors[0]
    mapped = [M for M, dim in zip(tensors, in_dims) if isinstance(M, Tensor) and dim is not None]
    # The forward takes its batch shape from A.
    if isinstance(A, Tensor) and in_dims[0] is None:
        A = A.expand((size,) + (1,) * (deepest - A.dim() + 2) + tuple(A.shape))
    if isinstance(A, Tensor):
        shapes = [M.shape[:-2] for M in [A] + mapped]
        A = A.expand(broadcast(*shapes) + list(A.shape[-2:]))
    return [A] + tensors[1:]


def _pairs(ctx: Any) -> ComputedPairs:
    problem = ctx.problem
    options = SolveOptions(problem.largest, problem.system_tol)
    return ComputedPairs(**saved(ctx), tol=problem.tol, options=options)
