"""The two plots of the note on derivatives of lobpcg: error of a gradient against tolerance, and against a gap.

usage: python plots.py [FOLDER]        (default: docs/source/notes, two folders up)

Every reference is the gradient in closed form: matrices are built as Q diag(e) Q^T from chosen eigenvalues e and
orthogonal Q, and the gradient of tr(W P) in A, P the projector onto the first k columns of Q, is

    g = Q (M o H) Q^T,   M = Q^T W Q,   H_ij = H_ji = 1 / (e_i - e_j) for i < k <= j, and 0 elsewhere.

Needs matplotlib; the measurements alone (`tolerance_curve`, `gap_curve`) need PyTorch only.
"""

import sys
import warnings
from pathlib import Path

import torch


TOLERANCES = tuple(10.0**-p for p in range(2, 13))
GAPS = tuple(10.0**-p for p in range(1, 17))


def orthogonal(m, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(
        torch.randn(m, m, dtype=torch.float64, generator=generator)
    ).Q


def weights(m, seed):
    """The symmetric W of the loss."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, m, dtype=torch.float64, generator=generator)
    return (W + W.mT) / 2


def exact_gradient(e, Q, W, k):
    """The gradient in A = Q diag(e) Q^T of tr(W P), P the projector onto the k smallest."""
    H = torch.zeros(len(e), len(e), dtype=e.dtype)
    H[:k, k:] = 1 / (e[:k, None] - e[None, k:])
    return Q @ ((Q.mT @ W @ Q) * (H + H.mT)) @ Q.mT


def gradient(A, W, k, eigenvectors):
    """The gradient in A of tr(W X X^T) with X = eigenvectors(A)."""
    A = A.clone().requires_grad_()
    X = eigenvectors(A)
    ((W @ X) * X).sum().backward()
    return (A.grad + A.grad.mT) / 2


def relative_error(value, reference):
    return float(
        torch.linalg.vector_norm(value - reference)
        / torch.linalg.vector_norm(reference)
    )


def tolerance_curve(m, k=3, tolerances=TOLERANCES):
    """Relative errors of the gradient through torch.lobpcg, iterated to each tolerance."""
    # k eigenvalues, a gap of 1/20 of the width, and the rest evenly spaced
    e = torch.cat(
        [torch.arange(k) / 100, torch.linspace(0.05 + (k - 1) / 100, 1, m - k)]
    ).double()
    Q, W = orthogonal(m, 0), weights(m, 1)
    A, reference = (Q * e) @ Q.mT, exact_gradient(e, Q, W, k)
    return [
        relative_error(
            gradient(
                A,
                W,
                k,
                lambda A, tol=tol: torch.lobpcg(
                    A, k, largest=False, method="ortho", tol=tol
                )[1],
            ),
            reference,
        )
        for tol in tolerances
    ]


def gap_curve(eigenvectors, m=60, k=4, gaps=GAPS):
    """Relative errors of the gradient, the larger of two matrices, where eigenvalues 1 and 2 differ by each gap."""
    errors = []
    for gap in gaps:
        e = torch.linspace(1, 2, m, dtype=torch.float64)
        e[:k] = torch.tensor([0.0, 0.2, 0.2 + gap, 0.5], dtype=torch.float64)
        both = []
        for seed in (2, 4):
            Q, W = orthogonal(m, seed), weights(m, seed + 1)
            both.append(
                relative_error(
                    gradient((Q * e) @ Q.mT, W, k, eigenvectors),
                    exact_gradient(e, Q, W, k),
                )
            )
        errors.append(max(both))
    return errors


def by_eigh(A, k=4):
    return torch.linalg.eigh(A).eigenvectors[:, :k]


def by_lobpcg(A, k=4):
    return torch.lobpcg(A, k, largest=False, method="ortho", tol=1e-12)[1]


def draw(path, curves, x, xlabel, guides):
    """One picture: named curves over x, and dotted lines, each a text and its (x, y) at two ends."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same bytes in every run
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, errors), marker in zip(curves.items(), "os"):
        axes.loglog(x, errors, marker + "-", label=name, markersize=5)
    for text, ends in guides.items():
        axes.loglog(*zip(*ends), ":", color="gray")
        axes.annotate(
            text, ends[0], textcoords="offset points", xytext=(6, -10), color="gray"
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel("relative error of the gradient")
    axes.set_ylim(1e-16, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # Matplotlib ends lines of paths in blanks, which PyTorch's linters do not take.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


def main(folder):
    warnings.simplefilter(
        "ignore", RuntimeWarning
    )  # of loose tolerances and small gaps, which are what is drawn
    curves = {f"m = {m}": tolerance_curve(m) for m in (300, 200)}
    guides = {
        "slope 1": ((1e-11, 4e-12), (1e-3, 4e-4)),
        "slope 2": ((1e-7, 3e-13), (1e-3, 3e-5)),
    }
    draw(folder / "lobpcg_tolerance.svg", curves, TOLERANCES, "tol", guides)
    curves = {
        "torch.linalg.eigh": gap_curve(by_eigh),
        "torch.lobpcg": gap_curve(by_lobpcg),
    }
    guides = {"eps / gap": ((1e-3, 2e-13), (1e-15, 2e-1))}
    draw(
        folder / "lobpcg_gap.svg",
        curves,
        GAPS,
        "gap between two of the k eigenvalues",
        guides,
    )


if __name__ == "__main__":
    main(
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else Path(__file__).resolve().parents[2] / "notes"
    )
