"""Checks of lobpcg's arguments: what shapes, dtypes and numbers tell before any product, and the defaults.

Nothing here reads a tensor's values, so the checks hold under every transform and while a graph is traced; values are
checked by the operands.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.transforms import twin


# Fewer iterations than these ask for a truncated solve.
FEW_ITERATIONS = 200
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class Options:
    """What lobpcg was asked for, besides matrices, with the defaults filled in."""

    k: int
    n: int  # columns of the block that is iterated
    chosen: int  # of these, columns that the caller chose (X)
    niter: int
    tol: float
    largest: bool
    method: str
    iterate: bool  # method, niter or tracker given: never replaced by a dense solve
    # A derivative may be asked for: the pairs must serve it, and the distance to the next eigenvalue be known.
    differentiated: bool = False
    # tol was left out: eigenvalues, and vectors where differentiated, are found to a stated accuracy.
    accurate: bool = False
    ortho_iparams: Dict[str, int] = field(default_factory=dict)
    ortho_fparams: Dict[str, float] = field(default_factory=dict)
    ortho_bparams: Dict[str, bool] = field(default_factory=dict)
    tracker: Optional[Callable[[Any], Any]] = None

    @property
    def sign(self) -> float:
        """1 where the wanted pairs have the lowest eigenvalues, -1 where they have the highest."""
        return -1.0 if self.largest else 1.0

    @classmethod
    def of(cls, **named: Any) -> "Options":
        """Options of all fields but those that have a number for default, at a quarter of the cost of __init__, which
        passes each through object.__setattr__."""
        made = object.__new__(cls)
        made.__dict__.update(named)
        return made

    def with_derivative(self) -> "Options":
        """The same, where a derivative may be asked for."""
        same = twin(self)  # a third of the cost of dataclasses.replace
        same.__dict__["differentiated"] = True
        return same

    def numbers(self) -> Dict[str, Any]:
        """The fields that an operator's schema can hold; integer parameters as two lists."""
        unfit = ("ortho_iparams", "ortho_fparams", "ortho_bparams", "tracker")
        held = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in unfit
        }
        return dict(
            held,
            ortho_names=list(self.ortho_iparams),
            ortho_values=list(self.ortho_iparams.values()),
        )

    @classmethod
    def of_numbers(
        cls, ortho_names: List[str], ortho_values: List[int], **held: Any
    ) -> "Options":
        return cls(ortho_iparams=dict(zip(ortho_names, ortho_values)), **held)


def options_of(
    A: Any,
    B: Any,
    X: Any,
    iK: Any,
    k: Optional[int],
    n: Optional[int],
    niter: Optional[int],
    tol: Optional[float],
    largest: Optional[bool],
    method: Optional[str],
    **others: Any,
) -> Options:
    """The options of a call, its arguments checked as far as types, shapes, dtypes and numbers tell.

    A, B, iK: tensors, callables or None; X: a tensor or None; others: tracker and the three ortho parameters.
    Raises TypeError and ValueError.
    """
    for T, name in ((A, "A"), (B, "B"), (iK, "iK")):
        if T is not None and not isinstance(T, Tensor) and not _multiplies(T):
            raise TypeError(
                f"lobpcg: {name} is {type(T).__name__}; it must be a tensor or a callable on blocks (*, m, p)"
            )
    if isinstance(k, Tensor) and k.dim() > 0:
        raise TypeError(
            f"lobpcg: k is a tensor of shape {list(k.shape)}; it must be an int, the number of pairs: pass a start "
            "block as X="
        )
    if largest is not None and not isinstance(largest, bool):
        raise TypeError(
            f"lobpcg: largest is {type(largest).__name__} ({largest}); it must be True for the largest eigenvalues or "
            "False for the smallest"
        )
    for number, name in ((k, "k"), (n, "n"), (niter, "niter")):
        if number is not None and (
            isinstance(number, bool) or not hasattr(number, "__index__")
        ):
            raise TypeError(
                f"lobpcg: {name} is {type(number).__name__} ({number}); it must be an int"
            )
    model, name = model_of(A, X, B)
    if model is None:
        raise ValueError(
            "lobpcg: A is a callable, so its size is unknown; pass a start block X (*, m, n), or give the callable "
            "attributes shape and dtype"
        )
    if isinstance(A, Tensor):
        check_matrix(A, "A")
    else:
        check_dtype(model, name)
    if model.dim() < 2:
        raise ValueError(
            f"lobpcg: X has shape {list(model.shape)}; it must be (*, m, n)"
        )
    m = model.shape[-2]
    for T, other in ((B, "B"), (X, "X"), (iK, "iK")):
        if isinstance(T, Tensor):
            if other != "X":
                check_matrix(T, other)
            check_block(T, other, m)
            check_alike(T, other, model, name)
    for T, other in ((A, "A"), (B, "B"), (iK, "iK")):
        if T is not None and not isinstance(T, Tensor):
            check_declared(T, other, model, name)
    columns = None if X is None else X.shape[-1]
    # Where a polynomial takes the place of iK, a guard column costs many products; in a truncated solve it is an
    # expense and no gain.
    truncated = niter is not None and 0 <= niter < FEW_ITERATIONS
    sparse = isinstance(A, Tensor) and A.layout != torch.strided
    few_guards = iK is None and (truncated or (sparse and B is None))
    return settle(
        m, model.dtype, k, n, columns, niter, tol, largest, method, few_guards, **others
    )


