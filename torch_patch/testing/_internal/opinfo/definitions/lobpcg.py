# mypy: ignore-errors

"""The operator database's entry for torch.lobpcg.

A dense matrix enters through its Hermitian part, so samples need not be Hermitian, and gradcheck may perturb one entry
at a time. B is positive definite with room for perturbations.
"""

import unittest

import torch
from torch.testing import make_tensor
from torch.testing._internal.common_dtype import floating_and_complex_types
from torch.testing._internal.opinfo.core import (
    DecorateInfo,
    ErrorInput,
    OpInfo,
    SampleInput,
)


def _gauge_invariant(output):
    """Eigenvalues, and for each vector its projector x x^H, which sees neither sign nor phase: (*, m, m, k)."""
    E, X = output
    # not X.conj(): forward mode under the vmap of gradcheck has no lazy conjugation
    return E, X.unsqueeze(-2) * torch.conj_physical(X).unsqueeze(-3)


def _matrices(device, dtype, requires_grad, batch, m):
    """A with eigenvalues about 1 apart, one of them far from the rest, and a positive definite B."""
    diagonal = torch.arange(m, device=device).to(dtype)
    A, B = (
        make_tensor((*batch, m, m), dtype=dtype, device=device, low=-0.1, high=0.1)
        for _ in range(2)
    )
    A = A + torch.diag(diagonal - 1)
    B = B + torch.diag(diagonal / (2 * m) + 1)
    return A.requires_grad_(requires_grad), B.requires_grad_(requires_grad)


def sample_inputs_lobpcg(op_info, device, dtype, requires_grad=False, **kwargs):
    """Dense and iterative solves; one pair and several; with and without B; one matrix, batches and an empty batch."""

    def sample(m, k, batch=(), generalized=False, **options):
        A, B = _matrices(device, dtype, requires_grad, batch, m)
        args = (k, B) if generalized else (k,)
        return SampleInput(
            A, args=args, kwargs=options, output_process_fn_grad=_gauge_invariant
        )

    # Iterated to rounding, so that differences of two results show their derivative.
    iterated = {"method": "ortho", "tol": 8 * torch.finfo(dtype).eps}
    yield sample(1, 1)
    yield sample(5, 1)
    yield sample(5, 2, largest=False)
    yield sample(5, 2, generalized=True)
    yield sample(4, 2, batch=(2,), generalized=True, largest=False)
    yield sample(4, 1, batch=(0,))
    yield sample(9, 2, n=3, **iterated)
    yield sample(9, 2, generalized=True, largest=False, n=3, **iterated)


def error_inputs_lobpcg(op_info, device, **kwargs):
    """Every case must be refused before anything is computed."""
    A = torch.eye(5, device=device)
    nan = A.clone()
    nan[0, 0] = float("nan")
    yield ErrorInput(
        SampleInput(A[:4], args=(1,)), error_type=ValueError, error_regex="square"
    )
    yield ErrorInput(
        SampleInput(A[0], args=(1,)), error_type=ValueError, error_regex="1 dimensions"
    )
    yield ErrorInput(
        SampleInput(A, args=(6,)), error_type=ValueError, error_regex="k=6"
    )
    yield ErrorInput(
        SampleInput(A, args=(1, A[:4, :4])), error_type=ValueError, error_regex="B has"
    )
    yield ErrorInput(
        SampleInput(A, args=(1, A.double())),
        error_type=TypeError,
        error_regex="float64",
    )
    yield ErrorInput(
        SampleInput(A.half(), args=(1,)), error_type=TypeError, error_regex="float16"
    )
    yield ErrorInput(
        SampleInput(nan, args=(1,)), error_type=ValueError, error_regex="NaN"
    )
    yield ErrorInput(
        SampleInput(A, args=(2,), kwargs={"niter": 5}),
        error_type=ValueError,
        error_regex="torch.linalg.eigh",
    )


op_db = [
    OpInfo(
        "lobpcg",
        op=torch.lobpcg,
        dtypes=floating_and_complex_types(),
        sample_inputs_func=sample_inputs_lobpcg,
        error_inputs_func=error_inputs_lobpcg,
        supports_out=False,
        supports_forward_ad=True,
        supports_fwgrad_bwgrad=True,
        # The operator that a scripted call is lives in Python, and a traced graph holds a Python autograd Function,
        # which torch.jit.save does not write.
        supports_scripting=False,
        supports_tracing=False,
        skips=(
            # Convergence decides on values, so .item() is called, which these tests forbid.
            *(
                DecorateInfo(unittest.expectedFailure, "TestCompositeCompliance", test)
                for test in ("test_operator", "test_backward", "test_forward_ad")
            ),
        ),
    ),
]
