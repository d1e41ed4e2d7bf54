"""Derivatives through torch.sparse_coo_tensor(indices, values), torch.sparse_csr_tensor and their siblings.

PyTorch differentiates these constructors once.  For COO the gradient of `values` has no graph, so a second derivative
that passes through it would be lost without a word; for the compressed layouts the second derivative raises.  A hook
on the constructor's node replaces that gradient by an equal one that is differentiable.  It acts where a graph is asked
for (create_graph=True) and does nothing otherwise.

The node of the compressed layouts also makes a dense m x m array of the gradient.  Where the matrix comes straight from
such a constructor, the gradient takes a way around that node to the values.
"""

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.sparse import _Values, Pattern, SparseFromValues
from torch.autograd import Function


_COO, _COMPRESSED = (
    "SparseCooTensorWithDimsAndTensorsBackward0",
    "SparseCompressedTensorBackward0",
)
# Nodes between a sparse tensor and its constructors: conversions and sums, a handful.
_MOST_NODES = 64


def keep_graph_of_values(M: Tensor) -> None:
    """Hook every sparse constructor that M came from, once each."""
    pending: List[Any] = [M.grad_fn]
    seen = 0
    while pending and seen < _MOST_NODES:
        node = pending.pop()
        seen += 1
        if node is None:
            continue
        if node.name() not in (_COO, _COMPRESSED):
            pending.extend(parent for parent, _ in node.next_functions)
        elif not node.metadata.get(_COO):
            node.metadata[_COO] = True
            node.register_hook(_Replacement(node._saved_result.detach()))


def around_constructor(M: Tensor) -> Tensor:
    """M, tied to the values that its constructor got as well as to M; M itself where it has no such constructor.

    A gradient goes to the values, or, where autograd.grad asks for that of M, to M; asked for both in one call it says
    that M is unused.  A tensor that retains its gradient or has hooks must see it: that keeps PyTorch's way.
    """
    node: Any = M.grad_fn
    if (
        node is None
        or node.name() != _COMPRESSED
        or M.retains_grad
        or M._backward_hooks
    ):
        return M
    try:
        values = node._saved_values
    except RuntimeError:
        # Freed by an earlier backward, or changed in place: an error once a gradient is asked for.
        return M
    if values is None or not values.requires_grad:
        return M
    return _Constructed.apply(M, values.view_as(values), Pattern(M.detach()))


class _Constructed(Function):
    """(M, values, pattern) -> M, compressed; backward: the values get those of the cotangent, or M the cotangent."""

    @staticmethod
    def forward(M: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        return pattern.with_values(values.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Optional[Tensor]) -> Any:
        if g is None:
            return None, None, None
        if torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            return None, _Values.apply(g), None
        return g, None, None


class _Replacement:
    """The hook: made of what the constructor returned, which holds the indices in the caller's order."""

    def __init__(self, made: Tensor) -> None:
        self.made = made

    def __call__(self, grad_inputs: Any, grad_outputs: Any) -> Any:
        g, made = grad_outputs[0], self.made
        which = [i for i, h in enumerate(grad_inputs) if h is not None]
        if (
            g is None
            or not g.requires_grad
            or not torch.is_grad_enabled()
            or len(which) != 1
        ):
            return None
        if made.layout == torch.sparse_coo:
            if g.layout == torch.strided:
                values = g[tuple(made._indices())]
            else:
                values = _ValuesAt.apply(g.to_sparse_coo(), made._indices())
        elif _same_positions(g, made):
            values = _Values.apply(g)
        else:
            return None
        return tuple(values if i == which[0] else h for i, h in enumerate(grad_inputs))


def _same_positions(g: Tensor, made: Tensor) -> bool:
    if g.layout != made.layout:
        return False
    a, b = Pattern(g.detach()), Pattern(made)
    return torch.equal(a.compressed, b.compressed) and torch.equal(a.plain, b.plain)


class _ValuesAt(Function):
    """(sparse G, indices) -> the elements of G there, 0 where G stores none.  Backward: a sparse tensor like G."""

    @staticmethod
    def forward(G: Tensor, indices: Tensor) -> Tensor:
        pattern = Pattern(G)
        where, stored = _find(pattern, indices)
        return torch.where(
            stored, pattern.values[where], torch.zeros_like(pattern.values[:1])
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        G, indices = inputs
        ctx.pattern = Pattern(G.detach())
        ctx.where, ctx.stored = _find(ctx.pattern, indices)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Optional[Tensor]) -> Tuple[Optional[Tensor], None]:
        if h is None:
            return None, None
        h = torch.where(ctx.stored, h, torch.zeros_like(h))
        values = torch.zeros_like(ctx.pattern.values).index_add(0, ctx.where, h)
        return SparseFromValues.apply(values, ctx.pattern), None


def _find(pattern: Pattern, indices: Tensor) -> Tuple[Tensor, Tensor]:
    """Position of each index among the stored elements (coalesced, so sorted), and whether it is one of them."""
    ours, theirs = (_flat(i, pattern.shape) for i in (pattern.indices, indices))
    where = torch.searchsorted(ours, theirs).clamp(max=max(0, ours.numel() - 1))
    return where, ours[where] == theirs


def _flat(indices: Tensor, shape: torch.Size) -> Tensor:
    flat = torch.zeros_like(indices[0])
    for size, coordinate in zip(shape, indices):
        flat = flat * size + coordinate
    return flat
