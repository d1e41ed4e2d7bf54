"""Run by smoke.py in the interpreter of a patched PyTorch: a solve with its gradient, and a gradcheck.

    INTERPRETER smoke_call.py FOLDER

FOLDER is the one that is to hold torch. What is at work is printed before it is done, so that the last line says what
failed. A path of 60 springs has the eigenvalues 2 - 2 cos(j pi / 61) and sine vectors, so every answer is known.
"""

import math
import os
import sys


del sys.path[0]  # the folder of this script, whose modules are none of torch's


def solve_and_differentiate() -> None:
    """Iterations on a sparse matrix; the gradient lies on its entries and is x_i x_j, by first-order perturbation."""
    import torch

    m = 60
    i = torch.arange(m)
    rows, columns = torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])
    values = torch.cat([torch.full((m,), 2.0), torch.full((2 * m - 2,), -1.0)]).double().requires_grad_()
    A = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (m, m))
    E, _ = torch.lobpcg(A, k=2, largest=False, tol=1e-10, method="ortho")
    (gradient,) = torch.autograd.grad(E[0], values)
    x = torch.sin((i + 1.0).double() * math.pi / (m + 1)) * math.sqrt(2 / (m + 1))
    exact = [2 - 2 * math.cos(j * math.pi / (m + 1)) for j in (1, 2)]
    error = max(abs(found - right) for found, right in zip(E.tolist(), exact, strict=True))
    off = float((gradient - x[rows] * x[columns]).abs().max())
    if not error < 1e-9:
        raise ArithmeticError(f"eigenvalues {error:.0e} off")
    if not off < 1e-7:
        raise ArithmeticError(f"gradient {off:.0e} off")


def check_gradient() -> None:
    import torch

    A = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)) + 0.1
    right = torch.autograd.gradcheck(lambda A: torch.lobpcg(A, k=2)[0], (A.requires_grad_(),), symmetric=True)
    if not right:
        raise ArithmeticError("gradcheck says no")


def main(folder: str) -> None:
    print("import torch", flush=True)
    import torch

    # not where a linked file leads to, which may be a package manager's cache
    found = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__))))
    if found != os.path.realpath(folder):
        raise ImportError(f"this interpreter imports the torch in {found}")
    print("one solve with its gradient", flush=True)
    solve_and_differentiate()
    print("one gradcheck", flush=True)
    check_gradient()


if __name__ == "__main__":
    main(sys.argv[1])