def settle(
    m: int,
    dtype: torch.dtype,
    k: Optional[int],
    n: Optional[int],
    columns: Optional[int],
    niter: Optional[int],
    tol: Optional[float],
    largest: Optional[bool],
    method: Optional[str],
    few_guards: bool = False,
    tracker: Optional[Callable[[Any], Any]] = None,
    **ortho: Any,
) -> Options:
    """Fill in the defaults; columns: those of X, if X was given.  Raises ValueError on numbers that do not fit each
    other."""
    wanted = (1 if columns is None else columns) if k is None else k
    block = (
        columns
        if columns is not None
        else n
        if n is not None
        else _default_block(m, wanted, few_guards)
    )
    steps = 1000 if niter is None else niter
    check_counts(m, wanted, block, steps)
    name = "ortho" if method is None else method
    if name not in ("ortho", "basic"):
        raise ValueError(
            f"lobpcg: unknown method '{name}'; it must be 'ortho' or 'basic'"
        )
    tolerance = torch.finfo(dtype).eps ** 0.5 if tol is None else tol
    if not tolerance >= 0.0:
        raise ValueError(f"lobpcg: tol={tolerance}; it must be a number >= 0")
    iterate = tracker is not None or method is not None or niter is not None
    if iterate and m < 3 * block:
        raise ValueError(
            f"lobpcg: expected m >= 3*n, got m={m}, n={block}; reduce n, or leave method, niter and tracker out to "
            "have a dense solve, or use torch.linalg.eigh"
        )
    return Options.of(
        k=wanted,
        n=block,
        chosen=columns or 0,
        niter=steps,
        tol=tolerance,
        largest=True if largest is None else largest,
        method=name,
        iterate=iterate,
        accurate=tol is None,
        tracker=tracker,
        ortho_iparams=ortho.get("ortho_iparams") or {},
        ortho_fparams=ortho.get("ortho_fparams") or {},
        ortho_bparams=ortho.get("ortho_bparams") or {},
    )


def _multiplies(M: Any) -> bool:
    return callable(M) or hasattr(M, "matmul") or hasattr(M, "__matmul__")


def model_of(A: Any, X: Any, B: Any) -> Tuple[Any, str]:
    """A tensor (*, m, ...) with the size, dtype and device of the problem, and whose they are; or None.

    A tensor tells before an object that carries shape and dtype: only the tensor is sure of the device.
    """
    for T, name in ((A, "A"), (X, "X"), (B, "B")):
        if isinstance(T, Tensor):
            return T, name
    for M, name in ((A, "A"), (B, "B")):
        shape, dtype = declared(M, name)
        if shape is not None and dtype is not None:
            device = getattr(M, "device", None)
            return torch.empty([*shape[:-1], 0], dtype=dtype, device=device), name
    return None, ""


def declared(M: Any, name: str) -> Tuple[Optional[List[int]], Optional[torch.dtype]]:
    """Shape and dtype that a callable or an object with products carries; NumPy's dtypes by their names."""
    if M is None or isinstance(M, Tensor):
        return None, None
    shape, dtype = getattr(M, "shape", None), getattr(M, "dtype", None)
    if not isinstance(shape, (tuple, list)) or len(shape) < 2:
        return None, None
    if dtype is not None and not isinstance(dtype, torch.dtype):
        dtype = getattr(torch, str(getattr(dtype, "name", dtype)), None)
    if shape[-1] != shape[-2]:
        raise ValueError(
            f"lobpcg: {name} is {shape[-2]} x {shape[-1]}; it must be square (Hermitian)"
        )
    return [int(size) for size in shape], dtype


