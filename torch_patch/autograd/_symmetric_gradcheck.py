"""Gradient checks along symmetric (complex: Hermitian) matrices: `symmetric` of gradcheck and gradgradcheck.

A function of symmetric matrices has no meaning at X + eps * e_i e_j^T, so differences entry by entry say nothing about
it. Let P(X) = (X + X^H)/2, the orthogonal projection onto the symmetric matrices for the inner product Re tr(X^H Y).
The check runs on func composed with P. Every perturbation is then symmetric and, as P is its own adjoint, the gradient
of the composition at a symmetric X is P(G), with G what func's backward returned. Whether G itself is symmetric is a
second question, which `check_symmetric_grad` asks of func alone.
"""

from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, GradcheckError, gradgradcheck
from torch.overrides import is_tensor_like


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BLOCKED = (torch.sparse_bsr, torch.sparse_bsc)

_Function = Callable[..., Any]
_Inputs = Tuple[Any, ...]
_Flags = Union[bool, Sequence[bool]]

# What torch.sparse.as_sparse_gradcheck puts before the pieces into which it takes a sparse input apart.
_TAKEN_APART = "__STRIDED_REPRESENTATION__"


def symmetric_gradcheck(
    *,
    func: _Function,
    inputs: Any,
    symmetric: _Flags,
    check_symmetric_grad: bool,
    raise_exception: bool,
    **options: Any,
) -> bool:
    """gradcheck with the inputs marked by `symmetric` restricted to symmetric matrices.

    Args:
        symmetric: True (every differentiable input) or a list or tuple with one bool per input. Marked inputs have
            shape (*, m, m), are symmetric to rounding, and are strided, COO, or unbatched CSR, CSC, BSR, BSC.
        check_symmetric_grad: whether func's own gradient must be symmetric too, matrix by matrix:
            |G - G^H|_F / 2 <= atol + rtol |G|_F.
        options: all other arguments of gradcheck, every one given.

    Raises:
        TypeError, ValueError: arguments that cannot be checked, whatever `raise_exception` says.
        GradcheckError: a check failed and `raise_exception` is set.
    """
    if check_symmetric_grad and not options["check_backward_ad"]:
        raise ValueError(
            "gradcheck: check_symmetric_grad looks at what backward returns, which check_backward_ad=False leaves out; "
            "set check_backward_ad=True"
        )
    inputs = _as_tuple(inputs)
    marked = _marked("gradcheck", inputs, symmetric, check_symmetric_grad)
    composed = _along_symmetric("gradcheck", func, marked)
    passed = gradcheck(composed, inputs, raise_exception=raise_exception, **options)
    if not (passed and check_symmetric_grad):
        return passed
    what = "gradient of output {} with respect to input {}"
    return _symmetric_gradients(
        f"gradcheck: expected the {what}",
        func,
        inputs,
        marked,
        raise_exception,
        options,
    )


def symmetric_gradgradcheck(
    *,
    func: _Function,
    inputs: Any,
    grad_outputs: Any,
    symmetric: _Flags,
    check_symmetric_grad: bool,
    raise_exception: bool,
    **options: Any,
) -> bool:
    """gradgradcheck with the inputs marked by `symmetric` restricted to symmetric matrices.

    What is checked is the derivative of P(G), with G the gradient of func at P(X). `check_symmetric_grad` demands that
    the gradient of P(G) contracted with any constant, as func's double backward returns it, be symmetric.
    Arguments and errors as in symmetric_gradcheck.
    """
    if check_symmetric_grad and not options["check_rev_over_rev"]:
        raise ValueError(
            "gradgradcheck: check_symmetric_grad looks at what double backward returns, which check_rev_over_rev=False "
            "leaves out; set check_rev_over_rev=True"
        )
    inputs = _as_tuple(inputs)
    marked = _marked("gradgradcheck", inputs, symmetric, check_symmetric_grad)
    composed = _along_symmetric("gradgradcheck", func, marked)
    passed = gradgradcheck(
        composed, inputs, grad_outputs, raise_exception=raise_exception, **options
    )
    if not (passed and check_symmetric_grad):
        return passed
    first = _first_gradients(func, marked, grad_outputs)
    what = "gradient, with respect to input {1}, of the first gradient with respect to input {0}"
    return _symmetric_gradients(
        f"gradgradcheck: expected the {what}",
        first,
        inputs,
        marked,
        raise_exception,
        options,
    )


# Arguments


