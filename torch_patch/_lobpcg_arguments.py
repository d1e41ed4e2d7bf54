"""Checks of lobpcg's arguments: what shapes, dtypes and numbers tell before any product (TorchScript dialect).

Nothing here reads a tensor's values, so the checks hold under every transform; values are checked by _lobpcg_solver.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch._lobpcg_operator import epsilon


class Settings(NamedTuple):
    """What lobpcg was asked for, defaults filled in. n: block size; chosen: columns of it that the caller chose (X)."""

    k: int
    n: int
    chosen: int
    niter: int
    tol: float
    largest: bool
    method: str
    iterate: bool  # method, niter or tracker given: never replaced by a dense solve
    separate: bool  # a derivative may be asked for: go on until the distance to the next eigenvalue is known


def check_matrix(A: Tensor, name: str) -> None:
    if A.dim() < 2:
        raise ValueError(
            f"lobpcg: {name} has {A.dim()} dimensions; it must be a matrix or a batch of matrices (*, m, m)"
        )
    if A.size(-1) != A.size(-2):
        raise ValueError(
            f"lobpcg: {name} is {A.size(-2)} x {A.size(-1)}; it must be square (Hermitian): pass a square matrix, "
            "or use torch.linalg.svd for singular values"
        )
    check_dtype(A, name)


def check_dtype(A: Tensor, name: str) -> None:
    dtype = A.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        raise TypeError(
            f"lobpcg: {name} has dtype {dtype}, which is unsupported; convert it to torch.float32 or torch.float64"
        )
    if not (dtype == torch.float32 or dtype == torch.float64 or dtype == torch.complex64 or dtype == torch.complex128):
        raise TypeError(
            f"lobpcg: {name} has dtype {dtype}; it must be torch.float32, torch.float64, torch.complex64 or "
            f"torch.complex128: "
            "convert it first"
        )


def check_alike(T: Tensor, name: str, model: Tensor, model_name: str) -> None:
    if T.dtype != model.dtype:
        raise TypeError(
            f"lobpcg: {name} has dtype {T.dtype}, {model_name} has {model.dtype}; they must be the same: convert one "
            f"of them"
        )
    if T.device != model.device:
        raise ValueError(
            f"lobpcg: {name} is on {T.device}, {model_name} on {model.device}; they must be on one device: move one of "
            f"them"
        )


def check_block(T: Tensor, name: str, m: int) -> None:
    if T.dim() < 2 or T.size(-2) != m:
        raise ValueError(f"lobpcg: {name} has shape {list(T.shape)}; it must be (*, m, ...) with m={m}, the size of A")


def check_broadcast(shape: list[int], T: Tensor, name: str) -> list[int]:
    """Batch shape of `shape` and T's leading dimensions together."""
    batch = list(T.shape[:-2])
    out: list[int] = []
    length = max(len(shape), len(batch))
    for i in range(length):
        a = shape[i - length + len(shape)] if i - length + len(shape) >= 0 else 1
        b = batch[i - length + len(batch)] if i - length + len(batch) >= 0 else 1
        if a != b and a != 1 and b != 1:
            raise ValueError(
                f"lobpcg: the batch dimensions of {name}, {batch}, do not broadcast with {shape}; give them the same "
                f"batch shape, or none"
            )
        out.append(b if a == 1 else a)
    return out


def check_counts(m: int, k: int, n: int, niter: int) -> None:
    if k < 1:
        raise ValueError(f"lobpcg: k={k} pairs asked for; k must be at least 1")
    if k > n:
        raise ValueError(
            f"lobpcg: k={k} pairs asked for with a block of n={n} columns; k <= n is needed: raise n or pass more "
            f"columns in X"
        )
    if n > m:
        raise ValueError(
            f"lobpcg: a block of n={n} columns for a matrix of size m={m}; n <= m is needed: reduce k or n"
        )
    if niter < -1:
        raise ValueError(
            f"lobpcg: niter={niter}; it must be at least 0, or -1 to iterate until the residual cannot improve"
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
    tracked: bool,
) -> Settings:
    """Fill in the defaults; columns: those of X, if X was given. Raises ValueError on numbers that do not fit each
    other."""
    width = 1 if columns is None else columns
    wanted = width if k is None else k
    chosen = 0 if columns is None else columns
    if columns is not None:
        block = columns
    elif n is not None:
        block = n
    else:
        # Guard columns separate the wanted pairs from the rest: as many again, four at least, halve the iterations, and
        # the time. Branches, not min and max: a traced m then leaves a bound on m behind and n a number.
        block = wanted + max(4, wanted)
        if m // 3 < block:
            block = max(wanted, m // 3)
    steps = 1000 if niter is None else niter
    check_counts(m, wanted, block, steps)
    name = "ortho" if method is None else method
    if name != "ortho" and name != "basic":
        raise ValueError(f"lobpcg: unknown method '{name}'; it must be 'ortho' or 'basic'")
    tolerance = epsilon(dtype) ** 0.5 if tol is None else tol
    if not tolerance >= 0.0:
        raise ValueError(f"lobpcg: tol={tolerance}; it must be a number >= 0")
    iterate = tracked or method is not None or niter is not None
    if iterate and m < 3 * block:
        raise ValueError(
            f"lobpcg: expected m >= 3*n, got m={m}, n={block}; reduce n, or leave method, niter and tracker out to "
            f"have a dense "
            "solve, or use torch.linalg.eigh"
        )
    return Settings(wanted, block, chosen, steps, tolerance, True if largest is None else largest, name, iterate, False)


class OrthoParameters(NamedTuple):
    """The caller's ortho_iparams, ortho_fparams, ortho_bparams, keys prefixed with "ortho_" as the worker shows
    them."""

    integers: dict[str, int]
    floats: dict[str, float]
    flags: dict[str, bool]


def ortho_parameters(
    iparams: Optional[dict[str, int]], fparams: Optional[dict[str, float]], bparams: Optional[dict[str, bool]]
) -> OrthoParameters:
    integers: dict[str, int] = {}
    floats: dict[str, float] = {}
    flags: dict[str, bool] = {}
    if iparams is not None:
        for name, number in iparams.items():
            integers["ortho_" + name] = number
    if fparams is not None:
        for name, value in fparams.items():
            floats["ortho_" + name] = value
    if bparams is not None:
        for name, flag in bparams.items():
            flags["ortho_" + name] = flag
    return OrthoParameters(integers, floats, flags)
