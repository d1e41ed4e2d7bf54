"""Every displayed formula of the documentation, evaluated.

The other side of a comparison comes from scipy.linalg.eigh of the whole pencil, from its finite differences, or from a
definition; no formula is compared with torch.lobpcg. An evaluation holds the formula as it is displayed, so that
neither changes without the other.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

import torch


NOTES = Path(__file__).resolve().parent.parent / "docs_patch" / "source" / "notes"
PAGES = {"lobpcg": NOTES / "lobpcg_gradient.rst", "gradcheck": NOTES / "gradcheck_symmetric.rst"}
STEP = 1e-5  # central differences in double precision: error STEP^2 from the third derivative, eps / STEP from rounding
DIFFERENCES = 2e-7
EXACT = 1e-11


# --- what is displayed -------------------------------------------------------------------------------------------


def displays(text):
    """[(label, formula with single blanks)] of every math directive; the label may be a number behind the formula."""
    found = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        start = re.match(r"( *)\.\. math::(.*)", line)
        if not start:
            continue
        label, body = None, [start[2]]
        for more in lines[i + 1 :]:
            if more.strip() and len(more) - len(more.lstrip()) <= len(start[1]):
                break
            option = re.match(r" *:label: (\S+)", more)
            label = option[1] if option else label
            body += [] if option else [more]
        formula = " ".join(" ".join(body).split())
        number = re.search(r" \\qquad \((\d+)\)$", formula)
        if number:
            label, formula = f"gradcheck-{number[1]}", formula[: number.start()]
        found.append((label, formula))
    return found


FORMULAS = {}


def evaluates(label, formula):
    """The decorated function yields (left, right, bound) for each equation, or a truth value for each claim."""

    def register(function):
        FORMULAS[label] = (" ".join(formula.split()), function)
        return function

    return register


@pytest.mark.parametrize("page", PAGES)
def test_every_display_has_an_evaluation(page):
    shown = displays(PAGES[page].read_text(encoding="utf-8"))
    assert len(shown) > 4
    assert shown == [(label, FORMULAS.get(label, ("nothing",))[0]) for label, _ in shown]
    assert {label for label, _ in shown} == {label for label in FORMULAS if label.startswith(page + "-")}


def test_display_of_the_docstring():
    ((_, formula),) = displays(torch.lobpcg.__doc__)
    assert formula.rstrip(",") == FORMULAS["lobpcg-pencil"][0].rstrip(".")


# --- the problem -------------------------------------------------------------------------------------------------


def herm(M):
    return (M + M.conj().T) / 2


def skew(M):
    return (M - M.conj().T) / 2


def real_trace(M):
    return float(np.trace(M).real)


def solve(A, B):
    """All eigenvalues in ascending order and B-orthonormal vectors."""
    return scipy.linalg.eigh(A, B)


class Pencil:
    """A, B of order m with all eigenpairs, k extreme ones of them, a direction dA, dB, and a loss of the k pairs.

    The loss sum_j sin(E_j) + w_j x_j^H M x_j does not see phases, but distinguishes the vectors.
    """

    m, k = 9, 3

    def __init__(self, largest, number, seed=0):
        self.random = np.random.default_rng(seed)
        self.complex, self.largest = number == "complex", largest
        R = self.matrix(self.m, self.m)
        self.A, self.B = herm(self.matrix(self.m, self.m)), R @ R.conj().T / self.m + np.eye(self.m)
        self.dA, self.dB = herm(self.matrix(self.m, self.m)), herm(self.matrix(self.m, self.m))
        self.M, self.w = herm(self.matrix(self.m, self.m)), np.arange(1.0, self.k + 1)
        self.E, self.X, self.mu, self.U = self.pairs(self.A, self.B)
        self.gE, self.gX = np.cos(self.E), 2 * self.M @ self.X * self.w
        self.L, self.I = np.diag(self.E), np.eye(self.m)
        self.G, self.S, self.D = self.H(self.X) @ self.gX, None, self.H(self.X) @ self.dB @ self.X
        self.F = self.factors()
        self.b = self.dA @ self.X - self.dB @ self.X @ self.L
        self.S = self.H(self.X) @ self.b
        self.W = self.X @ (np.diag(self.gE) + skew(self.G) * self.F) - self.resolved(self.gX)

    @staticmethod
    def H(M):
        return M.conj().T

    def matrix(self, *shape):
        M = self.random.standard_normal(shape)
        return M + 1j * self.random.standard_normal(shape) if self.complex else M

    def pairs(self, A, B):
        """The k extreme pairs, and the others."""
        E, X = solve(A, B)
        if self.largest:
            E, X = E[::-1], X[:, ::-1]
        return E[: self.k], X[:, : self.k], E[self.k :], X[:, self.k :]

    def factors(self):
        gap = self.E[None, :] - self.E[:, None]
        return np.where(gap == 0, 0, 1 / np.where(gap == 0, 1, gap))

    def resolved(self, b):
        """R_j b_j by least squares on the two equations that define it, column by column."""
        columns = []
        for j in range(self.k):
            top = (self.A - self.E[j] * self.B, (self.I - self.B @ self.X @ self.H(self.X)) @ b[:, j])
            bottom = (self.H(self.X) @ self.B, np.zeros(self.k))
            matrix, right = np.concatenate([top[0], bottom[0]]), np.concatenate([top[1], bottom[1]])
            columns.append(np.linalg.lstsq(matrix, right, rcond=None)[0])
        return np.stack(columns, 1)

    def loss(self, A, B):
        E, X, _, _ = self.pairs(A, B)
        return np.sin(E).sum() + float((self.w * np.einsum("ij,ij->j", X.conj(), self.M @ X).real).sum())

    def aligned(self, t):
        """E and X at A + t dA, B + t dB, with the phases for which X(0)^H B X(t) has a positive real diagonal."""
        E, X, _, _ = self.pairs(self.A + t * self.dA, self.B + t * self.dB)
        d = np.diagonal(self.H(self.X) @ self.B @ X)
        return E, X * (d.conj() / abs(d))

    def differential(self, dA=None, dB=None):
        """dL by central differences."""
        dA, dB = (np.zeros_like(self.A) if d is None else d for d in (dA, dB))
        up, down = (self.loss(self.A + t * dA, self.B + t * dB) for t in (STEP, -STEP))
        return (up - down) / (2 * STEP)

    def tangents(self):
        """dE, dX by central differences."""
        (E1, X1), (E0, X0) = self.aligned(STEP), self.aligned(-STEP)
        return (E1 - E0) / (2 * STEP), (X1 - X0) / (2 * STEP)


# --- result ------------------------------------------------------------------------------------------------------


@evaluates("lobpcg-pencil", r"A X = B X \Lambda, \qquad X^H B X = I.")
def _(p):
    yield p.A @ p.X, p.B @ p.X @ p.L, EXACT
    yield p.H(p.X) @ p.B @ p.X, np.eye(p.k), EXACT


@evaluates(
    "lobpcg-small",
    r"G = X^H g_X, \qquad F_{ij} = \frac{1}{E_j - E_i} \;\; (E_i \neq E_j), \qquad F_{ij} = 0 \;\; \text{otherwise},",
)
def _(p):
    # What each is for: G_ij pairs the cotangent with X_j <- X_i, and F inverts C -> C L - L C off the diagonal.
    for i in range(p.k):
        for j in range(p.k):
            direction = np.zeros((p.k, p.k))
            direction[i, j] = 1
            yield real_trace(p.H(p.gX) @ p.X @ direction), p.G[i, j].real, EXACT
    C = p.matrix(p.k, p.k)
    C -= np.diag(np.diagonal(C))
    yield (C @ p.L - p.L @ C) * p.F, C, EXACT
    assert not np.diagonal(p.F).any()


@evaluates("lobpcg-resolvent", r"(A - E_j B)\, z = (I - B X X^H)\, b, \qquad X^H B z = 0.")
def _(p):
    b = p.matrix(p.m, p.k)
    z = p.U @ ((p.H(p.U) @ b) / (p.mu[:, None] - p.E[None, :]))  # by the pairs that were not computed
    for j in range(p.k):
        yield (p.A - p.E[j] * p.B) @ z[:, j], (p.I - p.B @ p.X @ p.H(p.X)) @ b[:, j], EXACT
    yield p.H(p.X) @ p.B @ z, np.zeros((p.k, p.k)), EXACT
    yield p.resolved(b), z, EXACT


@evaluates(
    "lobpcg-factor",
    r"W = X \bigl( \operatorname{diag}(g_E) + \operatorname{Skew}(G) \circ F \bigr) - Z, \qquad Z_j = R_j\, g_{X,j},",
)
def _(p):
    W = p.X @ (np.diag(p.gE) + skew(p.G) * p.F) - p.resolved(p.gX)
    yield real_trace(p.H(W) @ p.dA @ p.X), p.differential(dA=p.dA), DIFFERENCES


@evaluates("lobpcg-gradient-a", r"g_A = \operatorname{Herm}(W X^H),")
def _(p):
    gA = herm(p.W @ p.H(p.X))
    for _ in range(4):
        dA = herm(p.matrix(p.m, p.m))
        yield real_trace(p.H(gA) @ dA), p.differential(dA=dA), DIFFERENCES


@evaluates(
    "lobpcg-gradient-b",
    r"g_B = -\operatorname{Herm}(W \Lambda X^H) - \tfrac12\, X \operatorname{Herm}(G)\, X^H.",
)
def _(p):
    gB = -herm(p.W @ p.L @ p.H(p.X)) - p.X @ herm(p.G) @ p.H(p.X) / 2
    for _ in range(4):
        dB = herm(p.matrix(p.m, p.m))
        yield real_trace(p.H(gB) @ dB), p.differential(dB=dB), DIFFERENCES


@evaluates(
    "lobpcg-values-only",
    r"g_A = X \operatorname{diag}(g_E)\, X^H, \qquad g_B = -X \operatorname{diag}(g_E \circ E)\, X^H.",
)
def _(p):
    p.w = np.zeros(p.k)
    yield real_trace(p.X @ np.diag(p.gE) @ p.H(p.X) @ p.dA), p.differential(dA=p.dA), DIFFERENCES
    yield real_trace(-p.X @ np.diag(p.gE * p.E) @ p.H(p.X) @ p.dB), p.differential(dB=p.dB), DIFFERENCES


# --- derivation --------------------------------------------------------------------------------------------------


@evaluates(
    "lobpcg-differential",
    r"""\begin{aligned} dA\, X + A\, dX &= dB\, X \Lambda + B\, dX\, \Lambda + B X\, d\Lambda, \\
    dX^H B X + X^H dB\, X + X^H B\, dX &= 0. \end{aligned}""",
)
def _(p):
    dE, dX = p.tangents()
    yield p.dA @ p.X + p.A @ dX, p.dB @ p.X @ p.L + p.B @ dX @ p.L + p.B @ p.X @ np.diag(dE), DIFFERENCES
    yield p.H(dX) @ p.B @ p.X + p.D + p.H(p.X) @ p.B @ dX, np.zeros((p.k, p.k)), DIFFERENCES


@evaluates("lobpcg-drive", r"b = dA\, X - dB\, X \Lambda, \qquad S = X^H b.")
def _(p):
    b = p.dA @ p.X - p.dB @ p.X @ p.L
    dE, dX = p.tangents()
    yield b, p.B @ dX @ p.L + p.B @ p.X @ np.diag(dE) - p.A @ dX, DIFFERENCES
    C = p.H(p.X) @ p.B @ dX
    yield p.H(p.X) @ b, np.diag(dE) - p.L @ C + C @ p.L, DIFFERENCES


@evaluates("lobpcg-values-forward", r"dE = \operatorname{Re} \operatorname{diag}(S),")
def _(p):
    yield np.diagonal(p.S).real, p.tangents()[0], DIFFERENCES


@evaluates(
    "lobpcg-skew",
    r"""\operatorname{Skew}(S) = -\tfrac12 (D \Lambda - \Lambda D), \qquad
    \operatorname{Skew}(S)_{ij} F_{ij} = -\tfrac12 D_{ij} \quad (E_i \neq E_j).""",
)
def _(p):
    yield skew(p.S), -(p.D @ p.L - p.L @ p.D) / 2, EXACT
    off = ~np.eye(p.k, dtype=bool)
    yield (skew(p.S) * p.F)[off], -p.D[off] / 2, EXACT


@evaluates("lobpcg-inside", r"C = \operatorname{Herm}(S) \circ F - \tfrac12\, X^H dB\, X,")
def _(p):
    yield herm(p.S) * p.F - p.H(p.X) @ p.dB @ p.X / 2, p.H(p.X) @ p.B @ p.tangents()[1], DIFFERENCES


@evaluates(
    "lobpcg-vectors-forward",
    r"dX = X \bigl( \operatorname{Herm}(S) \circ F - \tfrac12\, X^H dB\, X \bigr) - [R_j\, b_j].",
)
def _(p):
    yield p.X @ (herm(p.S) * p.F - p.H(p.X) @ p.dB @ p.X / 2) - p.resolved(p.b), p.tangents()[1], DIFFERENCES


@evaluates(
    "lobpcg-adjoint",
    r"""dL = \operatorname{Re} \operatorname{tr}(W^H b)
    - \tfrac12 \operatorname{Re} \operatorname{tr}\bigl( X \operatorname{Herm}(G)\, X^H\, dB \bigr).""",
)
def _(p):
    dL = real_trace(p.H(p.W) @ p.b) - real_trace(p.X @ herm(p.G) @ p.H(p.X) @ p.dB) / 2
    yield dL, p.differential(p.dA, p.dB), DIFFERENCES


# --- resolvent ---------------------------------------------------------------------------------------------------


@evaluates("lobpcg-spectral", r"R_j = \sum_{i > k} \frac{u_i u_i^H}{\mu_i - E_j}.")
def _(p):
    b = p.matrix(p.m, p.k)
    for j in range(p.k):
        R = sum(np.outer(u, u.conj()) / (mu - p.E[j]) for mu, u in zip(p.mu, p.U.T))
        yield R @ b[:, j], p.resolved(b)[:, j], EXACT
        signs = np.sign(p.mu - p.E[j])
        assert (signs == (-1 if p.largest else 1)).all()


@evaluates("lobpcg-condition", r"\kappa_j = \frac{\max_i |\mu_i - E_j|}{\min_i |\mu_i - E_j|},")
def _(p):
    # the condition number of A - E_j B between the complement of X and its dual, in coordinates orthonormal in B
    Q = scipy.linalg.null_space(p.H(p.X) @ p.B)
    Q = scipy.linalg.solve_triangular(scipy.linalg.cholesky(p.H(Q) @ p.B @ Q, lower=True), p.H(Q), lower=True)
    for j in range(p.k):
        gaps = abs(p.mu - p.E[j])
        yield gaps.max() / gaps.min(), np.linalg.cond(Q @ (p.A - p.E[j] * p.B) @ p.H(Q)), 1e-9


@evaluates(
    "lobpcg-shifted",
    r"\bigl( s\, (A - E_j B) + \sigma\, (B X)(B X)^H \bigr)\, z = s\, (I - B X X^H)\, b;",
)
def _(p):
    s, b = -1 if p.largest else 1, p.matrix(p.m, p.k)
    z = p.U @ ((p.H(p.U) @ b) / (p.mu[:, None] - p.E[None, :]))
    for j in range(p.k):
        for sigma in (0.1, 3.0):
            K = s * (p.A - p.E[j] * p.B) + sigma * p.B @ p.X @ p.H(p.B @ p.X)
            right = s * (p.I - p.B @ p.X @ p.H(p.X)) @ b[:, j]
            if j == 0:  # semidefinite on span X for the others, where A - E_j B has eigenvalues E_i - E_j
                assert np.linalg.eigvalsh(K).min() > 0
            yield np.linalg.solve(K, right), z[:, j], 1e-9


# --- higher derivatives ------------------------------------------------------------------------------------------


def system(p, A, B, E, X, b):
    """Blocks z and c of all pairs from the full system; A, B, E, X need not be eigenpairs."""
    z, c = [], []
    for j in range(p.k):
        K = np.block([[A - E[j] * B, B @ X], [p.H(X) @ B, np.zeros((p.k, p.k))]])
        solution = np.linalg.solve(K, np.concatenate([b[:, j], np.zeros(p.k)]))
        z.append(solution[: p.m])
        c.append(solution[p.m :])
    return np.stack(z, 1), np.stack(c, 1)


def system_cotangents(p):
    """For the function (A, B, E, X, b) -> z and a cotangent gz: what the formulas need, and dL by differences."""
    b, gz = p.matrix(p.m, p.k), p.matrix(p.m, p.k)
    w, z = p.resolved(gz), p.resolved(b)

    def difference(**directions):
        values = []
        for t in (STEP, -STEP):
            point = {"A": p.A, "B": p.B, "E": p.E, "X": p.X, "b": b}
            point.update({name: point[name] + t * d for name, d in directions.items()})
            values.append(real_trace(p.H(gz) @ system(p, **point)[0]))
        return (values[0] - values[1]) / (2 * STEP)

    return w, z, p.H(p.X) @ b, p.H(p.X) @ gz, difference


@evaluates(
    "lobpcg-system",
    r"""\begin{pmatrix} A - E_j B & B X \\ X^H B & 0 \end{pmatrix} \begin{pmatrix} z_j \\ c_j \end{pmatrix} =
    \begin{pmatrix} b_j \\ 0 \end{pmatrix}.""",
)
def _(p):
    b = p.matrix(p.m, p.k)
    z, c = system(p, p.A, p.B, p.E, p.X, b)
    yield z, p.U @ ((p.H(p.U) @ b) / (p.mu[:, None] - p.E[None, :])), EXACT
    yield c, p.H(p.X) @ b, EXACT


@evaluates(
    "lobpcg-second-vectors",
    r"g_b = w, \qquad g_{E,j} = \operatorname{Re} w_j^H B z_j, \qquad g_X = -B (w c^H + z v^H),",
)
def _(p):
    w, z, c, v, difference = system_cotangents(p)
    db, dE, dX = p.matrix(p.m, p.k), p.random.standard_normal(p.k), p.matrix(p.m, p.k)
    yield real_trace(p.H(w) @ db), difference(b=db), DIFFERENCES
    gE = np.einsum("ij,ij->j", w.conj(), p.B @ z).real
    yield gE @ dE, difference(E=dE), DIFFERENCES
    yield real_trace(p.H(-p.B @ (w @ p.H(c) + z @ p.H(v))) @ dX), difference(X=dX), DIFFERENCES


@evaluates(
    "lobpcg-second-matrices",
    r"""g_A = -\operatorname{Herm}(w z^H), \qquad
    g_B = \operatorname{Herm}\bigl( w \Lambda z^H - w (X c)^H - (X v) z^H \bigr).""",
)
def _(p):
    w, z, c, v, difference = system_cotangents(p)
    yield real_trace(-herm(w @ p.H(z)) @ p.dA), difference(A=p.dA), DIFFERENCES
    gB = herm(w @ p.L @ p.H(z) - w @ p.H(p.X @ c) - p.X @ v @ p.H(z))
    yield real_trace(gB @ p.dB), difference(B=p.dB), DIFFERENCES


# --- existence, sparse gradients, accuracy -----------------------------------------------------------------------


@evaluates(
    "lobpcg-gauge",
    r"""\operatorname{Re} \operatorname{tr}(G^H K) = 0 \;\; \text{for all}\;\; K = -K^H
    \quad \Longleftrightarrow \quad \operatorname{Skew}(G) = 0""",
)
def _(p):
    G = p.matrix(p.k, p.k)
    directions = [skew(p.matrix(p.k, p.k)) for _ in range(2 * p.k**2)]
    for K in directions:
        yield real_trace(p.H(herm(G)) @ K), 0.0, EXACT
    # K = Skew(G) sees any other: Re tr(G^H K) = |K|^2
    K = skew(G)
    yield real_trace(p.H(G) @ K), np.linalg.norm(K) ** 2, EXACT
    # the loss along X exp(t K), at its G: blind for equal weights, not for distinct ones
    for w in (np.ones(p.k), p.w):
        values = []
        for t in (STEP, -STEP):
            X = p.X @ scipy.linalg.expm(t * K)
            values.append((w * np.einsum("ij,ij->j", X.conj(), p.M @ X).real).sum())
        G = p.H(p.X) @ (2 * p.M @ p.X * w)
        yield real_trace(p.H(G) @ K), (values[0] - values[1]) / (2 * STEP), DIFFERENCES
        assert (np.linalg.norm(skew(G)) < EXACT) == (len(set(w)) == 1)


@evaluates(
    "lobpcg-sparse",
    r"""(g_A)_{rc} = \tfrac12 \sum_{j=1}^{k} \bigl( W_{rj} \overline{X_{cj}} + X_{rj} \overline{W_{cj}} \bigr),""",
)
def _(p):
    for r, c in ((0, 0), (1, 4), (4, 1), (7, 2)):
        entry = sum(p.W[r, j] * p.X[c, j].conj() + p.X[r, j] * p.W[c, j].conj() for j in range(p.k)) / 2
        for unit in (1, 1j) if p.complex else (1,):
            dA = np.zeros_like(p.A)
            dA[r, c] = unit
            yield (entry.conjugate() * unit).real, p.differential(dA=herm(dA)), DIFFERENCES


def perturbed(p, size):
    """Approximate pairs: a direction of the other vectors mixed in, then Rayleigh-Ritz. B = I."""
    E, X, mu, U = p.pairs(p.A, p.I)
    Y = np.linalg.qr(X + size * U @ p.matrix(p.m - p.k, p.k))[0]
    ritz, V = np.linalg.eigh(p.H(Y) @ p.A @ Y)
    if p.largest:
        ritz, V = ritz[::-1], V[:, ::-1]
    return E, X, mu, U, ritz, Y @ V


def distance(X, Y):
    """Sine of the angle between lines, column by column."""
    return np.sqrt(np.maximum(0, 1 - abs(np.einsum("ij,ij->j", X.conj(), Y)) ** 2))


@evaluates(
    "lobpcg-residual",
    r"r_j = A X_j - E_j B X_j, \qquad \| X_j - x_j \| \lesssim \frac{\| r_j \|}{\delta_j} \quad (B = I),",
)
def _(p):
    E, X, mu, _, ritz, Y = perturbed(p, 1e-4)
    r = p.A @ Y - Y * ritz
    for j in range(p.k):
        delta = abs(mu - E[j]).min()
        yield distance(X, Y)[j] <= 1.01 * np.linalg.norm(r[:, j]) / delta
    yield distance(X, Y).max() > 1e-6
    yield abs(E - ritz).max() < 10 * np.linalg.norm(r) ** 2 / abs(mu[:, None] - E).min()


@evaluates("lobpcg-newton", r"X_j \leftarrow X_j - R_j\, r_j,")
def _(p):
    errors = []
    for size in (1e-2, 1e-3):
        _, X, _, _, ritz, Y = perturbed(p, size)
        r = p.A @ Y - Y * ritz
        inner = p.I - Y @ p.H(Y)
        step = [np.linalg.lstsq(inner @ (p.A - e * p.I) @ inner, inner @ c, rcond=1e-9)[0] for e, c in zip(ritz, r.T)]
        Z = np.linalg.qr(Y - np.stack(step, 1))[0]
        _, V = np.linalg.eigh(p.H(Z) @ p.A @ Z)
        errors.append(distance(X, Z @ (V[:, ::-1] if p.largest else V)).max())
    # at least quadratic: ten times closer to begin with is a hundred times closer afterwards
    yield errors[1] < errors[0] / 80


# --- gradcheck ---------------------------------------------------------------------------------------------------


def cubic(p, X):
    """A real function of X, and its gradient in the lower triangle (complex: with real diagonal)."""
    return real_trace(p.M @ X @ X @ X)


def cubic_gradient(p, X):
    G = herm(p.M @ X @ X + X @ p.M @ X + X @ X @ p.M)
    return np.tril(G) + np.tril(G, -1)


@evaluates("gradcheck-1", r"\langle X, Y \rangle = \operatorname{Re} \operatorname{tr}(X^H Y).")
def _(p):
    X, Y = p.matrix(p.m, p.m), p.matrix(p.m, p.m)
    yield real_trace(p.H(X) @ Y), (X.real * Y.real + X.imag * Y.imag).sum(), EXACT


@evaluates("gradcheck-2", r"df = \langle G, dX \rangle, \qquad dX = dX^H.")
def _(p):
    df = (cubic(p, p.A + STEP * p.dA) - cubic(p, p.A - STEP * p.dA)) / (2 * STEP)
    yield df, real_trace(p.H(cubic_gradient(p, p.A)) @ p.dA), DIFFERENCES


@evaluates("gradcheck-3", r"P(X) = \tfrac12 (X + X^H).")
def _(p):
    X, Y = p.matrix(p.m, p.m), p.matrix(p.m, p.m)
    P = (X + p.H(X)) / 2
    yield P, p.H(P), EXACT
    yield (P + p.H(P)) / 2, P, EXACT
    yield real_trace(p.H(P) @ Y), real_trace(p.H(X) @ herm(Y)), EXACT


@evaluates("gradcheck-4", r"\nabla (f \circ P)(X) = P(G),")
def _(p):
    gradient = np.zeros_like(p.A)
    for i in range(p.m):
        for j in range(p.m):
            for unit in (1, 1j) if p.complex else (1,):
                d = np.zeros_like(p.A)
                d[i, j] = STEP * unit
                gradient[i, j] += unit * (cubic(p, herm(p.A + d)) - cubic(p, herm(p.A - d))) / (2 * STEP)
    G = cubic_gradient(p, p.A)
    yield gradient, herm(G), DIFFERENCES
    assert np.linalg.norm(skew(G)) > 0.1


class Skewed(torch.autograd.Function):
    """tr(X^2) with a gradient whose skew part has the given relative norm."""

    @staticmethod
    def forward(ctx, X, K, part):
        ctx.save_for_backward(X, K)
        ctx.part = part
        return (X @ X).diagonal().sum().real

    @staticmethod
    def backward(ctx, g):
        X, K = ctx.saved_tensors
        G = 2 * X
        return g * (G + ctx.part * torch.linalg.vector_norm(G) * K / torch.linalg.vector_norm(K)), None, None


@evaluates("gradcheck-5", r"\tfrac12 \| G - G^H \| \le \mathtt{atol} + \mathtt{rtol}\, \| G \|.")
def _(p):
    X, K = torch.from_numpy(p.A).requires_grad_(), torch.from_numpy(skew(p.matrix(p.m, p.m)))
    atol, rtol = 1e-6, 1e-3
    norm = float(torch.linalg.vector_norm(2 * X.detach()))
    for part in (0.5, 0.98, 1.02, 2.0):  # of the bound
        size = part * (atol + rtol * norm) / norm
        passed = torch.autograd.gradcheck(
            lambda X, size=size: Skewed.apply(X, K, size),
            X,
            atol=atol,
            rtol=rtol,
            symmetric=True,
            check_symmetric_grad=True,
            raise_exception=False,
        )
        yield passed == (part < 1)


@pytest.mark.parametrize("number", ["real", "complex"])
@pytest.mark.parametrize("largest", [False, True], ids=["smallest", "largest"])
@pytest.mark.parametrize("label", FORMULAS)
def test_formula(label, largest, number):
    comparisons = list(FORMULAS[label][1](Pencil(largest, number)))
    assert comparisons
    for comparison in comparisons:
        if isinstance(comparison, tuple):
            left, right, bound = comparison
            scale = max(1.0, float(np.linalg.norm(left)), float(np.linalg.norm(right)))
            assert np.linalg.norm(left - right) <= bound * scale
        else:
            assert comparison