def _marked(
    name: str, inputs: _Inputs, symmetric: _Flags, check_symmetric_grad: bool
) -> List[int]:
    """Indices of the inputs to be restricted: flagged, differentiable, and found to be symmetric matrices."""
    if any(isinstance(x, str) and x == _TAKEN_APART for x in inputs):
        raise ValueError(
            f"{name}: symmetric cannot be combined with torch.sparse.as_sparse_gradcheck, which hands on the stored "
            f"values of a sparse matrix in its place; give the sparse matrix to torch.autograd.{name} itself"
        )
    flags = _flags(name, inputs, symmetric)
    for i, x in enumerate(inputs):
        if flags[i] and not is_tensor_like(x):
            raise TypeError(
                f"{name}: expected input {i}, marked symmetric, to be a Tensor, got {type(x).__name__}; "
                "set its flag to False"
            )
    marked = [i for i, x in enumerate(inputs) if flags[i] and x.requires_grad]
    if check_symmetric_grad and not marked:
        raise ValueError(
            f"{name}: check_symmetric_grad=True needs an input marked symmetric that requires a gradient, got none; "
            "pass symmetric=True or a flag per input"
        )
    for i in marked:
        _require_square(name, i, inputs[i])
        _require_known_layout(name, i, inputs[i])
        _require_symmetric_input(name, i, inputs[i].detach())
    return marked


def _flags(name: str, inputs: _Inputs, symmetric: _Flags) -> Sequence[bool]:
    if isinstance(symmetric, bool):
        return [symmetric and is_tensor_like(x) for x in inputs]
    if not isinstance(symmetric, (list, tuple)) or not all(
        isinstance(flag, bool) for flag in symmetric
    ):
        raise TypeError(
            f"{name}: expected symmetric to be a bool, or a list or tuple of bool, got {symmetric!r}"
        )
    if len(symmetric) != len(inputs):
        raise ValueError(
            f"{name}: expected symmetric to hold one flag per input, got {len(symmetric)} for {len(inputs)} inputs; "
            "flags of inputs without requires_grad have no effect"
        )
    return symmetric


def _require_square(name: str, i: int, x: Tensor) -> None:
    if x.dim() < 2 or x.shape[-2] != x.shape[-1]:
        raise ValueError(
            f"{name}: expected input {i}, marked symmetric, to have shape (*, m, m), got {tuple(x.shape)}; "
            "pass symmetric as one flag per input to leave it out"
        )


def _require_known_layout(name: str, i: int, x: Tensor) -> None:
    if x.layout is torch.strided:
        return
    if x.layout is torch.sparse_coo and x.dense_dim() == 0:
        return
    if x.layout in _COMPRESSED and x.dim() == 2:
        return
    raise ValueError(
        f"{name}: input {i}, marked symmetric, has layout {x.layout} and shape {tuple(x.shape)}; a symmetric input is "
        "strided, COO without dense dimensions, or a single CSR, CSC, BSR or BSC matrix; convert it inside func"
    )


def _require_symmetric_input(name: str, i: int, x: Tensor) -> None:
    dense = x if x.layout is torch.strided else x.to_dense()  # (*, m, m)
    skew, size = _skew_and_size(dense)
    # X formed as M M^H or by averaging is symmetric but for the rounding of its entries: sums of at most about m
    # products, each off by eps relative to |X|; 10 leaves room for a worse conditioned origin.
    bad = ~(skew <= 10 * x.shape[-1] * torch.finfo(x.dtype).eps * size)
    if bad.any():
        raise ValueError(
            f"{name}: expected input {i} to be {_kind(x)}, got a skew part of relative norm {_worst(skew, size, bad)}; "
            "pass (X + X.mH) / 2"
        )
    if x.layout is not torch.strided:
        stored = _coo(x).coalesce()
        pattern = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        pattern[tuple(stored.indices())] = True
        if not torch.equal(pattern, pattern.mT):
            raise ValueError(
                f"{name}: expected the stored entries of input {i} to be symmetric, got (i, j) stored without (j, i); "
                "store an explicit zero there"
            )


# The projection P


def _hermitian_part(x: Tensor) -> Tensor:
    """(X + X^H)/2 in the layout of X, differentiable any number of times, for each layout of a marked input."""
    return _strided_part(x) if x.layout is torch.strided else _SparsePart.apply(x)


def _strided_part(x: Tensor) -> Tensor:
    xh = x.transpose(-2, -1)
    # Not x.mH: the lazy conjugate has no batching rule in the vmap that checks batched forward gradients.
    return (x + (xh.conj_physical() if x.is_complex() else xh)) / 2


