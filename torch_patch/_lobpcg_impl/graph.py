"""lobpcg in graphs: operators for torch.compile, torch.export, make_fx, fake and meta tensors, and TorchScript.

A tracer sees tensors without values.  What decides by values is therefore an operator to it, which runs what an eager
call runs, its errors and warnings included: the solve, the reduced resolvent, the mask of pairs, the distance to the
rest of the spectrum.  The formulas between them are traced like any code, so a graph has derivatives of every order.

Each operator is the forward of one autograd Function, and the Function has its derivatives and its rule for vmap:

    an eager call       Function.apply -> forward
    a traced call       Function.apply -> forward -> the operator, below autograd: a node of the graph
    a graph that runs   the operator -> Function.apply -> forward
"""

import inspect
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor
from torch._lobpcg_impl.arguments import Options
from torch._lobpcg_impl.operand import Pencil
from torch._lobpcg_impl.sparse import is_sparse
from torch._lobpcg_impl.transforms import is_traced, may_be_differentiated
from torch.autograd import Function
from torch.library import Library


_library = Library("_lobpcg", "DEF")  # noqa: TOR901
_WITHOUT_VALUES = ("Meta", "SparseMeta", "SparseCsrMeta")

MATRICES = "Tensor A, Tensor? B, Tensor? iK"
NUMBERS = (
    "SymInt k, SymInt n, SymInt chosen, SymInt niter, float tol, bool largest, str method, bool iterate, "
    "bool differentiated, bool accurate, str[] ortho_names, int[] ortho_values"
)

# Tensors of an operator and its numbers.
Held = Tuple[Sequence[Any], Dict[str, Any]]
# Shape and dtype of each output.
Outputs = List[Tuple[Sequence[int], torch.dtype]]


def in_graphs(
    name: str,
    schema: str,
    outputs: Callable[..., Outputs],
    hold: Callable[..., Held],
    restore: Callable[..., Sequence[Any]],
) -> Callable[[Type[Function]], Type[Function]]:
    """Let graphs hold the forward of a Function as the operator `name`.

    hold: from the arguments of forward to tensors and numbers that the schema takes; restore: the way back; outputs:
    the shape and dtype of each output, from tensors and numbers alone.
    """

    def register(function: Type[Function]) -> Type[Function]:
        compute = function.forward

        def forward(*arguments: Any) -> Any:
            if not is_traced(*arguments):
                return _contiguous(compute(*arguments))
            tensors, numbers = hold(*arguments)
            # Above autograd the operator is this Function again.
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops._lobpcg, name)(*tensors, **numbers)

        def apply(*tensors: Any, **numbers: Any) -> Any:
            return function.apply(*restore(*tensors, **numbers))

        def values(*tensors: Any, **numbers: Any) -> Any:
            with torch.no_grad(), _from_the_start():
                return _contiguous(compute(*restore(*tensors, **numbers)))

        def without_values(*tensors: Any, **numbers: Any) -> Any:
            device = tensors[0].device
            made = tuple(
                torch.empty(tuple(shape), dtype=dtype, device=device)
                for shape, dtype in outputs(*tensors, **numbers)
            )
            return made if len(made) > 1 else made[0]

        # An apply asks for the signature of forward; kept here, it is not made anew each time.
        forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        function.forward = staticmethod(forward)  # type: ignore[method-assign]
        # At the first of these keys no level of torch.func has been taken yet: the Function takes them all.
        kernels = dict.fromkeys(("FuncTorchDynamicLayerFrontMode", "Autograd"), apply)
        kernels.update(
            dict.fromkeys(_WITHOUT_VALUES, without_values),
            CompositeExplicitAutograd=values,
        )
        _define(name + schema, kernels)
        return function

    return register


def _define(schema: str, kernels: Dict[str, Callable[..., Any]]) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(schema[: schema.index("(")], kernel, key)


# What the dispatcher leaves out where nothing has been dispatched yet.
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def _from_the_start() -> Any:
    """The dispatcher at its beginning, as in an eager call.

    PyTorch runs a kernel that a dispatch mode calls, such as that of make_fx on tensors with values, without the keys
    that stand above the mode.  One of them resolves M.mH before a factorisation that knows no conjugate views: without
    it torch.linalg.solve_triangular(M.mH, ...) solves with M^T.  Without others, results differ by rounding.
    """
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, _EXCLUDED)


def _contiguous(outputs: Any) -> Any:
    """Outputs in the strides that a tracer was told of."""
    if isinstance(outputs, Tensor):
        return outputs.contiguous()
    return tuple(output.contiguous() for output in outputs)


def hold_pencil(pencil: Pencil, options: Options, *tensors: Any) -> Held:
    """(bare pencil, options, tensors, then the pencil's parameters), as Functions of pencils take them."""
    count = len(tensors) - len(pencil.parameters)
    A, B, *iK = pencil.split(tensors[count:])
    matrices = [operand[0] if operand else None for operand in (A, B, *(iK or [()]))]
    return [*matrices, *tensors[:count]], options.numbers()


def restore_pencil(
    A: Tensor, B: Optional[Tensor], iK: Optional[Tensor], *tensors: Any, **numbers: Any
) -> Sequence[Any]:
    """A graph may run where a derivative is wanted although none was wanted where it was traced."""
    pencil = Pencil.of(A, B, iK, None).with_gradients()
    options = Options.of_numbers(**numbers)
    if may_be_differentiated(*pencil.parameters):
        options = options.with_derivative()
    return [pencil.bare(), options, *tensors, *pencil.parameters]


def refuse_in_graph(A: Any, B: Any, X: Any, iK: Any, options: Options) -> None:
    """NotImplementedError for what a graph cannot hold: a callable, a tracker, and a sparse matrix whose gradient is
    asked for, since the number of its stored entries is a value."""
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


def define_for_torchscript(lobpcg: Callable[..., Any]) -> None:
    """torch.ops._lobpcg.lobpcg: torch.lobpcg as the one call that a scripted function makes."""
    _define(
        "lobpcg(Tensor A, SymInt? k, Tensor? B, Tensor? X, SymInt? n, Tensor? iK, SymInt? niter, float? tol, "
        "bool? largest, str? method, *, Dict(str, int)? ortho_iparams) -> (Tensor, Tensor)",
        {"CompositeImplicitAutograd": lobpcg, "FuncTorchBatchedDecomposition": lobpcg},
    )
