"""Placeholder until the derivative lands: the forward alone."""

import torch


class LOBPCGAutogradFunction(torch.autograd.Function):
    pass


def differentiable_eigenpairs(A, B, X, iK, solve, k, largest, tol):
    pairs = solve(A, B, X, iK)
    return pairs.E[..., :k], pairs.X[..., :k]
