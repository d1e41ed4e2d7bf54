"""lobpcg in graphs: operators for torch.compile, torch.export, make_fx, TorchScript, fake and meta tensors.

A tracer sees tensors without values, and both the iteration and the checks of a derivative decide by values.  So a
graph holds them as operators, which run what an eager call runs, its errors and warnings included:

    solve       matrices -> the pairs, and what a derivative needs besides
    reverse     pairs and cotangents gE, gX -> those of gA, gB that are needed
    tangent     pairs and tangents dA, dB -> dE, dX
    reverse_vjp, reverse_jvp, tangent_vjp, tangent_jvp      their derivatives: the second derivative
    lobpcg      torch.lobpcg as one node, for TorchScript

All but the last take the fields of Options as keywords.  A graph with them in it can be differentiated where it is run,
with values at hand, to any order; while it is traced, to second order.
"""

import contextlib
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
)

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import batch_shape, Options
from torch._lobpcg_impl.derivative import forward_mode, reverse_mode
from torch._lobpcg_impl.operand import hermitian_part, Pencil
from torch._lobpcg_impl.pairs import Pairs
from torch._lobpcg_impl.solver import dense_is_cheaper
from torch._lobpcg_impl.sparse import is_sparse
from torch._lobpcg_impl.transforms import (
    batched_first,
    broadcast,
    in_transform,
    without_autocast,
)
from torch.autograd import forward_ad, Function
from torch.library import Library


_operators = torch.ops._lobpcg
_functorch = torch._C._functorch


def is_traced(*operands: Any) -> bool:
    """Whether a call is recorded or has no values: a tracing mode, fake, functional or meta tensors."""
    if torch._C._len_torch_dispatch_stack():
        keys = torch._C._TorchDispatchModeKey
        if any(
            torch._C._get_dispatch_mode(key) is not None
            for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)
        ):
            return True
    for M in operands:
        if not isinstance(M, Tensor):
            continue
        while _functorch.is_functorch_wrapped_tensor(M):
            M = _functorch.get_unwrapped(M)
        if M.is_meta or getattr(type(M), "_mode_key", None) is not None:
            return True
    return False


def eigenpairs_in_graph(
    A: Any, B: Any, X: Any, iK: Any, options: Options
) -> Tuple[Tensor, Tensor]:
    """E (*, k), X (*, m, k) as outputs of the operator solve.

    Raises NotImplementedError for a callable, a tracker, and a sparse matrix whose gradient is asked for: the number of
    its stored entries is a value.
    """
    if options.tracker is not None:
        raise NotImplementedError(
            "lobpcg: a tracker looks at values, which do not exist while a graph is traced; leave it out, or call "
            "lobpcg outside of what is traced"
        )
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
    return _operators.solve(A, B, X, iK, **options.numbers())[:2]


def may_be_differentiated(*operands: Any) -> bool:
    """Whether autograd records, or a transform is active (which may be vmap alone)."""
    recorded = torch.is_grad_enabled() and any(
        isinstance(M, Tensor) and M.requires_grad for M in operands
    )
    return recorded or in_transform()


def _apply(function: Any, *arguments: Any) -> Tuple[Tensor, ...]:
    """function.apply on the current level alone: inside an operator, the dispatcher takes the levels of torch.func."""
    allowed = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        return super(Function, function).apply(*arguments)
    finally:
        _functorch.set_single_level_autograd_function_allowed(allowed)


class _Below:
    """Calls an operator from inside a Function's forward: below autograd on this level, and on the levels of torch.func
    beneath in the modes that the Function was applied in, which would otherwise lose their graph."""

    def __init__(self) -> None:
        self.grad, self.forward_ad = (
            torch.is_grad_enabled(),
            torch._C._is_fwd_grad_enabled(),
        )

    def __call__(
        self, operator: Callable[..., Any], *arguments: Any, **numbers: Any
    ) -> Any:
        with torch.set_grad_enabled(self.grad), forward_ad._set_fwd_grad_enabled(
            self.forward_ad
        ):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments, **numbers)


