"""The entry for lobpcg in PyTorch's operator database is found there; its samples and refusals are what it says."""

import re

import pytest

import torch
from torch.testing._internal.common_methods_invocations import op_db


(ENTRY,) = [op for op in op_db if op.name == "lobpcg"]


def hermitian(M):
    return (M + M.mH) / 2


@pytest.mark.parametrize("dtype", sorted(ENTRY.dtypes, key=str), ids=str)
def test_samples_have_the_pairs_of_a_dense_solve(dtype):
    samples = list(ENTRY.sample_inputs("cpu", dtype))
    assert {len(sample.args) for sample in samples} == {1, 2}
    for sample in samples:
        A, k = sample.input, sample.args[0]
        B = sample.args[1] if len(sample.args) == 2 else torch.eye(A.shape[-1], dtype=dtype)
        E, X = ENTRY(A, *sample.args, **sample.kwargs)
        exact = torch.linalg.eigvals(torch.linalg.solve(hermitian(B), hermitian(A))).real.sort(-1).values
        exact = exact[..., :k] if sample.kwargs.get("largest") is False else exact.flip(-1)[..., :k]
        torch.testing.assert_close(E, exact, rtol=1e-4, atol=1e-4)
        values, projectors = sample.output_process_fn_grad((E, X * -1))
        assert values is E
        torch.testing.assert_close(projectors, X.unsqueeze(-2) * X.conj().unsqueeze(-3), rtol=0, atol=0)


def test_gaps_leave_room_for_differences():
    for sample in ENTRY.sample_inputs("cpu", torch.complex128):
        gaps = torch.linalg.eigvalsh(hermitian(sample.input)).diff(dim=-1)
        assert bool((gaps > 0.3).all())


def test_refusals():
    cases = list(ENTRY.error_inputs("cpu"))
    assert len(cases) > 5
    for case in cases:
        sample = case.sample_input
        with pytest.raises(case.error_type) as caught:
            ENTRY(sample.input, *sample.args, **sample.kwargs)
        assert re.search(case.error_regex, str(caught.value))
