"""lobpcg in graphs: operators for torch.compile, torch.export, make_fx, fake and meta tensors.

A tracer sees tensors without values, and both the iteration and the checks of a derivative decide by values.  So a
graph holds them as operators, which run what an eager call runs, its errors and warnings included:

    solve       matrices -> the pairs, and what a derivative needs besides
    reverse     pairs and cotangents gE, gX -> those of gA, gB that are needed
    tangent     pairs and tangents dA, dB -> dE, dX
    reverse_vjp, reverse_jvp, tangent_vjp, tangent_jvp      their derivatives: the second derivative
    lobpcg      torch.lobpcg as one node, for torch.compile; decomposes into solve

A graph with them in it can be differentiated where it is run, with values at hand, to any order; while it is traced, to
second order.
"""

import contextlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_autograd import (
    LOBPCGAutogradFunction,
    mapped_operands,
    may_be_differentiated,
    Problem,
    with_gradients,
)
from torch._lobpcg_complement import system_tolerance
from torch._lobpcg_derivative import ComputedPairs, forward_mode, reverse_mode
from torch._lobpcg_function import batched_first, broadcast, without_autocast
from torch._lobpcg_pattern import is_sparse
from torch._lobpcg_resolvent import SolveOptions
from torch.autograd import forward_ad, Function
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


def eigenpairs_in_graph(A: Any, B: Any, X: Any, iK: Any, settings: Tuple[Any, ...]) -> Tuple[Tensor, Tensor]:
    """E (*, k), X (*, m, k) as outputs of the operator solve.  A, B, X, iK: tensors or None;
    settings: the numbers that this operator takes.

    Raises NotImplementedError for a callable, and for a sparse matrix whose gradient is asked for: the number of its
    stored entries is a value.
    """
    for name, M in (("A", A), ("B", B), ("X", X), ("iK", iK)):
        if M is not None and not isinstance(M, Tensor):
            raise NotImplementedError(
                f"lobpcg: {name} is a callable, which a graph cannot hold; pass a tensor, or call lobpcg outside of "
                "what is traced"
            )
        if name in "AB" and M is not None and is_sparse(M) and M.requires_grad:
            raise NotImplementedError(
                f"lobpcg: {name} is sparse and requires a gradient, whose size a graph cannot know; pass a dense "
                "matrix, or call lobpcg outside of what is traced"
            )
    X, iK = (M.detach() if isinstance(M, Tensor) else M for M in (X, iK))
    return _operators.solve(A, B, X, iK, *settings)[:2]


def _apply(function: Any, *arguments: Any) -> Tuple[Tensor, ...]:
    """function.apply on the current level alone: inside an operator, the dispatcher takes the levels of torch.func."""
    functorch = torch._C._functorch
    allowed = functorch.get_single_level_autograd_function_allowed()
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        return super(Function, function).apply(*arguments)
    finally:
        functorch.set_single_level_autograd_function_allowed(allowed)


# Among the numbers of the operator solve, which are k, n, chosen, niter, tol, largest, method, iterate, differentiated.
_DIFFERENTIATED = 8


def _of_problem(settings: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """The arguments of Problem, without the first."""
    return settings[0], settings[5], settings[4], settings[_DIFFERENTIATED]


def _differentiated(settings: Tuple[Any, ...], A: Tensor, B: Optional[Tensor]) -> Tuple[Any, ...]:
    """The settings, told whether a derivative may be asked for."""
    known = settings[_DIFFERENTIATED] or may_be_differentiated(A, B)
    return (*settings[:_DIFFERENTIATED], known, *settings[_DIFFERENTIATED + 1 :])


class _Below:
    """Calls an operator from inside a Function's forward: below autograd on this level, and on the levels of torch.func
    beneath in the modes that the Function was applied in, which would otherwise lose their graph."""

    def __init__(self) -> None:
        self.grad, self.forward_ad = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def __call__(self, operator: Callable[..., Any], *arguments: Any) -> Any:
        with torch.set_grad_enabled(self.grad), forward_ad._set_fwd_grad_enabled(self.forward_ad):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)