class EigenpairsInGraph(Function):
    """(below, numbers, A, B, X, iK) -> E, X, T, Y, residual, scale: LOBPCGAutogradFunction made of operators."""

    @staticmethod
    def forward(
        below: _Below, numbers: Dict[str, Any], A: Any, B: Any, X: Any, iK: Any
    ) -> Any:
        return below(_operators.solve, A, B, X, iK, **numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.numbers, A, B, _, iK = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        tensors = (A, B, iK, *output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, gE: Optional[Tensor], gX: Optional[Tensor], *_: Any) -> Any:
        if gE is None and gX is None:
            return (None,) * 6
        needed = list(ctx.needs_input_grad[2:4])
        found = iter(
            _operators.reverse(*ctx.saved_tensors, gE, gX, needed=needed, **ctx.numbers)
        )
        gA, gB = (next(found) if need else None for need in needed)
        return None, None, gA, gB, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        _below: Any,
        _numbers: Any,
        dA: Optional[Tensor],
        dB: Optional[Tensor],
        *_: Any,
    ) -> Any:
        if dA is None and dB is None:
            E, X = ctx.saved_tensors[3:5]
            dE, dX = torch.zeros_like(E), torch.zeros_like(X)
        else:
            dE, dX = _operators.tangent(*ctx.saved_tensors, dA, dB, **ctx.numbers)
        return dE, dX, None, None, None, None


# ----------------------------------------------------------------------------- derivatives as operators


class _Reverse(NamedTuple):
    """Tensors of the operator reverse."""

    A: Tensor
    B: Optional[Tensor]
    iK: Optional[Tensor]
    E: Tensor
    X: Tensor
    T: Tensor
    Y: Tensor
    residual: Tensor
    scale: Tensor
    gE: Optional[Tensor]
    gX: Optional[Tensor]


class _Tangent(NamedTuple):
    """Tensors of the operator tangent."""

    A: Tensor
    B: Optional[Tensor]
    iK: Optional[Tensor]
    E: Tensor
    X: Tensor
    T: Tensor
    Y: Tensor
    residual: Tensor
    scale: Tensor
    dA: Optional[Tensor]
    dB: Optional[Tensor]


# Trailing dimensions of each tensor that are not batch.
_TRAILING = dict(
    A=2, B=2, iK=2, E=1, X=2, T=1, Y=2, residual=1, scale=1, gE=1, gX=2, dA=2, dB=2
)
_Shapes = List[Tuple[Sequence[int], torch.dtype]]


def _pairs(tensors: Any, numbers: Dict[str, Any]) -> Pairs:
    A, B, iK, *found = tensors[:9]
    pencil = Pencil.of(hermitian_part(A), hermitian_part(B), iK, None)
    return Pairs(pencil, Options.of_numbers(**numbers), *found)


def _reverse(tensors: _Reverse, needed: List[bool], **numbers: Any) -> List[Tensor]:
    pairs = _pairs(tensors, numbers)
    with without_autocast(pairs.X):
        gA, gB = reverse_mode(pairs, tensors.gE, tensors.gX, *needed)
    return [g for g in (*gA, *gB) if g is not None]


def _reverse_shapes(tensors: _Reverse, needed: List[bool], **_: Any) -> _Shapes:
    return [
        (M.shape, M.dtype)
        for M, need in zip((tensors.A, tensors.B), needed)
        if need and M is not None
    ]


def _tangent(tensors: _Tangent, **numbers: Any) -> Tuple[Tensor, Tensor]:
    pairs = _pairs(tensors, numbers)
    with without_autocast(pairs.X):
        return forward_mode(
            pairs, (tensors.dA,), () if tensors.B is None else (tensors.dB,)
        )


def _tangent_shapes(tensors: _Tangent, **_: Any) -> _Shapes:
    E, X = tensors.E, tensors.X
    batch = broadcast(
        *[M.shape[:-2] for M in (X, tensors.dA, tensors.dB) if M is not None]
    )
    return [
        (batch + list(E.shape[-1:]), E.dtype),
        (batch + list(X.shape[-2:]), X.dtype),
    ]


