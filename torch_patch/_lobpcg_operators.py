"""lobpcg in graphs: operators for torch.compile, torch.export, make_fx, fake and meta tensors.

A tracer sees tensors without values, and both the iteration and the checks of a derivative decide by values.  So a graph
holds them as operators, which run what an eager call runs, its errors and warnings included:

    solve       matrices -> the pairs, and what a derivative needs besides
    reverse     pairs and cotangents gE, gX -> those of gA, gB that are needed
    tangent     pairs and tangents dA, dB -> dE, dX
    reverse_vjp, tangent_vjp    cotangents of the arguments of reverse and tangent: the second derivative
    lobpcg      torch.lobpcg as one node, for torch.compile; decomposes into solve

A graph with them in it can be differentiated where it is run, with values at hand, to any order.  While it is traced,
first derivatives in both modes, and reverse mode over either.
"""

from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_autograd import LOBPCGAutogradFunction, Problem
from torch._lobpcg_derivative import ComputedPairs, forward_mode, reverse_mode
from torch._lobpcg_function import batched_first, broadcast, without_autocast
from torch._lobpcg_pattern import is_sparse
from torch.autograd import Function
from torch.library import Library


_operators = torch.ops._lobpcg


def is_traced(*operands: Any) -> bool:
    """Whether a call is recorded or has no values: a tracing mode, fake, functional or meta tensors."""
    if torch._C._len_torch_dispatch_stack():
        keys = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
            return True
    for M in operands:
        if not isinstance(M, Tensor):
            continue
        while torch._C._functorch.is_functorch_wrapped_tensor(M):
            M = torch._C._functorch.get_unwrapped(M)
        if M.is_meta or getattr(type(M), "_mode_key", None) is not None:
            return True
    return False


def eigenpairs_in_graph(A, B, X, iK, settings: tuple, k: int, largest: bool, tol: float) -> Tuple[Tensor, Tensor]:
    """E (*, k), X (*, m, k) as outputs of the operator solve.  A, B, X, iK: tensors or None.

    Raises NotImplementedError for a callable, and for a sparse matrix whose gradient is asked for: the number of its
    stored entries is a value.
    """
    for name, M in (("A", A), ("B", B), ("X", X), ("iK", iK)):
        if M is not None and not isinstance(M, Tensor):
            raise NotImplementedError(
                f"lobpcg: {name} is a callable, which a graph cannot hold; pass a tensor, or call lobpcg outside of "
                "what is traced"
            )
        if name in "AB" and is_sparse(M) and M.requires_grad:
            raise NotImplementedError(
                f"lobpcg: {name} is sparse and requires a gradient, whose size a graph cannot know; pass a dense "
                "matrix, or call lobpcg outside of what is traced"
            )
    X, iK = (M.detach() if isinstance(M, Tensor) else M for M in (X, iK))
    return LOBPCGAutogradFunction.apply(A, B, X, iK, _GraphProblem(settings, k, largest, tol))[:2]


class _GraphProblem(Problem):
    """The same problem, computed by operators.  `settings`: the numbers that the operator solve takes."""

    def __init__(self, settings: tuple, k: int, largest: bool, tol: float) -> None:
        super().__init__(None, k, largest, tol)
        self.settings = settings

    def pairs(self, A, B, X, iK):
        with torch._C._AutoDispatchBelowAutograd():
            return _operators.solve(A, B, X, iK, *self.settings)

    def reverse(self, pairs, gE, gX, need_A, need_B):
        found = iter(_Derived.apply(_REVERSE, *_tensors(pairs), gE, gX, pairs.largest, pairs.tol, [need_A, need_B]))
        return next(found) if need_A else None, next(found) if need_B else None

    def tangent(self, pairs, dA, dB):
        return _Derived.apply(_TANGENT, *_tensors(pairs), dA, dB, pairs.largest, pairs.tol)


def _tensors(p: ComputedPairs) -> tuple:
    return p.A, p.B, p.iK, p.E, p.X, p.T, p.Y, p.residual, p.scale


# ----------------------------------------------------------------------------- derivatives as operators


class _Derivative:
    """A derivative as an operator: tensors or None, then numbers -> tensors.

    trailing: for each tensor, how many of its dimensions are not batch.  compute: its formulas, differentiable.
    shapes: (shape, dtype) of each output.  vjp: the operator that is its own derivative, or None.
    """

    def __init__(self, name: str, trailing: tuple, compute, shapes, vjp: Optional["_Derivative"] = None) -> None:
        self.name, self.trailing, self.compute, self.shapes, self.vjp = name, trailing, compute, shapes, vjp

    def __call__(self, *arguments):
        return tuple(getattr(_operators, self.name)(*arguments))


def _reverse(A, B, iK, E, X, T, Y, residual, scale, gE, gX, largest, tol, needed):
    pairs = ComputedPairs(A, B, E, X, T, Y, residual, scale, iK, largest, tol)
    with without_autocast(X):
        return [g for g in reverse_mode(pairs, gE, gX, *needed) if g is not None]