class _SparsePart(torch.autograd.Function):
    """P on a sparse matrix, by way of COO, as compressed layouts do not add two patterns. These conversions are not
    differentiable for complex entries and need not be: P is its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        coo = _coo(x)
        part = ((coo + coo.transpose(-2, -1).conj_physical()) * 0.5).coalesce()
        if x.layout is torch.sparse_coo:
            return part
        blocksize = x.values().shape[1:3] if x.layout in _BLOCKED else None
        return part.to_sparse(layout=x.layout, blocksize=blocksize)

    @staticmethod
    def backward(ctx: Any, gP: Optional[Tensor]) -> Optional[Tensor]:
        return None if gP is None else _hermitian_part(gP)


def _coo(x: Tensor) -> Tensor:
    return x if x.layout is torch.sparse_coo else x.to_sparse(layout=torch.sparse_coo)


def _along_symmetric(name: str, func: _Function, marked: List[int]) -> _Function:
    """func after P on the inputs of index `marked`; func must leave those alone, as gradcheck demands of any input."""

    def composed(*inputs: Any) -> Any:
        inputs = tuple(
            _hermitian_part(x) if i in marked else x for i, x in enumerate(inputs)
        )
        # func gets a temporary, where autograd would not object to a change in place as it does for a leaf.
        versions = [inputs[i]._version for i in marked]
        outputs = func(*inputs)
        for i, version in zip(marked, versions):
            if inputs[i]._version != version:
                raise ValueError(
                    f"{name}: expected func to leave its inputs unchanged, but it changed input {i} in place; "
                    "clone it in func"
                )
        return outputs

    return composed


# The gradient of func itself


def _symmetric_gradients(
    expected: str,
    func: _Function,
    inputs: _Inputs,
    marked: List[int],
    raise_exception: bool,
    options: Dict[str, Any],
) -> bool:
    try:
        _require_symmetric_gradients(expected, func, inputs, marked, options)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def _require_symmetric_gradients(
    expected: str,
    func: _Function,
    inputs: _Inputs,
    marked: List[int],
    options: Dict[str, Any],
) -> None:
    """GradcheckError unless, for the cotangents of the mode, all gradients of all outputs are symmetric."""
    wanted = [inputs[i] for i in marked]
    for j, output in enumerate(_as_tuple(func(*inputs))):
        if not (is_tensor_like(output) and output.requires_grad):
            continue
        for cotangent in _cotangents(output, options["fast_mode"]):
            gradients = torch.autograd.grad(
                output, wanted, cotangent, retain_graph=True, allow_unused=True
            )
            for i, G in zip(marked, gradients):
                if G is not None:
                    _require_symmetric_gradient(
                        expected.format(j, i), G.detach(), options
                    )


def _require_symmetric_gradient(
    expected: str, G: Tensor, options: Dict[str, Any]
) -> None:
    skew, size = _skew_and_size(G if G.layout is torch.strided else G.to_dense())
    bad = ~(skew <= options["atol"] + options["rtol"] * size)
    if bad.any():
        raise GradcheckError(
            f"{expected} to be {_kind(G)}, got a skew part of relative norm {_worst(skew, size, bad)}; "
            "return (G + G.mH) / 2 from backward, or drop check_symmetric_grad"
        )


def _cotangents(output: Tensor, fast_mode: bool) -> Iterator[Tensor]:
    """Slow mode: a real basis of output's space. Fast mode: one random element, blind to a skew part with chance 0."""
    if fast_mode:
        yield _random_like(output)
        return
    for index in range(output.numel()):
        for unit in (1, 1j) if output.is_complex() else (1,):
            cotangent = torch.zeros_like(output, memory_format=torch.contiguous_format)
            cotangent.view(-1)[index].fill_(unit)
            yield cotangent


def _random_like(x: Tensor) -> Tensor:
    # A generator of its own: the user's random state stays as it is, and a failure can be repeated.
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(x.shape, dtype=x.dtype, device="cpu", generator=generator).to(
        x.device
    )


def _first_gradients(
    func: _Function, marked: List[int], grad_outputs: Any
) -> _Function:
    """inputs -> the gradients of func, one per input, projected for marked inputs and None for constant ones."""

    def gradients(*inputs: Any) -> Tuple[Optional[Tensor], ...]:
        outputs = [
            y for y in _as_tuple(func(*inputs)) if is_tensor_like(y) and y.requires_grad
        ]
        weights = (
            [_random_like(y) for y in outputs]
            if grad_outputs is None
            else _as_tuple(grad_outputs)
        )
        wanted = [
            i for i, x in enumerate(inputs) if is_tensor_like(x) and x.requires_grad
        ]
        found = torch.autograd.grad(
            outputs,
            [inputs[i] for i in wanted],
            weights,
            create_graph=True,
            allow_unused=True,
        )
        by_input = dict(zip(wanted, found))
        for i in marked:
            if by_input[i] is not None:
                by_input[i] = _hermitian_part(by_input[i])
        return tuple(by_input.get(i) for i in range(len(inputs)))

    return gradients


# Measures and words


def _skew_and_size(X: Tensor) -> Tuple[Tensor, Tensor]:
    """Frobenius norms of (X - X^H)/2 and of X, each of shape (*), for dense X (*, m, m)."""
    return torch.linalg.matrix_norm((X - X.mH) / 2), torch.linalg.matrix_norm(X)


def _worst(skew: Tensor, size: Tensor, bad: Tensor) -> str:
    """The largest skew part among the bad matrices relative to the matrix, and where in the batch it is."""
    ratio = torch.where(
        bad, skew / size, -1
    ).flatten()  # NaN is bad, and argmax takes it for the largest
    worst = int(ratio.argmax())
    if skew.dim() == 0:
        return f"{ratio[worst]:.1e}"
    place: List[int] = []
    for length in reversed(skew.shape):
        worst, k = divmod(worst, length)
        place.insert(0, k)
    return f"{ratio.max():.1e} in matrix {tuple(place)} of the batch"


def _kind(x: Tensor) -> str:
    return "Hermitian" if x.is_complex() else "symmetric"


def _as_tuple(x: Any) -> Tuple[Any, ...]:
    return tuple(x) if isinstance(x, (list, tuple)) else (x,)