class _Formula(NamedTuple):
    """A derivative as formulas: what its tensors are called, compute(tensors, numbers), the shapes of its outputs, and
    the trailing dimensions of these."""

    fields: Type[Any]
    compute: Callable[..., Sequence[Tensor]]
    shapes: Callable[..., _Shapes]
    outputs: Tuple[int, int]

    @property
    def trailing(self) -> List[int]:
        return [_TRAILING[name] for name in self.fields._fields]

    @property
    def variables(self) -> List[str]:
        """The tensors that are differentiated: the others are constants of the backward solve."""
        return [
            name
            for name in self.fields._fields
            if name not in ("iK", "T", "Y", "residual", "scale")
        ]

    def split(self, tensors: Sequence[Any]) -> Tuple[Any, Sequence[Any]]:
        """The tensors by name, and what stands behind them."""
        count = len(self.fields._fields)
        return self.fields(*tensors[:count]), tensors[count:]


_FORMULAS = {
    "reverse": _Formula(_Reverse, _reverse, _reverse_shapes, (2, 2)),
    "tangent": _Formula(_Tangent, _tangent, _tangent_shapes, (1, 2)),
}


class _Operator:
    """One of the operators of derivatives: tensors or None -> tensors.

    trailing: for each tensor, how many of its dimensions are not batch.  compute: its formulas, differentiable.
    shapes: (shape, dtype) of each output.  of: the formula that it is, or is the derivative of.
    """

    def __init__(
        self, name: str, trailing: List[int], compute: Any, shapes: Any, of: _Formula
    ) -> None:
        self.name, self.trailing, self.compute, self.shapes, self.of = (
            name,
            trailing,
            compute,
            shapes,
            of,
        )

    def __call__(self, *tensors: Any, **numbers: Any) -> Tuple[Tensor, ...]:
        return tuple(getattr(_operators, self.name)(*tensors, **numbers))


# What the dispatcher leaves out at its beginning; below autograd it leaves out more.
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def _above_autograd() -> Any:
    """The dispatcher at its beginning again, for a kernel that differentiates inside."""
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), _EXCLUDED
    )


def _vjp(formula: _Formula) -> Callable[..., List[Tensor]]:
    """(tensors of the formula, then two cotangents; wanted: whose cotangents) -> those."""

    def vjp(*arguments: Any, wanted: List[bool], **numbers: Any) -> List[Tensor]:
        tensors, cotangents = formula.split(arguments)
        with _above_autograd(), torch.enable_grad():
            leaves = [
                M if M is None else M.detach().requires_grad_(need)
                for M, need in zip(tensors, wanted)
            ]
            outputs = formula.compute(formula.fields(*leaves), **numbers)
            if "needed" in numbers:
                cotangents = [
                    h for h, need in zip(cotangents, numbers["needed"]) if need
                ]
            pairs = [
                (o, h)
                for o, h in zip(outputs, cotangents)
                if h is not None and o.requires_grad
            ]
            inputs: List[Tensor] = [
                leaf for leaf, need in zip(leaves, wanted) if need and leaf is not None
            ]
            found: Sequence[Optional[Tensor]] = [None] * len(inputs)
            if pairs:
                outputs, cotangents = zip(*pairs)
                found = torch.autograd.grad(
                    outputs, inputs, cotangents, allow_unused=True
                )
        return [torch.zeros_like(M) if g is None else g for g, M in zip(found, inputs)]

    return vjp


def _vjp_shapes(*arguments: Any, wanted: List[bool], **_: Any) -> _Shapes:
    return [(M.shape, M.dtype) for M, need in zip(arguments, wanted) if need]


def _jvp(formula: _Formula) -> Callable[..., List[Tensor]]:
    """(tensors of the formula, then tangents of its variables) -> tangents of the outputs."""

    def jvp(*arguments: Any, **numbers: Any) -> List[Tensor]:
        tensors, tangents = formula.split(arguments)
        # There is one level only: torch.func.jvp around a call that is traced with values has it open.
        level = (
            contextlib.nullcontext()
            if forward_ad._current_level >= 0
            else forward_ad.dual_level()
        )
        with _above_autograd(), level, forward_ad._set_fwd_grad_enabled(True):
            # Copies: a dual tensor must not be expanded.
            duals = {
                name: forward_ad.make_dual(_owned(getattr(tensors, name)), _owned(t))
                for name, t in zip(formula.variables, tangents)
                if t is not None
            }
            outputs = formula.compute(tensors._replace(**duals), **numbers)
            unpacked = [forward_ad.unpack_dual(output) for output in outputs]
        return [
            torch.zeros_like(o.primal) if o.tangent is None else o.tangent
            for o in unpacked
        ]

    return jvp


