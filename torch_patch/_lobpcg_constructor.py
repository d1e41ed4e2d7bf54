"""Higher derivatives through torch.sparse_coo_tensor(indices, values).

PyTorch differentiates the constructor once: the gradient of `values` has no graph, so a second derivative that passes
through it would be lost without a word.  A hook on the constructor's node replaces that gradient by an equal one that
is differentiable.  It acts where a graph is asked for (create_graph=True) and does nothing otherwise.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import Function

from torch._lobpcg_pattern import Pattern, _SparseFromValues

_NAME = "SparseCooTensorWithDimsAndTensorsBackward0"
# Nodes between a sparse tensor and its constructors: conversions and sums, a handful.
_MOST_NODES = 64


def keep_graph_of_values(M: Tensor) -> None:
    """Hook every COO constructor that M came from, once each."""
    pending, seen = [M.grad_fn], 0
    while pending and seen < _MOST_NODES:
        node = pending.pop()
        seen += 1
        if node is None:
            continue
        if node.name() != _NAME:
            pending.extend(parent for parent, _ in node.next_functions)
        elif not node.metadata.get(_NAME):
            node.metadata[_NAME] = True
            node.register_hook(_Replacement(node._saved_result._indices().detach()))


class _Replacement:
    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def __call__(self, grad_inputs, grad_outputs) -> Any:
        g = grad_outputs[0]
        if g is None or not g.requires_grad or not torch.is_grad_enabled() or grad_inputs[0] is None:
            return None
        if g.layout == torch.strided:
            return (g[tuple(self.indices)],) + tuple(grad_inputs[1:])
        if g.layout != torch.sparse_coo:
            return None
        return (_ValuesAt.apply(g, self.indices),) + tuple(grad_inputs[1:])


class _ValuesAt(Function):
    """(sparse G, indices) -> the elements of G there, 0 where G stores none.  Backward: a sparse tensor like G."""

    @staticmethod
    def forward(G: Tensor, indices: Tensor) -> Tensor:
        pattern = Pattern(G)
        where, stored = _find(pattern, indices)
        return torch.where(stored, pattern.values[where], torch.zeros_like(pattern.values[:1]))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        G, indices = inputs
        ctx.pattern = Pattern(G.detach())
        ctx.where, ctx.stored = _find(ctx.pattern, indices)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, h: Optional[Tensor]):
        if h is None:
            return None, None
        h = torch.where(ctx.stored, h, torch.zeros_like(h))
        values = torch.zeros_like(ctx.pattern.values).index_add(0, ctx.where, h)
        return _SparseFromValues.apply(values, ctx.pattern), None


def _find(pattern: Pattern, indices: Tensor):
    """Position of each index among the stored elements (coalesced, so sorted), and whether it is one of them."""
    ours, theirs = (_flat(i, pattern.shape) for i in (pattern.indices, indices))
    where = torch.searchsorted(ours, theirs).clamp(max=max(0, ours.numel() - 1))
    return where, ours[where] == theirs


def _flat(indices: Tensor, shape: torch.Size) -> Tensor:
    flat = torch.zeros_like(indices[0])
    for size, coordinate in zip(shape, indices):
        flat = flat * size + coordinate
    return flat