def _reverse_shapes(*arguments):
    return [(M.shape, M.dtype) for M, need in zip(arguments[:2], arguments[-1]) if need]


def _tangent(A, B, iK, E, X, T, Y, residual, scale, dA, dB, largest, tol):
    with without_autocast(X):
        return forward_mode(ComputedPairs(A, B, E, X, T, Y, residual, scale, iK, largest, tol), dA, dB)


def _tangent_shapes(A, B, iK, E, X, T, Y, residual, scale, dA, dB, largest, tol):
    batch = broadcast(*[M.shape[:-2] for M in (X, dA, dB) if M is not None])
    return [(batch + list(E.shape[-1:]), E.dtype), (batch + list(X.shape[-2:]), X.dtype)]


def _vjp_shapes(*arguments):
    return [(M.shape, M.dtype) for M, need in zip(arguments, arguments[-1]) if need]


def _vjp_of(compute):
    """(arguments of compute, in which two cotangents stand behind the tensors, then needed) -> their cotangents."""

    def vjp(*arguments):
        tensors, cotangents, numbers = arguments[:11], arguments[11:13], arguments[13:-1]
        needed = arguments[-1]
        with torch.enable_grad():
            leaves = [M if M is None else M.detach().requires_grad_(need) for M, need in zip(tensors, needed)]
            outputs = compute(*leaves, *numbers)
            pairs = [(o, h) for o, h in zip(outputs, cotangents) if h is not None and o.requires_grad]
            inputs = [leaf for leaf, need in zip(leaves, needed) if need]
            found = [None] * len(inputs)
            if pairs:
                outputs, cotangents = zip(*pairs)
                found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        return [torch.zeros_like(M) if g is None else g for g, M in zip(found, inputs)]

    return vjp


#          A  B  iK E  X  T  Y  residual, scale
_BATCHED = (2, 2, 2, 1, 2, 1, 2, 1, 1)
_REVERSE_VJP = _Derivative("reverse_vjp", _BATCHED + (1, 2, 2, 2), _vjp_of(_reverse), _vjp_shapes)
_TANGENT_VJP = _Derivative("tangent_vjp", _BATCHED + (2, 2, 1, 2), _vjp_of(_tangent), _vjp_shapes)
_REVERSE = _Derivative("reverse", _BATCHED + (1, 2), _reverse, _reverse_shapes, _REVERSE_VJP)
_TANGENT = _Derivative("tangent", _BATCHED + (2, 2), _tangent, _tangent_shapes, _TANGENT_VJP)


