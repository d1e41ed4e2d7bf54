"""torch.lobpcg on one device: checks against the CPU, and times beside eigh, CuPy and the CPU. For tools/gpu.py."""

from __future__ import annotations

import contextlib
import platform
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# Problems ------------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(m: int, *batch: int) -> torch.Tensor:
    """A random symmetric matrix or batch, on the CPU."""
    G = normal(*batch, m, m)
    return (G + G.mT) / 2


def laplacian(m: int, device: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The 5-point Laplacian of a grid whose sides differ, so that no eigenvalue is repeated: CSR, near order m."""
    rows = round((m / 1.3) ** 0.5)
    columns = round(m / rows)
    m = rows * columns
    i = torch.arange(m, device=device)
    right, down = i[i % columns != columns - 1], i[: m - columns]
    first = torch.cat([right, down])
    second = torch.cat([right + 1, down + columns])
    index = torch.stack([torch.cat([first, second, i]), torch.cat([second, first, i])])
    one = torch.ones(len(first), device=device, dtype=dtype)
    values = torch.cat([-one, -one, torch.full((m,), 4.0, device=device, dtype=dtype)])
    return torch.sparse_coo_tensor(index, values, (m, m)).coalesce().to_sparse_csr()


def loss(E: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """One that does not see signs."""
    weights = torch.linspace(0, 1, X.shape[-2], device=X.device, dtype=X.dtype).unsqueeze(-1)
    return E.sum() + (weights * X * X).sum() * E.detach().abs().mean()


# Checks --------------------------------------------------------------------------------------------------------------


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found = (found.to_dense() if found.layout != torch.strided else found).cpu().double()
    return float((found - exact).norm() / exact.norm())


def gradient_dense(
    device: str, dtype: torch.dtype = torch.float64, *batch: int, m: int = 90, general: bool = True
) -> str:
    """Gradients in A and B, iterated, against eigh of the CPU in double precision."""
    k, bound = 3, 1e-6 if dtype == torch.float64 else 3e-2
    A = torch.diag_embed(torch.arange(1.0, m + 1, dtype=torch.float64).expand(*batch, m)) + 0.1 * dense(m, *batch)
    B = torch.eye(m, dtype=torch.float64) + 0.1 * dense(m, *batch) / m**0.5 if general else None
    exact = [M.clone().requires_grad_() for M in (A, B) if M is not None]
    half = exact[0]
    if general:
        L = torch.linalg.cholesky(exact[1])
        half = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, exact[0], upper=False).mT, upper=False)
    E, V = torch.linalg.eigh(half)
    X = torch.linalg.solve_triangular(L.mT, V, upper=True) if general else V
    loss(E[..., :k], X[..., :k]).backward()
    given = [M.detach().to(device, dtype).requires_grad_() for M in exact]
    E, X = torch.lobpcg(given[0], k, given[1] if general else None, largest=False, method="ortho")
    loss(E, X).backward()
    worst = max(error(M.grad, (N.grad + N.grad.mT) / 2) for M, N in zip(given, exact))
    assert worst < bound, f"relative error {worst:.1e}, at most {bound:.0e} expected"
    return f"relative error {worst:.1e}"


def gradient_sparse(device: str, layout: torch.layout, dtype: torch.dtype = torch.float64) -> str:
    """The gradient on the stored entries against the dense one of the CPU."""
    k, bound = 3, 1e-5 if dtype == torch.float64 else 3e-2
    A = laplacian(200, "cpu").to_dense()
    exact = A.clone().requires_grad_()
    E, X = torch.linalg.eigh(exact)
    loss(E[:k], X[:, :k]).backward()
    given = A.to(device, dtype).to_sparse(layout=layout).requires_grad_()
    E, X = torch.lobpcg(given, k, largest=False)
    loss(E, X).backward()
    expected = torch.where(A != 0, (exact.grad + exact.grad.mT) / 2, 0.0)
    worst = error(given.grad, expected)
    assert worst < bound, f"relative error {worst:.1e}, at most {bound:.0e} expected"
    return f"relative error {worst:.1e}"


def batches(device: str, dtype: torch.dtype = torch.float64) -> str:
    """A batch gives what its members give one by one."""
    A = dense(100, 6).to(device, dtype)
    E = torch.lobpcg(A, 4, method="ortho")[0]
    alone = torch.stack([torch.lobpcg(one, 4, method="ortho")[0] for one in A])
    worst = float(((E - alone).abs().amax() / alone.abs().amax()).cpu())
    assert worst < 20 * torch.finfo(dtype).eps ** 0.75, f"eigenvalues differ by {worst:.1e}"
    return f"eigenvalues differ by {worst:.1e}"


def determinism(device: str) -> str:
    """Two calls give the same bits, gradients included."""
    results = []
    for _ in range(2):
        A = laplacian(400, device).requires_grad_()
        E, X = torch.lobpcg(A, 3, largest=False)
        loss(E, X).backward()
        results.append((E.detach(), X.detach(), A.grad.values()))
    assert all(torch.equal(first, second) for first, second in zip(*results)), "two calls differ"
    return "the same bits twice"


class Transfers(TorchDispatchMode):
    """Counts what makes the host wait: numbers read from a tensor, and tensors copied to the CPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        elif function is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            self.count += args[0].device.type != "cpu"
        return function(*args, **kwargs)


def transfers(device: str) -> str:
    """At most one wait of the host an iteration, beyond those of the set-up: the difference of two runs' lengths."""
    A, counts, steps = laplacian(2500, device), [], []
    for niter in (5, 15):
        with Transfers() as mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.lobpcg(A, 3, largest=False, niter=niter, tol=1e-14)
        counts.append(mode.count)
        steps.append(niter)
    each = (counts[1] - counts[0]) / (steps[1] - steps[0])
    assert device == "cpu" or each <= 1, f"{each:.1f} waits of the host an iteration, at most 1 expected"
    return f"{each:.1f} numbers read an iteration" + (", on the CPU" if device == "cpu" else "")


def checks(device: str) -> list[tuple[str, Callable[[], str]]]:
    single, double = torch.float32, torch.float64
    return [
        ("gradients in A and B, dense, float64", lambda: gradient_dense(device, double)),
        ("gradients in A and B, dense, float32", lambda: gradient_dense(device, single)),
        ("the same for a batch", lambda: gradient_dense(device, double, 4)),
        ("gradient on the entries, CSR, float64", lambda: gradient_sparse(device, torch.sparse_csr)),
        ("gradient on the entries, COO, float64", lambda: gradient_sparse(device, torch.sparse_coo)),
        ("gradient on the entries, CSR, float32", lambda: gradient_sparse(device, torch.sparse_csr, single)),
        ("batch against its members, float64", lambda: batches(device)),
        ("batch against its members, float32", lambda: batches(device, single)),
        ("determinism", lambda: determinism(device)),
        ("host transfers", lambda: transfers(device)),
    ]


# Times ---------------------------------------------------------------------------------------------------------------


def solve(A: torch.Tensor, k: int, gradient: bool, **options: object) -> tuple:
    A = A.detach().requires_grad_(gradient)
    E, X = torch.lobpcg(A, k, largest=False, **options)
    if gradient:
        loss(E, X).backward()
    return E.detach(), X.detach()


def by_eigh(A: torch.Tensor, k: int, gradient: bool) -> tuple:
    A = A.detach().requires_grad_(gradient)
    E, X = torch.linalg.eigh(A)
    E, X = E[..., :k], X[..., :k]
    if gradient:
        loss(E, X).backward()
    return E.detach(), X.detach()


def by_cupy(A: torch.Tensor, k: int) -> tuple:
    """CuPy's lobpcg on the same memory; its tolerance is an absolute residual."""
    import cupy
    from cupyx.scipy.sparse import csr_matrix
    from cupyx.scipy.sparse.linalg import lobpcg

    parts = (cupy.asarray(part) for part in (A.values(), A.col_indices().int(), A.crow_indices().int()))
    start = cupy.random.default_rng(0).standard_normal((A.shape[0], k))
    E, X = lobpcg(csr_matrix(tuple(parts), shape=A.shape), start, largest=False, tol=8e-8, maxiter=2000)
    return torch.as_tensor(E, device=A.device), torch.as_tensor(X, device=A.device)


def seconds(call: Callable[[], tuple], device: str) -> tuple[float, tuple]:
    """Median of three calls after one that warms up, or that one alone where it takes long; the last result."""

    def one() -> tuple[float, tuple]:
        _synchronize(device)
        start = time.perf_counter()
        result = call()
        _synchronize(device)
        return time.perf_counter() - start, result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, result = one()
        if first > 5.0:
            return first, result
        times = [one()[0] for _ in range(3)]
    return statistics.median(times), result


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def residual(A: torch.Tensor, E: torch.Tensor, X: torch.Tensor) -> float:
    """|A x - E x| over the largest row sum of |A|, which bounds |A|; the worst pair."""
    if A.layout == torch.strided:
        norm = float(A.abs().sum(-1).max())
    else:
        norm = 8.0  # of a Laplacian
    return float((A @ X - X * E.unsqueeze(-2)).norm(dim=-2).max()) / norm


COLUMNS = ("lobpcg", "eigh", "CuPy lobpcg", "lobpcg on the CPU", "without polynomial")


def problems(device: str, tiny: bool) -> list[tuple[str, Callable[[], torch.Tensor]]]:
    sizes = (40, 60) if tiny else (500, 1000, 2000, 4000, 8000)
    pairs = ((5, 32), (2, 40)) if tiny else ((1000, 32), (64, 500))
    orders = (100, 400) if tiny else (10**5, 10**6, 10**7)
    made = [(f"dense {m}", lambda m=m: dense(m).to(device)) for m in sizes]
    made += [(f"batch {count} x {m}", lambda count=count, m=m: dense(m, count).to(device)) for count, m in pairs]
    return made + [
        (f"Laplacian {m:.0e}" if m > 999 else f"Laplacian {m}", lambda m=m: laplacian(m, device)) for m in orders
    ]


def peers(A: torch.Tensor, k: int, gradient: bool, device: str) -> dict[str, Callable[[], tuple]]:
    """Column -> call. Without polynomial: the identity as iK, which takes its place."""
    calls = {"lobpcg": lambda: solve(A, k, gradient)}
    if A.layout != torch.strided:
        if device != "cpu" and not gradient and _has_cupy():
            calls["CuPy lobpcg"] = lambda: by_cupy(A, k)
    else:
        calls["eigh"] = lambda: by_eigh(A, k, gradient)
    if device != "cpu":
        on_cpu = A.cpu()
        calls["lobpcg on the CPU"] = lambda: solve(on_cpu, k, gradient)
    if A.layout != torch.strided:
        # last, since it takes thousands of iterations
        calls["without polynomial"] = lambda: solve(A, k, gradient, iK=lambda R: R, niter=5000)
    return calls


@contextlib.contextmanager
def interrupted_after(moment: float) -> Iterator[None]:
    """TimeoutError in what runs at that moment of the monotonic clock, where the system has such a signal."""

    def stop(*_: object) -> None:
        raise TimeoutError

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _has_cupy() -> bool:
    try:
        import cupy  # noqa: F401
    except ImportError:
        return False
    return True


def measure(device: str, tiny: bool, deadline: float, k: int = 4) -> tuple[list[list[str]], int]:
    """The rows of the table, and how many cells raised. A cell after the deadline is left out."""
    rows, failed = [], 0
    for name, make in problems(device, tiny):
        A = make()
        for gradient in (False, True):
            cells, accuracy = dict.fromkeys(COLUMNS, ""), ""
            for column, call in peers(A, k, gradient, device).items():
                if time.monotonic() > deadline:
                    cells[column] = "left out"
                    continue
                print(f"  {name}, {'gradient' if gradient else 'forward'}, {column}: ", end="", flush=True)
                try:
                    with interrupted_after(deadline + 20):
                        taken, (E, X) = seconds(call, device)
                except TimeoutError:
                    print("left out", flush=True)
                    cells[column] = "left out"
                    continue
                except (RuntimeError, ValueError, MemoryError) as problem:
                    print(f"{type(problem).__name__}: {str(problem)[:200]}", flush=True)
                    cells[column], failed = type(problem).__name__, failed + 1
                    continue
                cells[column] = f"{taken:.3g}"
                print(f"{taken:.3g} s", flush=True)
                if column == "lobpcg":
                    accuracy = f"{residual(A, E, X):.0e}"
            rows.append([name, "with gradient" if gradient else "forward", *cells.values(), accuracy])
    return rows, failed


def holds(title: str, check: Callable[[], str]) -> bool:
    """Whether the check passes; prints what it found."""
    try:
        print(f"  right: {title}: {check()}", flush=True)
        return True
    except (AssertionError, RuntimeError, ValueError) as problem:
        print(f"  WRONG: {title}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        return False


def run(device: str, minutes: float, tiny: bool) -> int:
    """Checks, then the table; 1 if a check failed or a timing raised."""
    start = time.monotonic()
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    if device != "cpu" and not torch.cuda.is_available():
        print(f"gpu.py: torch {torch.__version__} finds no GPU; a build with CUDA and a driver are needed", flush=True)
        return 2
    name = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads on the CPU, float64 unless said",
        flush=True,
    )
    failed = sum(not holds(title, check) for title, check in checks(device))
    rows, raised = measure(device, tiny, start + 60 * minutes)
    header = ["problem, k = 4", "", *(f"{column}, s" for column in COLUMNS), "residual"]
    print("\n" + "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))
    print(f"\n{failed} checks failed, {raised} timings raised, {time.monotonic() - start:.0f} s in all")
    return 1 if failed or raised else 0