def _operators_of(name: str, formula: _Formula) -> List[_Operator]:
    """The formula as an operator, its vjp and its jvp."""

    def compute(*tensors: Any, **numbers: Any) -> Sequence[Tensor]:
        return formula.compute(formula.fields(*tensors), **numbers)

    def shapes(*tensors: Any, **numbers: Any) -> _Shapes:
        return formula.shapes(formula.split(tensors)[0], **numbers)

    trailing = formula.trailing
    tangents = [_TRAILING[variable] for variable in formula.variables]
    return [
        _Operator(name, trailing, compute, shapes, formula),
        _Operator(
            name + "_vjp",
            trailing + list(formula.outputs),
            _vjp(formula),
            _vjp_shapes,
            formula,
        ),
        _Operator(name + "_jvp", trailing + tangents, _jvp(formula), shapes, formula),
    ]


_DERIVATIVES = {
    operator.name: operator
    for name, f in _FORMULAS.items()
    for operator in _operators_of(name, f)
}


class _Derived(Function):
    """(below, operator, numbers, its tensors) -> its outputs, with the operators that are its derivatives."""

    @staticmethod
    def forward(
        below: _Below, operator: _Operator, numbers: Dict[str, Any], *tensors: Any
    ) -> Tuple[Tensor, ...]:
        return below(operator, *tensors, **numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.operator, ctx.numbers, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        vjp, tensors = _derivative_of(ctx.operator, "vjp"), ctx.saved_tensors
        if "needed" in ctx.numbers:
            # Outputs are those that are needed: put their cotangents where A's and B's are expected.
            given = iter(cotangents)
            cotangents = tuple(
                next(given) if need else None for need in ctx.numbers["needed"]
            )
        wanted = list(ctx.needs_input_grad[3:])
        found = iter(vjp(*tensors, *cotangents, wanted=wanted, **ctx.numbers))
        return (None, None, None, *[next(found) if need else None for need in wanted])

    @staticmethod
    def jvp(
        ctx: Any, _below: Any, _operator: Any, _numbers: Any, *tangents: Any
    ) -> Any:
        jvp, of = _derivative_of(ctx.operator, "jvp"), ctx.operator.of
        given = of.fields(*tangents)
        return jvp(
            *ctx.saved_tensors,
            *[getattr(given, name) for name in of.variables],
            **ctx.numbers,
        )


def _derivative_of(operator: _Operator, kind: str) -> _Operator:
    if operator.name not in _FORMULAS:
        raise NotImplementedError(
            "lobpcg: third derivatives cannot be traced into a graph; differentiate the traced function where it is "
            "run, or call lobpcg outside of it"
        )
    return _DERIVATIVES[f"{operator.name}_{kind}"]


def _mapped_derivative(
    operator: _Operator,
    size: int,
    in_dims: Sequence[Any],
    tensors: Sequence[Any],
    numbers: Dict[str, Any],
) -> Tuple[List[Tensor], List[int]]:
    """The derivative of a batch of problems: the operator on batched tensors, then out_dims."""
    one = [a if dim is None else a.select(dim, 0) for a, dim in zip(tensors, in_dims)]
    mapped, deepest = batched_first(size, in_dims, tensors, operator.trailing)
    # Outputs have the batch dimensions of A, B, E or X, so each tensor gets the mapped one.
    for i, (M, dim, trailing) in enumerate(zip(mapped, in_dims, operator.trailing)):
        if isinstance(M, Tensor) and dim is None:
            M = M.reshape((1,) * (1 + deepest - M.dim() + trailing) + tuple(M.shape))
            mapped[i] = M.expand((size,) + tuple(M.shape[1:]))
    outputs, shapes = operator(*mapped, **numbers), operator.shapes(*one, **numbers)
    outputs = tuple(
        output.reshape((size,) + tuple(shape))
        for output, (shape, _) in zip(outputs, shapes)
    )
    return list(outputs), [0] * len(outputs)


# ------------------------------------------------------------------------------------------ registration

_PAIRS = "Tensor A, Tensor? B, Tensor? iK, Tensor E, Tensor X, Tensor T, Tensor Y, Tensor residual, Tensor scale"
_TANGENTS = "Tensor? tA, Tensor? tB, Tensor? tE, Tensor? tX"
_NUMBERS = (
    "SymInt k, SymInt n, SymInt chosen, SymInt niter, float tol, bool largest, str method, bool iterate, "
    "bool differentiated, bool accurate, str[] ortho_names, int[] ortho_values"
)
_SCHEMAS = {
    "lobpcg": "(Tensor A, SymInt? k, Tensor? B, Tensor? X, SymInt? n, Tensor? iK, SymInt? niter, float? tol, "
    "bool? largest, str? method, *, Dict(str, int)? ortho_iparams) -> (Tensor, Tensor)",
    "solve": f"(Tensor A, Tensor? B, Tensor? X, Tensor? iK, *, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "reverse": f"({_PAIRS}, Tensor? gE, Tensor? gX, *, bool[] needed, {_NUMBERS}) -> Tensor[]",
    "tangent": f"({_PAIRS}, Tensor? dA, Tensor? dB, *, {_NUMBERS}) -> Tensor[]",
    "reverse_vjp": f"({_PAIRS}, Tensor? gE, Tensor? gX, Tensor? hA, Tensor? hB, *, bool[] wanted, bool[] needed, "
    f"{_NUMBERS}) -> Tensor[]",
    "tangent_vjp": f"({_PAIRS}, Tensor? dA, Tensor? dB, Tensor? hE, Tensor? hX, *, bool[] wanted, {_NUMBERS})"
    " -> Tensor[]",
    "reverse_jvp": f"({_PAIRS}, Tensor? gE, Tensor? gX, {_TANGENTS}, Tensor? tgE, Tensor? tgX, *, bool[] needed, "
    f"{_NUMBERS}) -> Tensor[]",
    "tangent_jvp": f"({_PAIRS}, Tensor? dA, Tensor? dB, {_TANGENTS}, Tensor? tdA, Tensor? tdB, *, {_NUMBERS})"
    " -> Tensor[]",
}
_library = Library("_lobpcg", "DEF")


def define_operators(
    lobpcg: Callable[..., Any],
    find_pairs: Callable[..., Pairs],
    function: Type[Function],
) -> None:
    """Register the operators, once, at import.

    lobpcg: torch.lobpcg; find_pairs(pencil, X, options): the forward; function: the autograd Function of an eager call.
    """

    def pencil_of(A: Any, B: Any, X: Any, iK: Any) -> Pencil:
        return Pencil.of(hermitian_part(A), hermitian_part(B), iK, X)

    def solve(A: Any, B: Any, X: Any, iK: Any, **numbers: Any) -> Tuple[Tensor, ...]:
        with torch.no_grad(), without_autocast(A):
            return find_pairs(
                pencil_of(A, B, X, iK), X, Options.of_numbers(**numbers)
            ).tensors

    def solve_differentiably(
        A: Any, B: Any, X: Any, iK: Any, **numbers: Any
    ) -> Tuple[Tensor, ...]:
        numbers["differentiated"] = numbers["differentiated"] or may_be_differentiated(
            A, B
        )
        if _by_operators(A, B, X, iK):
            return _apply(EigenpairsInGraph, _Below(), numbers, A, B, X, iK)
        pencil = pencil_of(A, B, X, iK).with_gradients()
        return _apply(
            function,
            pencil.bare(),
            X,
            Options.of_numbers(**numbers),
            *pencil.parameters,
        )

    def solve_mapped(
        info: Any,
        in_dims: Sequence[Any],
        A: Any,
        B: Any,
        X: Any,
        iK: Any,
        **numbers: Any,
    ) -> Any:
        return _operators.solve(
            *mapped_matrices(info.batch_size, in_dims, (A, B, X, iK)), **numbers
        ), (0,) * 6

    def solve_without_values(
        A: Tensor, B: Any, X: Any, iK: Any, **numbers: Any
    ) -> Tuple[Tensor, ...]:
        options, m = Options.of_numbers(**numbers), A.shape[-1]
        batch, k, dense = batch_shape(A=A, B=B, X=X, iK=iK), options.k, False
        if 0 not in batch:
            dense = dense_is_cheaper(Pencil.of(A, B, iK, X), options)
        found, n = (m, k) if dense else (options.n, options.n)
        found = found if options.differentiated else k
        E, T, residual, scale = (
            _empty(A, [*batch, p], A.dtype.to_real()) for p in (k, found - k, n, n)
        )
        X, Y = (_empty(A, [*batch, m, p], A.dtype) for p in (k, found - k))
        return E, X, T, Y, residual, scale

    _define(
        "lobpcg",
        {"CompositeImplicitAutograd": lobpcg, "FuncTorchBatchedDecomposition": lobpcg},
    )
    _define_differentiable(
        "solve", solve, solve_without_values, solve_differentiably, solve_mapped
    )
    for operator in _DERIVATIVES.values():
        _define_derivative(operator)


def mapped_matrices(
    size: int, in_dims: Sequence[Any], matrices: Sequence[Any]
) -> List[Any]:
    """Matrices and blocks with the mapped dimension as first batch dimension; the first, A, gets every batch dimension
    that another has, since the forward takes its batch shape from there."""
    tensors, deepest = batched_first(
        size, in_dims, matrices, trailing=(2,) * len(matrices)
    )
    A = tensors[0]
    mapped = [
        M
        for M, dim in zip(tensors, in_dims)
        if isinstance(M, Tensor) and dim is not None
    ]
    if isinstance(A, Tensor) and in_dims[0] is None:
        A = A.expand((size,) + (1,) * (deepest - A.dim() + 2) + tuple(A.shape))
    if isinstance(A, Tensor):
        shapes = [M.shape[:-2] for M in [A] + mapped]
        A = A.expand(broadcast(*shapes) + list(A.shape[-2:]))
    return [A] + tensors[1:]


def _define_derivative(operator: _Operator) -> None:
    def values(*tensors: Any, **numbers: Any) -> List[Tensor]:
        with torch.no_grad():
            return [_owned(output) for output in operator.compute(*tensors, **numbers)]

    def without_values(*tensors: Any, **numbers: Any) -> List[Tensor]:
        return [
            _empty(tensors[0], shape, dtype)
            for shape, dtype in operator.shapes(*tensors, **numbers)
        ]

    def differentiable(*tensors: Any, **numbers: Any) -> List[Tensor]:
        if _by_operators(*tensors):
            return list(_apply(_Derived, _Below(), operator, numbers, *tensors))
        return list(operator.compute(*tensors, **numbers))

    def mapped(info: Any, in_dims: Sequence[Any], *tensors: Any, **numbers: Any) -> Any:
        return _mapped_derivative(operator, info.batch_size, in_dims, tensors, numbers)

    _define_differentiable(
        operator.name, values, without_values, differentiable, mapped
    )


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
    def by_vmap(*arguments: Any, **numbers: Any) -> Any:
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(
            interpreter, mapped, getattr(_operators, name), *arguments, **numbers
        )

    kernels = {
        "CompositeExplicitAutograd": values,
        "Autograd": differentiable,
        "FuncTorchBatched": by_vmap,
    }
    _define(
        name,
        {
            **kernels,
            **dict.fromkeys(("Meta", "SparseMeta", "SparseCsrMeta"), without_values),
        },
    )


def _define(name: str, kernels: Dict[str, Callable[..., Any]]) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _owned(T: Tensor) -> Tensor:
    """T as an operator's output: contiguous, an alias of nothing."""
    return T.detach().clone(memory_format=torch.contiguous_format)