class _Derived(Function):
    """(derivative, its arguments) -> its outputs, while traced: the operator, with the operator for its vjp."""

    @staticmethod
    def forward(derivative, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return derivative(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.derivative, arguments = inputs[0], inputs[1:]
        ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.positions = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        ctx.save_for_backward(*[arguments[i] for i in ctx.positions])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        derivative, arguments = ctx.derivative, list(ctx.arguments)
        if derivative.vjp is None:
            raise NotImplementedError(
                "lobpcg: third derivatives cannot be traced into a graph; differentiate the traced function where it "
                "is run, or call lobpcg outside of it"
            )
        for i, tensor in zip(ctx.positions, ctx.saved_tensors):
            arguments[i] = tensor
        end = len(derivative.trailing)
        needed = list(ctx.needs_input_grad[1 : 1 + end])
        tensors, numbers = arguments[:end], arguments[end:]
        if derivative.name == "reverse":
            # Outputs are those that are needed: put their cotangents where A's and B's are expected.
            given = iter(cotangents)
            cotangents = [next(given) if need else None for need in numbers[-1]]
        found = iter(_Derived.apply(derivative.vjp, *tensors, *cotangents, *numbers, needed))
        return (None, *[next(found) if need else None for need in needed], *[None] * len(numbers))

    @staticmethod
    def vmap(info, in_dims, derivative, *arguments):
        end, size = len(derivative.trailing), info.batch_size
        in_dims = in_dims[1 : 1 + end]
        one = [a if dim is None else a.select(dim, 0) for a, dim in zip(arguments[:end], in_dims)]
        tensors, deepest = batched_first(size, in_dims, arguments[:end], derivative.trailing)
        # Outputs have the batch dimensions of A, B, E or X, so each argument gets the mapped one.
        for i, (M, dim, trailing) in enumerate(zip(tensors, in_dims, derivative.trailing)):
            if isinstance(M, Tensor) and dim is None:
                M = M.reshape((1,) * (1 + deepest - M.dim() + trailing) + tuple(M.shape))
                tensors[i] = M.expand((size,) + tuple(M.shape[1:]))
        outputs = _Derived.apply(derivative, *tensors, *arguments[end:])
        shapes = derivative.shapes(*one, *arguments[end:])
        outputs = tuple(output.reshape((size,) + tuple(shape)) for output, (shape, _) in zip(outputs, shapes))
        return outputs, (0,) * len(outputs)


# ------------------------------------------------------------------------------------------ registration

_PAIRS = "Tensor A, Tensor? B, Tensor? iK, Tensor E, Tensor X, Tensor T, Tensor Y, Tensor residual, Tensor scale"
_SETTINGS = (
    "SymInt k, SymInt n, SymInt chosen, SymInt niter, float tol, bool largest, str method, bool iterate, "
    "str[] ortho_names, int[] ortho_values"
)
_SCHEMAS = {
    "lobpcg": "(Tensor A, SymInt? k, Tensor? B, Tensor? X, SymInt? n, Tensor? iK, SymInt? niter, float? tol, "
    "bool? largest, str? method, str[] ortho_names, int[] ortho_values) -> (Tensor, Tensor)",
    "solve": f"(Tensor A, Tensor? B, Tensor? X, Tensor? iK, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "reverse": f"({_PAIRS}, Tensor? gE, Tensor? gX, bool largest, float tol, bool[] needed) -> Tensor[]",
    "tangent": f"({_PAIRS}, Tensor? dA, Tensor? dB, bool largest, float tol) -> Tensor[]",
    "reverse_vjp": f"({_PAIRS}, Tensor? gE, Tensor? gX, Tensor? hA, Tensor? hB, bool largest, float tol, "
    "bool[] of_reverse, bool[] needed) -> Tensor[]",
    "tangent_vjp": f"({_PAIRS}, Tensor? dA, Tensor? dB, Tensor? hE, Tensor? hX, bool largest, float tol, "
    "bool[] needed) -> Tensor[]",
}
_library = Library("_lobpcg", "DEF")


def define_operators(
    call: Callable[..., Any],
    solver: Callable[..., Callable[..., Any]],
    sizes: Callable[..., Tuple[List[int], int, int]],
    hermitian_part: Callable[[Any], Any],
) -> None:
    """Register the operators, once, at import.

    call(A, k, B, X, n, iK, niter, tol, largest, method, ortho_names, ortho_values): torch.lobpcg.
    solver(*settings): the function (A, B, X, iK) -> pairs that these settings ask for.
    sizes(A, B, X, iK, *settings): the batch shape, how many pairs that function returns, and how many residuals.
    """

    def problem(settings):
        return Problem(solver(*settings), settings[0], settings[5], settings[4])

    def solve(A, B, X, iK, *settings):
        with torch.no_grad(), without_autocast(A):
            return problem(settings).pairs(hermitian_part(A), hermitian_part(B), X, iK)

    def solve_differentiably(A, B, X, iK, *settings):
        if is_traced(A, B, X, iK):
            graph = _GraphProblem(settings, settings[0], settings[5], settings[4])
            return LOBPCGAutogradFunction.apply(A, B, X, iK, graph)
        return LOBPCGAutogradFunction.apply(hermitian_part(A), hermitian_part(B), X, iK, problem(settings))

    def solve_without_values(A, B, X, iK, *settings):
        batch, found, n = sizes(A, B, X, iK, *settings)
        k, m = settings[0], A.shape[-1]
        E, T, residual, scale = (_empty(A, batch + [p], A.dtype.to_real()) for p in (k, found - k, n, n))
        X, Y = (_empty(A, batch + [m, p], A.dtype) for p in (k, found - k))
        return E, X, T, Y, residual, scale

    _define("lobpcg", {"CompositeImplicitAutograd": call})
    _define("solve", {"CompositeExplicitAutograd": solve, "Autograd": solve_differentiably, "Meta": solve_without_values})
    for derivative in (_REVERSE, _TANGENT, _REVERSE_VJP, _TANGENT_VJP):
        _define_derivative(derivative, hermitian_part)


def _define_derivative(derivative: _Derivative, hermitian_part: Callable[[Any], Any]) -> None:
    def compute(A, B, *others):
        return derivative.compute(hermitian_part(A), hermitian_part(B), *others)

    def values(*arguments):
        with torch.no_grad():
            return [_owned(output) for output in compute(*arguments)]

    def differentiable(*arguments):
        if is_traced(*arguments):
            return list(_Derived.apply(derivative, *arguments))
        return list(compute(*arguments))

    def without_values(*arguments):
        return [_empty(arguments[0], shape, dtype) for shape, dtype in derivative.shapes(*arguments)]

    _define(derivative.name, {"CompositeExplicitAutograd": values, "Autograd": differentiable, "Meta": without_values})


def _define(name: str, kernels) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)


def _empty(like: Tensor, shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _owned(T: Tensor) -> Tensor:
    """T as an operator's output: contiguous, an alias of nothing."""
    return T.detach().clone(memory_format=torch.contiguous_format)