class _GraphProblem(Problem):
    """The same problem, computed by operators.  `settings`: the numbers that the operator solve takes."""

    def __init__(self, settings: Tuple[Any, ...]) -> None:
        super().__init__(_operators.solve, *_of_problem(settings))
        self.settings, self.below = settings, _Below()

    def pairs(self, A: Any, B: Any, X: Optional[Tensor], iK: Any) -> Any:
        return self.below(_operators.solve, A, B, X, iK, *self.settings)

    def reverse(
        self, pairs: ComputedPairs, gE: Optional[Tensor], gX: Optional[Tensor], need_A: bool, need_B: bool
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        found = iter(_operators.reverse(*_tensors(pairs), gE, gX, pairs.largest, pairs.tol, [need_A, need_B]))
        return next(found) if need_A else None, next(found) if need_B else None

    def tangent(self, pairs: ComputedPairs, dA: Optional[Tensor], dB: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        dE, dX = _operators.tangent(*_tensors(pairs), dA, dB, pairs.largest, pairs.tol)
        return dE, dX


def _tensors(p: ComputedPairs) -> Tuple[Any, ...]:
    return p.A, p.B, p.iK, p.E, p.X, p.T, p.Y, p.residual, p.scale


# ----------------------------------------------------------------------------- derivatives as operators


_Formulas = Callable[..., Sequence[Tensor]]
_Shapes = List[Tuple[Sequence[int], torch.dtype]]


class _Derivative:
    """A derivative as an operator: tensors or None, then numbers -> tensors.

    trailing: for each tensor, how many of its dimensions are not batch.  compute: its formulas, differentiable.
    shapes: (shape, dtype) of each output.  vjp, jvp: the operators that are its own derivatives, or None.
    """

    def __init__(
        self,
        name: str,
        trailing: Tuple[int, ...],
        compute: _Formulas,
        shapes: Callable[..., _Shapes],
        vjp: Optional["_Derivative"] = None,
        jvp: Optional["_Derivative"] = None,
    ) -> None:
        self.name, self.trailing, self.compute, self.shapes = name, trailing, compute, shapes
        self.vjp, self.jvp = vjp, jvp

    def __call__(self, *arguments: Any) -> Tuple[Tensor, ...]:
        return tuple(getattr(_operators, self.name)(*arguments))


def _computed(tensors: Sequence[Any], largest: bool, tol: float) -> ComputedPairs:
    A, B, iK, E, X, T, Y, residual, scale = tensors
    system_tol = system_tolerance(E.detach(), X.detach(), T.detach(), residual[..., : E.shape[-1]].detach(), tol)
    options = SolveOptions(largest, system_tol)
    return ComputedPairs(A, B, E, X, T, Y, residual, scale, iK, tol, options)


def _reverse(*arguments: Any) -> List[Tensor]:
    gE, gX, largest, tol, needed = arguments[9:]
    pairs = _computed(arguments[:9], largest, tol)
    with without_autocast(pairs.X):
        return [g for g in reverse_mode(pairs, gE, gX, *needed) if g is not None]


def _reverse_shapes(*arguments: Any) -> _Shapes:
    return [(M.shape, M.dtype) for M, need in zip(arguments[:2], arguments[-1]) if need]


def _tangent(*arguments: Any) -> Tuple[Tensor, Tensor]:
    dA, dB, largest, tol = arguments[9:]
    with without_autocast(arguments[4]):
        return forward_mode(_computed(arguments[:9], largest, tol), dA, dB)


def _tangent_shapes(*arguments: Any) -> _Shapes:
    E, X, dA, dB = (arguments[i] for i in (3, 4, 9, 10))
    batch = broadcast(*[M.shape[:-2] for M in (X, dA, dB) if M is not None])
    return [(batch + list(E.shape[-1:]), E.dtype), (batch + list(X.shape[-2:]), X.dtype)]


def _vjp_shapes(*arguments: Any) -> _Shapes:
    return [(M.shape, M.dtype) for M, need in zip(arguments, arguments[-1]) if need]


# What the dispatcher leaves out at its beginning; below autograd it leaves out more.
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def _above_autograd() -> Any:
    """The dispatcher at its beginning again, for a kernel that differentiates inside."""
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _EXCLUDED)


def _vjp_of(compute: _Formulas) -> _Formulas:
    """(arguments of compute, in which two cotangents stand behind the tensors, then needed) -> their cotangents."""

    def vjp(*arguments: Any) -> List[Tensor]:
        tensors, cotangents, numbers = arguments[:11], arguments[11:13], arguments[13:-1]
        needed = arguments[-1]
        with _above_autograd(), torch.enable_grad():
            leaves: List[Any] = [
                M if M is None else M.detach().requires_grad_(need) for M, need in zip(tensors, needed)
            ]
            outputs = compute(*leaves, *numbers)
            pairs = [(o, h) for o, h in zip(outputs, cotangents) if h is not None and o.requires_grad]
            inputs = [leaf for leaf, need in zip(leaves, needed) if need]
            found: Sequence[Optional[Tensor]] = [None] * len(inputs)
            if pairs:
                outputs, cotangents = zip(*pairs)
                found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        return [torch.zeros_like(M) if g is None else g for g, M in zip(found, inputs)]

    return vjp


def _jvp_of(compute: _Formulas) -> _Formulas:
    """(arguments of compute, in which tangents of A, B, E, X and of the last two stand behind the tensors) -> tangents
    of the outputs."""

    def jvp(*arguments: Any) -> List[Tensor]:
        tensors, tangents, numbers = list(arguments[:11]), arguments[11:17], arguments[17:]
        # There is one level only: torch.func.jvp around a call that is traced with values has it open.
        level = contextlib.nullcontext() if forward_ad._current_level >= 0 else forward_ad.dual_level()
        with _above_autograd(), level, forward_ad._set_fwd_grad_enabled(True):
            for i, t in zip(_VARIABLE, tangents):
                if t is not None:
                    # Copies: a dual tensor must not be expanded.
                    tensors[i] = forward_ad.make_dual(_owned(tensors[i]), _owned(t))
            outputs = [forward_ad.unpack_dual(output) for output in compute(*tensors, *numbers)]
        return [torch.zeros_like(o.primal) if o.tangent is None else o.tangent for o in outputs]

    return jvp


def _jvp_shapes_of(shapes: Callable[..., _Shapes]) -> Callable[..., _Shapes]:
    return lambda *arguments: shapes(*arguments[:11], *arguments[17:])


_VARIABLE = (0, 1, 3, 4, 9, 10)
#          A  B  iK E  X  T  Y  residual, scale
_BATCHED = (2, 2, 2, 1, 2, 1, 2, 1, 1)


def _with_derivatives(
    name: str,
    last: Tuple[int, ...],
    of_outputs: Tuple[int, ...],
    compute: _Formulas,
    shapes: Callable[..., _Shapes],
) -> List[_Derivative]:
    """A derivative, its vjp and its jvp.  last: trailing dimensions of the two tensors behind the pairs."""
    tensors = _BATCHED + last
    vjp = _Derivative(name + "_vjp", tensors + of_outputs, _vjp_of(compute), _vjp_shapes)
    tangents = tuple(tensors[i] for i in _VARIABLE)
    jvp = _Derivative(name + "_jvp", tensors + tangents, _jvp_of(compute), _jvp_shapes_of(shapes))
    return [_Derivative(name, tensors, compute, shapes, vjp, jvp), vjp, jvp]


_DERIVATIVES = (
    *_with_derivatives("reverse", (1, 2), (2, 2), _reverse, _reverse_shapes),
    *_with_derivatives("tangent", (2, 2), (1, 2), _tangent, _tangent_shapes),
)


class _Derived(Function):
    """(below, derivative, its arguments) -> its outputs: the operator, with the operators that are its derivatives."""

    @staticmethod
    def forward(below: _Below, derivative: _Derivative, *arguments: Any) -> Tuple[Tensor, ...]:
        return below(derivative, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.derivative, *arguments = inputs
        ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.positions = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        tensors = [arguments[i] for i in ctx.positions]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        tensors, numbers = _arguments(ctx, ctx.derivative.vjp)
        if ctx.derivative.name == "reverse":
            # Outputs are those that are needed: put their cotangents where A's and B's are expected.
            given = iter(cotangents)
            cotangents = tuple(next(given) if need else None for need in numbers[-1])
        needed = list(ctx.needs_input_grad[2 : 2 + len(tensors)])
        found = iter(ctx.derivative.vjp(*tensors, *cotangents, *numbers, needed))
        return (None, None, *[next(found) if need else None for need in needed], *[None] * len(numbers))

    @staticmethod
    def jvp(ctx: Any, _below: Any, _derivative: Any, *tangents: Any) -> Any:
        tensors, numbers = _arguments(ctx, ctx.derivative.jvp)
        return ctx.derivative.jvp(*tensors, *[tangents[i] for i in _VARIABLE], *numbers)


def _arguments(ctx: Any, further: Optional[_Derivative]) -> Tuple[List[Any], List[Any]]:
    if further is None:
        raise NotImplementedError(
            "lobpcg: third derivatives cannot be traced into a graph; differentiate the traced function where it is "
            "run, or call lobpcg outside of it"
        )
    arguments = list(ctx.arguments)
    for i, tensor in zip(ctx.positions, ctx.saved_tensors):
        arguments[i] = tensor
    end = len(ctx.derivative.trailing)
    return arguments[:end], arguments[end:]


def _mapped_derivative(
    derivative: _Derivative, size: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> Tuple[List[Tensor], List[int]]:
    """The derivative of a batch of problems: the operator on batched arguments, then out_dims."""
    end = len(derivative.trailing)
    one = [a if dim is None else a.select(dim, 0) for a, dim in zip(arguments[:end], in_dims)]
    tensors, deepest = batched_first(size, in_dims[:end], arguments[:end], derivative.trailing)
    # Outputs have the batch dimensions of A, B, E or X, so each argument gets the mapped one.
    for i, (M, dim, trailing) in enumerate(zip(tensors, in_dims, derivative.trailing)):
        if isinstance(M, Tensor) and dim is None:
            M = M.reshape((1,) * (1 + deepest - M.dim() + trailing) + tuple(M.shape))
            tensors[i] = M.expand((size,) + tuple(M.shape[1:]))
    outputs = derivative(*tensors, *arguments[end:])
    shapes = derivative.shapes(*one, *arguments[end:])
    mapped = [output.reshape((size,) + tuple(shape)) for output, (shape, _) in zip(outputs, shapes)]
    return mapped, [0] * len(mapped)


# ------------------------------------------------------------------------------------------ registration

_PAIRS = "Tensor A, Tensor? B, Tensor? iK, Tensor E, Tensor X, Tensor T, Tensor Y, Tensor residual, Tensor scale"
_TANGENTS = "Tensor? tA, Tensor? tB, Tensor? tE, Tensor? tX"
_SETTINGS = (
    "SymInt k, SymInt n, SymInt chosen, SymInt niter, float tol, bool largest, str method, bool iterate, "
    "bool differentiated, str[] ortho_names, int[] ortho_values"
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
    "reverse_jvp": f"({_PAIRS}, Tensor? gE, Tensor? gX, {_TANGENTS}, Tensor? dgE, Tensor? dgX, bool largest, "
    "float tol, bool[] needed) -> Tensor[]",
    "tangent_jvp": f"({_PAIRS}, Tensor? dA, Tensor? dB, {_TANGENTS}, Tensor? ddA, Tensor? ddB, bool largest, "
    "float tol) -> Tensor[]",
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

    def solve(A: Any, B: Any, X: Any, iK: Any, *settings: Any) -> Tuple[Tensor, ...]:
        problem = Problem(solver(*settings), *_of_problem(settings))
        with torch.no_grad(), without_autocast(A):
            return problem.pairs(hermitian_part(A), hermitian_part(B), X, iK)

    def solve_differentiably(A: Any, B: Any, X: Any, iK: Any, *settings: Any) -> Tuple[Tensor, ...]:
        settings = _differentiated(settings, A, B)
        if _by_operators(A, B, X, iK):
            return _apply(LOBPCGAutogradFunction, A, B, X, iK, _GraphProblem(settings))
        problem = Problem(solver(*settings), *_of_problem(settings))
        return _apply(LOBPCGAutogradFunction, *with_gradients(hermitian_part(A), hermitian_part(B)), X, iK, problem)

    def solve_mapped(info: Any, in_dims: Sequence[Any], A: Any, B: Any, X: Any, iK: Any, *settings: Any) -> Any:
        return _operators.solve(*mapped_operands(info.batch_size, in_dims, A, B, X, iK), *settings), (0,) * 6

    def solve_without_values(A: Tensor, B: Any, X: Any, iK: Any, *settings: Any) -> Tuple[Tensor, ...]:
        batch, found, n = sizes(A, B, X, iK, *settings)
        k, m = settings[0], A.shape[-1]
        found = found if settings[_DIFFERENTIATED] else k
        E, T, residual, scale = (_empty(A, batch + [p], A.dtype.to_real()) for p in (k, found - k, n, n))
        X, Y = (_empty(A, batch + [m, p], A.dtype) for p in (k, found - k))
        return E, X, T, Y, residual, scale

    _define("lobpcg", {"CompositeImplicitAutograd": call, "FuncTorchBatchedDecomposition": call})
    _define_differentiable("solve", solve, solve_without_values, solve_differentiably, solve_mapped)
    for derivative in _DERIVATIVES:
        _define_derivative(derivative, hermitian_part)


def _define_derivative(derivative: _Derivative, hermitian_part: Callable[[Any], Any]) -> None:
    def compute(A: Any, B: Any, *others: Any) -> Sequence[Tensor]:
        return derivative.compute(hermitian_part(A), hermitian_part(B), *others)

    def values(*arguments: Any) -> List[Tensor]:
        with torch.no_grad():
            return [_owned(output) for output in compute(*arguments)]

    def without_values(*arguments: Any) -> List[Tensor]:
        return [_empty(arguments[0], shape, dtype) for shape, dtype in derivative.shapes(*arguments)]

    def differentiable(*arguments: Any) -> List[Tensor]:
        if _by_operators(*arguments):
            return list(_apply(_Derived, _Below(), derivative, *arguments))
        return list(compute(*arguments))

    def mapped(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        return _mapped_derivative(derivative, info.batch_size, in_dims, arguments)

    _define_differentiable(derivative.name, values, without_values, differentiable, mapped)


def _by_operators(*arguments: Any) -> bool:
    """Whether a kernel has to call operators: values, and the formulas' own derivatives, are out of its reach."""
    return torch._C._are_functorch_transforms_active() or is_traced(*arguments)


def _define_differentiable(
    name: str,
    values: Callable[..., Any],
    without_values: Callable[..., Any],
    differentiable: Callable[..., Any],
    mapped: Callable[..., Any],
) -> None:
    def by_vmap(*arguments: Any) -> Any:
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, mapped, getattr(_operators, name), *arguments)

    kernels = {"CompositeExplicitAutograd": values, "Autograd": differentiable, "FuncTorchBatched": by_vmap}
    _define(name, {**kernels, **dict.fromkeys(("Meta", "SparseMeta", "SparseCsrMeta"), without_values)})


def _define(name: str, kernels: Dict[str, Callable[..., Any]]) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _owned(T: Tensor) -> Tensor:
    """T as an operator's output: contiguous, an alias of nothing."""
    return T.detach().clone(memory_format=torch.contiguous_format)
