"""What the autograd Functions of lobpcg have in common: what is active around them, vmap, autocast."""

import contextlib
import functools
import itertools
import sys
from typing import Any, Callable, ContextManager, List, Sequence, Tuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad, Function


# A context that does nothing.
_NOTHING = contextlib.nullcontext()


def in_transform() -> bool:
    """Whether torch.func or forward mode is at work, of which requires_grad and grad mode say nothing."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_be_differentiated(*operands: Any) -> bool:
    """Whether autograd records, or a transform is active (which may be vmap alone)."""
    if torch.is_grad_enabled():
        for M in operands:
            if isinstance(M, Tensor) and M.requires_grad:
                return True
    return in_transform()


def constant(M: Any) -> Any:
    """M, of which autograd knows nothing, if it is a tensor."""
    return M.detach() if isinstance(M, Tensor) else M


def over_processes(*operands: Any) -> bool:
    """Whether one is a DTensor, or carries the mesh of one; where its module was never imported, none can."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    return any(getattr(M, "device_mesh", None) is not None for M in operands)


def unwrapped(M: Tensor) -> Tensor:
    """What is inside of the levels of torch.func."""
    while torch._C._functorch.is_functorch_wrapped_tensor(M):
        M = torch._C._functorch.get_unwrapped(M)
    return M


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
        M = unwrapped(M)
        if M.is_meta or getattr(type(M), "_mode_key", None) is not None:
            return True
    return False


def without_autocast(where: torch.device) -> ContextManager[Any]:
    """Products inside run in the dtype of the input: an autocast half-precision product would lose the derivative."""
    device = where.type
    # Of some devices, meta tensors for one, autocast knows nothing.
    if (
        not torch._C._is_any_autocast_enabled()
        or not torch.amp.is_autocast_available(device)
        or not torch.is_autocast_enabled(device)
    ):
        return _NOTHING
    return torch.autocast(device, enabled=False)


class Constant(Function):
    """A Function of one output that is a constant to autograd."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None


def apply(function: Any, *arguments: Any) -> Any:
    """function.apply, or its forward alone where nothing records it, which spares a small problem a tenth of its time
    for each Function."""
    if in_transform():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        # Function.apply without the search for default arguments, a third of its time.
        return super(Function, function).apply(*unwrap_dead_wrappers(arguments))
    return function.forward(*arguments)


def broadcast(*shapes: Sequence[int]) -> List[int]:
    """The shape that broadcastable shapes have together.  torch.broadcast_shapes imports a symbolic algebra package."""
    if not any(shapes):
        return []
    by_dimension = itertools.zip_longest(*map(reversed, shapes), fillvalue=1)
    out = [next((size for size in sizes if size != 1), 1) for sizes in by_dimension]
    return out[::-1]


def twin(thing: Any) -> Any:
    """A shallow copy; copy.copy asks the class how, which takes several times as long."""
    same = object.__new__(type(thing))
    same.__dict__.update(thing.__dict__)
    return same


def sum_to(g: Tensor, shape: Sequence[int]) -> Tensor:
    """g summed over the dimensions in which `shape` was broadcast."""
    return g if g.shape == tuple(shape) else g.sum_to_size(shape)


def batched_first(
    size: int, in_dims: Sequence[Any], values: Sequence[Any], trailing: Sequence[int]
) -> Tuple[List[Any], int]:
    """Move mapped dimensions to the front and insert dimensions of size 1 so that all batch shapes broadcast.

    `trailing`: number of dimensions of each value that are not batch dimensions.  Values that are not mapped stay
    as they are: they broadcast.  Returns the values and the largest number of batch dimensions below the mapped one.
    """
    ranks = [
        value.dim() - t - (dim is not None) if isinstance(value, Tensor) else 0
        for value, dim, t in zip(values, in_dims, trailing)
    ]
    deepest = max(ranks)
    out = []
    for value, dim, rank in zip(values, in_dims, ranks):
        if isinstance(value, Tensor) and dim is not None:
            value = value.movedim(dim, 0)
            value = value.reshape(
                (size,) + (1,) * (deepest - rank) + tuple(value.shape[1:])
            )
        out.append(value)
    return out, deepest


def accepts_legacy_vmap(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward or jvp rule run under the vmap of torch.autograd.grad(is_grads_batched=True).

    That vmap is older than torch.func's, knows no Function.vmap and cannot branch on values.  The tensors mapped by it
    are unwrapped, and the rule is run under torch.vmap instead.
    """

    @functools.wraps(rule)
    def wrapped(ctx: Any, *args: Any) -> Any:
        mapped = [
            isinstance(a, Tensor) and torch._C._functorch.is_legacy_batchedtensor(a)
            for a in args
        ]
        if not any(mapped):
            return rule(ctx, *args)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        physical = [
            torch._remove_batch_dim(a, level, 1, 0) if m else a
            for a, m in zip(args, mapped)
        ]
        present: List[bool] = []

        def run(*tensors: Tensor) -> Tuple[Tensor, ...]:
            given = iter(tensors)
            out = rule(ctx, *[next(given) if m else a for a, m in zip(args, mapped)])
            out = out if isinstance(out, tuple) else (out,)
            present[:] = [o is not None for o in out]
            return tuple(o for o in out if o is not None)

        results = iter(torch.vmap(run)(*[p for p, m in zip(physical, mapped) if m]))
        out = tuple(
            torch._add_batch_dim(next(results), 0, level) if there else None
            for there in present
        )
        return out if len(out) > 1 else out[0]

    return wrapped


def refuse_nested_forward_mode() -> None:
    """An error where PyTorch silently drops a tangent: the outer one of any autograd.Function in two torch.func.jvp."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "lobpcg: forward mode inside forward mode loses the outer tangent of an autograd.Function in PyTorch; use "
            "reverse mode inside, such as jacfwd(jacrev(f)) or torch.func.hessian"
        )