def check_declared(M: Any, name: str, model: Tensor, model_name: str) -> None:
    """The size and, but for a preconditioner, the dtype that an object carries are those of the problem."""
    shape, dtype = declared(M, name)
    if shape is None:
        return
    if shape[-1] != model.shape[-2]:
        raise ValueError(
            f"lobpcg: {name} has shape {shape}; it must be (*, m, m) with m={model.shape[-2]}, the size of {model_name}"
        )
    if name != "iK" and dtype is not None and dtype != model.dtype:
        raise TypeError(
            f"lobpcg: {name} has dtype {dtype}, {model_name} has {model.dtype}; they must be the same: convert one "
            "of them"
        )


def _default_block(m: int, wanted: int, few: bool) -> int:
    """Guard columns separate the wanted pairs from the rest: as many again, four at least, halve the iterations, and
    the time; four are enough for a large block where `few` says that they are dear.  Branches, not min and max: a
    traced m then leaves a bound on m behind and n a number."""
    block = wanted + (4 if few and wanted >= 20 else max(4, wanted))
    if m // 3 < block:
        block = max(wanted, m // 3)
    return block


def check_matrix(A: Tensor, name: str) -> None:
    if A.dim() < 2:
        raise ValueError(
            f"lobpcg: {name} has {A.dim()} dimensions; it must be a matrix or a batch of matrices (*, m, m)"
        )
    if A.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"lobpcg: {name} is {A.shape[-2]} x {A.shape[-1]}; it must be square (Hermitian): pass a square matrix, "
            "or use torch.linalg.svd for singular values"
        )
    check_dtype(A, name)


def check_dtype(A: Tensor, name: str) -> None:
    dtype = A.dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"lobpcg: {name} has dtype {dtype}, which is unsupported; convert it to torch.float32 or torch.float64"
        )
    if dtype not in _DTYPES:
        raise TypeError(
            f"lobpcg: {name} has dtype {dtype}; it must be torch.float32, torch.float64, torch.complex64 or "
            "torch.complex128: convert it first"
        )


def check_alike(T: Tensor, name: str, model: Tensor, model_name: str) -> None:
    if T.dtype != model.dtype:
        raise TypeError(
            f"lobpcg: {name} has dtype {T.dtype}, {model_name} has {model.dtype}; they must be the same: convert one "
            "of them"
        )
    if T.device != model.device:
        raise ValueError(
            f"lobpcg: {name} is on {T.device}, {model_name} on {model.device}; they must be on one device: move one of "
            "them"
        )


def check_block(T: Tensor, name: str, m: int) -> None:
    if T.dim() < 2 or T.shape[-2] != m:
        raise ValueError(
            f"lobpcg: {name} has shape {list(T.shape)}; it must be (*, m, ...) with m={m}, the size of A"
        )


def batch_shape(**operands: Any) -> List[int]:
    """The batch shape of the tensors among the named operands together; ValueError where they do not broadcast.

    Not torch.broadcast_shapes: its first call imports a symbolic algebra package, 0.8 s.
    """
    shape: List[int] = []
    for name, T in operands.items():
        if isinstance(T, Tensor) and (shape or T.dim() > 2):
            shape = _broadcast(shape, list(T.shape[:-2]), name)
    return shape


def _broadcast(shape: Sequence[int], batch: Sequence[int], name: str) -> List[int]:
    length = max(len(shape), len(batch))
    pairs = zip(
        [1] * (length - len(shape)) + list(shape),
        [1] * (length - len(batch)) + list(batch),
    )
    out = []
    for a, b in pairs:
        if a != b and a != 1 and b != 1:
            raise ValueError(
                f"lobpcg: the batch dimensions of {name}, {list(batch)}, do not broadcast with {list(shape)}; give "
                "them the same batch shape, or none"
            )
        out.append(b if a == 1 else a)
    return out


def check_counts(m: int, k: int, n: int, niter: int) -> None:
    if k < 1:
        raise ValueError(f"lobpcg: k={k} pairs asked for; k must be at least 1")
    if k > m:
        raise ValueError(
            f"lobpcg: k={k} pairs asked for of a matrix of size m={m}; k <= m is needed: reduce k"
        )
    if k > n:
        raise ValueError(
            f"lobpcg: k={k} pairs asked for with a block of n={n} columns; k <= n is needed: raise n or pass more "
            "columns in X"
        )
    if n > m:
        raise ValueError(
            f"lobpcg: a block of n={n} columns for a matrix of size m={m}; n <= m is needed: reduce k or n"
        )
    if niter < -1:
        raise ValueError(
            f"lobpcg: niter={niter}; it must be at least 0, or -1 to iterate until the residual cannot improve"
        )
