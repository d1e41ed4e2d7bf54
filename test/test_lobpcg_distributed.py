# Owner(s): ["module: linear algebra"]
"""torch.lobpcg on DTensor: rows over two and three processes that this file starts, against dense decompositions."""

import contextlib
import datetime
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing._internal.common_utils import run_tests, TestCase
from torch.utils._python_dispatch import TorchDispatchMode


REAL, COMPLEX = torch.float64, torch.complex128
M, K = 211, 3  # 211 is prime: no number of processes divides it
# A hang is a failure after so many seconds.
PATIENCE = 60


# ----------------------------------------------------------------------------------- processes


def serve(rank, world, folder, pipe):
    """Run the functions of this file whose names come through the pipe, in a group of `world` processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    while (name := pipe.recv()) is not None:
        pipe.send(said_by(globals()[name], mesh_of(world)))
    dist.destroy_process_group()


def said_by(function, mesh):
    """Nothing, or a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(mesh)
    except BaseException:
        return traceback.format_exc()
    return ""


class Group:
    """Processes that stay between tests."""

    def __init__(self, world):
        self.folder = tempfile.mkdtemp()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, self.folder, there)
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, name):
        """What each process says about the function: nothing, or a traceback; None from one that is gone."""
        for pipe in self.pipes:
            pipe.send(name)
        end = time.monotonic() + 2 * PATIENCE
        return [self.answer(pipe, end) for pipe in self.pipes]

    def answer(self, pipe, end):
        try:
            there = pipe.poll(max(0.0, end - time.monotonic()))
            return pipe.recv() if there else "hangs"
        except EOFError:
            return None

    def close(self):
        """The exit codes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        return [process.exitcode for process in self.processes]


def mesh_of(world):
    from torch.distributed.tensor import init_device_mesh

    if world not in MESHES:
        MESHES[world] = init_device_mesh("cpu", (world,))
    return MESHES[world]


MESHES = {}


# ------------------------------------------------------------------------------------ problems


def random(*shape, dtype=REAL, seed=0):
    """Numbers of size one without a pattern, the same on each process."""
    t = torch.arange(1.0, math.prod(shape) + 1, dtype=REAL).reshape(shape)
    T = torch.sin((t + 1000 * seed).square())
    if dtype.is_complex:
        T = torch.complex(T, torch.cos((t + seed).square()))
    return T.to(dtype)


def hermitian(T):
    return (T + T.mH) / 2


def problem(m=M, dtype=REAL):
    """A with separated eigenvalues at both ends, and B of condition 10 or so."""
    ladder = torch.arange(1.0, m + 1, dtype=REAL)
    A = hermitian(random(m, m, dtype=dtype)) + torch.diag(ladder).to(dtype)
    C = random(m, m, dtype=dtype, seed=3)
    B = C @ C.mH / m + torch.eye(m, dtype=dtype)
    return A, hermitian(B)


def dense_pairs(A, B, k=K, largest=False):
    """Pairs by Cholesky and eigh, differentiated by PyTorch."""
    if B is None:
        B = torch.eye(A.shape[-1], dtype=A.dtype)
    L = torch.linalg.cholesky(hermitian(B))
    C = torch.linalg.solve_triangular(L, hermitian(A), upper=False)
    C = torch.linalg.solve_triangular(L, C.mH, upper=False)
    E, V = torch.linalg.eigh(hermitian(C))
    X = torch.linalg.solve_triangular(L.mH, V, upper=True)
    if largest:
        E, X = E.flip(-1), X.flip(-1)
    return E[..., :k], X[..., :k]


def weights(m, k=K):
    return random(k, seed=7).abs() + 1, random(m, k, seed=8)


def loss_of(E, X):
    """A loss of values and vectors that sees no sign or phase; on DTensors, too."""
    of_E, of_X = weights(X.shape[-2], X.shape[-1])
    if type(X) is not torch.Tensor:
        from torch.distributed.tensor import distribute_tensor, Replicate

        mesh = X.device_mesh
        of_E = distribute_tensor(of_E.to(E.dtype), mesh, [Replicate()] * mesh.ndim)
        of_X = distribute_tensor(of_X.to(E.dtype), mesh, X.placements)
    return (E.square() * of_E).sum() + (X.abs().square() * of_X).sum()


def expected(A, B, largest=False):
    """E, the projectors x x^H and the gradients in A and B."""
    leaves = [T.clone().requires_grad_() for T in (A, B) if T is not None]
    E, X = dense_pairs(leaves[0], leaves[1] if len(leaves) > 1 else None, K, largest)
    gradients = torch.autograd.grad(loss_of(E, X), leaves)
    return E.detach(), projectors(X.detach()), [hermitian(g) for g in gradients]


def projectors(X):
    return torch.einsum("ij,kj->jik", X, X.conj())


def shard(T, mesh, placements=None):
    """A leaf of a DTensor, by rows."""
    from torch.distributed.tensor import distribute_tensor, Shard

    T = distribute_tensor(T, mesh, placements or [Shard(0)] * mesh.ndim)
    return T.detach().requires_grad_()


def near(found, wanted, most=1e-7):
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    error = float((found.detach() - wanted).abs().max() / wanted.abs().max())
    assert error <= most, f"{error:.1e} where {most:.1e} is allowed"


def same_everywhere(T):
    """Whether a plain tensor has the same bits on all processes."""
    every = [torch.empty_like(T) for _ in range(dist.get_world_size())]
    dist.all_gather(every, T.contiguous())
    assert all(torch.equal(every[0], other) for other in every[1:])


def check(A, B, mesh, most=1e-7, largest=False, tol=1e-11, **options):
    """Solve, differentiate and compare; A and B: whole matrices."""
    E0, P0, gradients = expected(A, B, largest)
    leaves = [shard(T, mesh) for T in (A, B) if T is not None]
    with_B = {} if B is None else {"B": leaves[1]}
    E, X = torch.lobpcg(leaves[0], K, largest=largest, tol=tol, **with_B, **options)
    assert all(p.is_replicate() for p in E.placements), E.placements
    assert X.placements == leaves[0].placements, X.placements
    near(E, E0, most)
    near(projectors(X.full_tensor()), P0, most)
    same_everywhere(E.to_local().detach())
    loss_of(E, X).backward()
    for leaf, wanted in zip(leaves, gradients):
        assert leaf.grad.placements == leaf.placements, leaf.grad.placements
        near(leaf.grad, wanted, most)
    return E, X


# ------------------------------------------------------------------ what runs on each process


def dense_matrices(mesh):
    A, B = problem()
    X = random(M, 6, seed=4)
    check(A, None, mesh)
    check(A, B, mesh, largest=True)
    check(A, None, mesh, X=shard(X, mesh).detach())
    check(A, B, mesh, X=shard(X, mesh).detach())


def other_dtypes(mesh):
    A, B = problem(dtype=COMPLEX)
    check(A, B, mesh)
    A, B = problem(dtype=torch.float32)
    check(A, B, mesh, most=2e-5, tol=1e-6)


def not_hermitian(mesh):
    """The matrix enters by its Hermitian part, to which tiles are exchanged."""
    for dtype in (REAL, COMPLEX):
        A, _ = problem(dtype=dtype)
        check(A + 0.3 * random(M, M, dtype=dtype, seed=9), None, mesh)


def scaled_matrices(mesh):
    """Entries far from one are rescaled on the way."""
    A, B = problem(dtype=torch.float32)
    check(1e-15 * A, 1e9 * B, mesh, most=1e-4, tol=1e-6)


def a_preconditioner(mesh):
    A, B = problem()
    shift = 1 - torch.linalg.eigvalsh(A)[0]
    iK = torch.linalg.inv(A + shift * torch.eye(M, dtype=REAL))
    check(A, B, mesh, iK=shard(hermitian(iK), mesh).detach())
    check(A, None, mesh, iK=lambda V: V * 3.0)


def cotangents(mesh):
    """Whatever placement the cotangents have, or where one is missing."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    A, _ = problem()
    world, rank = mesh.size(), mesh.get_rank()
    of_E, of_X = weights(M)
    for mine, others in (
        ([Replicate()], [Shard(0)]),
        ([Partial()], [Partial()]),
        ([Replicate()], [Replicate()]),
        ([Replicate()], [Shard(1)]),
        (None, [Shard(0)]),
        ([Replicate()], None),
    ):
        leaf, a = shard(A, mesh), A.clone().requires_grad_()
        E, X = torch.lobpcg(leaf, K, largest=False, tol=1e-11)
        E0, X0 = dense_pairs(a, None)
        turn = (X.full_tensor().detach() * X0.detach()).sum(0).sign()
        wanted, pairs = 0, []
        if mine is not None:
            wanted = wanted + (E0 * of_E).sum()
            g = of_E / world if mine[0].is_partial() else of_E
            pairs.append((E, DTensor.from_local(g, mesh, mine)))
        if others is not None:
            # The cotangent of sum |x|^2 of_X, at the vectors found.
            wanted = wanted + (X0.square() * of_X).sum()
            g = 2 * of_X * X0.detach() * turn
            if others[0].is_partial():
                g = g * (2.0 * (rank + 1) / (world * (world + 1)))
                g = DTensor.from_local(g, mesh, others)
            else:
                g = shard(g, mesh, others).detach()
            pairs.append((X, g))
        torch.autograd.backward([T for T, _ in pairs], [g for _, g in pairs])
        near(leaf.grad, hermitian(torch.autograd.grad(wanted, a)[0]))


def replicated_operands(mesh):
    from torch.distributed.tensor import Replicate, Shard

    A, B = problem()
    E0, P0, gradients = expected(A, B)
    for of_A, of_B in (
        (Replicate(), Shard(0)),
        (Shard(0), Replicate()),
        (Replicate(), Replicate()),
    ):
        a, b = shard(A, mesh, [of_A]), shard(B, mesh, [of_B])
        E, X = torch.lobpcg(a, K, B=b, largest=False, tol=1e-11)
        near(E, E0)
        near(projectors(X.full_tensor()), P0)
        loss_of(E, X).backward()
        for leaf, placement, wanted in zip((a, b), (of_A, of_B), gradients):
            assert leaf.grad.placements == (placement,)
            near(leaf.grad, wanted)


def meshes_of_two_dimensions(mesh):
    from torch.distributed.tensor import init_device_mesh, Replicate, Shard

    world = mesh.size()
    A, B = problem()
    E0, P0, gradients = expected(A, B)
    for shape, placements in (
        ((1, world), [Replicate(), Shard(0)]),
        ((world, 1), [Replicate(), Shard(0)]),
        ((world, 1), [Shard(0), Replicate()]),
    ):
        wide = init_device_mesh("cpu", shape)
        torch.set_num_threads(1 + dist.get_rank())
        a, b = (shard(T, wide, placements) for T in (A, B))
        E, X = torch.lobpcg(a, K, B=b, largest=False, tol=1e-11)
        torch.set_num_threads(1)
        near(E, E0)
        same_everywhere(E.to_local().detach())
        same_everywhere(X.full_tensor().detach())
        near(projectors(X.full_tensor()), P0)
        loss_of(E, X).backward()
        for leaf, wanted in zip((a, b), gradients):
            near(leaf.grad, wanted)


def batches(mesh):
    """A batch over processes is solved where its members are, in every order of derivative."""
    from torch.distributed.tensor import distribute_tensor, Replicate, Shard

    m = 20
    A = torch.stack([problem(m)[0] + i * torch.eye(m) for i in range(5)])
    B = problem(m)[1]
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    E0, X0 = dense_pairs(a, b)
    loss = (E0.square().sum(-1) + X0.pow(4).sum((-2, -1))).sum()
    first = torch.autograd.grad(loss, (a, b), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
    leaf, shared = shard(A, mesh), distribute_tensor(B, mesh, [Replicate()])
    shared = shared.detach().requires_grad_()
    E, X = torch.lobpcg(leaf, K, B=shared, largest=False)
    assert E.placements == X.placements == (Shard(0),)
    near(E, E0.detach())
    loss = (E.square().sum(-1) + X.pow(4).sum((-2, -1))).sum()
    gA, gB = torch.autograd.grad(loss, (leaf, shared), create_graph=True)
    assert gA.placements == (Shard(0),)
    near(gA, hermitian(first[0].detach()))
    near(gB, hermitian(first[1].detach()))
    again = torch.autograd.grad(gA.square().sum() + gB.square().sum(), (leaf, shared))
    for found, wanted in zip(again, second):
        near(found, hermitian(wanted))
    bad = A.clone()
    bad[4, 0, 0] = math.nan  # on the last process alone
    refused(ValueError, "NaN", lambda: torch.lobpcg(shard(bad, mesh), K))
    refused(
        ValueError,
        "sharded over a batch dimension",
        lambda: torch.lobpcg(shard(A, mesh, [Shard(1)]), K),
    )


# ----- callables


class Exchange(torch.autograd.Function):
    """Rows (r, p) -> one more of each neighbour, zero at the ends; differentiable."""

    @staticmethod
    def forward(ctx, rows):
        wide = torch.nn.functional.pad(rows.detach(), (0, 0, 1, 1))
        pass_on(rows[:1], wide[-1:], -1)
        pass_on(rows[-1:], wide[:1], 1)
        return wide

    @staticmethod
    def backward(ctx, g):
        inside = g[1:-1].clone()
        for there, row, at in ((-1, g[:1], -1), (1, g[-1:], 0)):
            received = torch.zeros_like(row)
            pass_on(row, received, there)
            inside[at] += received[0]
        return inside


def pass_on(sent, received, step):
    """Send to the rank `step` further, receive from the one `step` before."""
    rank, world = dist.get_rank(), dist.get_world_size()
    work = []
    if 0 <= rank + step < world:
        work.append(dist.P2POp(dist.isend, sent.detach().contiguous(), rank + step))
    if 0 <= rank - step < world:
        work.append(dist.P2POp(dist.irecv, received, rank - step))
    for one in dist.batch_isend_irecv(work):
        one.wait()


def springs(mesh, c, local=False):
    """The stiffness matrix of a chain on blocks; spring c[i] joins masses i and i + 1, the last one a wall."""
    from torch.distributed.tensor import DTensor

    def products(V):
        rows, own = V.to_local(), c if local else c.to_local()
        stiffness = Exchange.apply(own[:, None])
        wide = Exchange.apply(rows)
        up = stiffness[1:-1] * (wide[1:-1] - wide[2:])
        down = stiffness[:-2] * (wide[1:-1] - wide[:-2])
        U = up + down
        return DTensor.from_local(
            U, V.device_mesh, V.placements, shape=V.shape, stride=V.stride()
        )

    return products


def chain(c):
    """The same as a dense matrix."""
    A = torch.diag(c) + torch.diag(torch.nn.functional.pad(c[:-1], (1, 0)))
    return A - torch.diag(c[:-1], 1) - torch.diag(c[:-1], -1)


def callables(mesh):
    """Gradients in sharded and in local weights, through the exchange; B and iK callables; the default start block."""
    c = 1 + 0.5 * random(M, seed=2)
    mass = 2 + random(M, seed=5)
    a, b = c.clone().requires_grad_(), mass.clone().requires_grad_()
    E0, X0 = dense_pairs(chain(a), torch.diag(b), largest=True)
    wanted = torch.autograd.grad(loss_of(E0, X0), (a, b))
    for local in (False, True):
        leaf, density = shard(c, mesh), shard(mass, mesh)
        own = leaf.to_local().detach().clone().requires_grad_()
        A = springs(mesh, own if local else leaf, local)
        A.shape, A.dtype, A.device_mesh = (M, M), REAL, mesh
        options = {"iK": lambda V: V * 2.0} if local else {}
        E, X = torch.lobpcg(
            A, K, B=lambda V: V * density.unsqueeze(1), tol=1e-11, **options
        )
        near(E, E0.detach())
        same_everywhere(E.to_local().detach())
        loss_of(E, X).backward()
        assert density.grad.placements == density.placements
        near(density.grad, wanted[1])
        if local:
            sharded = shard(wanted[0], mesh).to_local()
            near(own.grad, sharded.detach())
        else:
            assert leaf.grad.placements == leaf.placements
            near(leaf.grad, wanted[0])


def a_replicated_weight(mesh):
    """Its gradient, a sum over the rows of all, comes back as it is: replicated."""
    from torch.distributed.tensor import Replicate

    c = 1 + 0.5 * random(M, seed=2)
    theta = shard(torch.tensor([1.5], dtype=REAL), mesh, [Replicate()])
    stiffness = springs(mesh, shard(c, mesh).detach())
    start = shard(random(M, 6, seed=4), mesh).detach()
    E, _ = torch.lobpcg(lambda V: stiffness(V) * theta, K, X=start, tol=1e-11)
    near(E, 1.5 * torch.linalg.eigvalsh(chain(c)).flip(0)[:K])
    E.sum().backward()
    assert theta.grad.placements == (Replicate(),), theta.grad.placements
    near(theta.grad, (E.full_tensor().detach().sum() / 1.5).unsqueeze(0))


def a_loss_of_one_process(mesh):
    """A loss of vectors on the first process, of values on the others."""
    A, _ = problem()
    first, of_X = dist.get_rank() == 0, weights(M)[1]
    leaf, a = shard(A, mesh), A.clone().requires_grad_()
    E, X = torch.lobpcg(leaf, K, largest=False, tol=1e-11)
    rows = X.to_local()
    if first:
        (rows.square() * of_X[: rows.shape[0]]).sum().backward()
    else:
        (E.to_local() * 0).sum().backward()
    count = -(-M // mesh.size())
    wanted = (dense_pairs(a, None)[1].square() * of_X)[:count].sum()
    near(leaf.grad, hermitian(torch.autograd.grad(wanted, a)[0]))


def the_default_start_block(mesh):
    """It is the one that a single process has: each makes its rows."""
    for dtype in (REAL, torch.float32):
        A, B = problem(dtype=dtype)
        a, b = (shard(T, mesh).detach() for T in (A, B))
        E, X = torch.lobpcg(a, K, B=b, largest=False, niter=0)
        alone = torch.lobpcg(A, K, B=B, largest=False, niter=0)
        most = 1e-11 if dtype == REAL else 1e-4
        near(E, alone[0], most)
        near(X.full_tensor().abs(), alone[1].abs(), most)


def checkpointed(mesh):
    """Tensors that are kept are unpacked once; and the same backward can be taken twice."""
    from torch.utils.checkpoint import checkpoint

    A, _ = problem()
    gradients = expected(A, None)[2]

    def solve(leaf):
        return loss_of(*torch.lobpcg(leaf, K, largest=False, tol=1e-11))

    leaf = shard(A, mesh)
    loss = checkpoint(solve, leaf, use_reentrant=False)
    loss.backward()
    near(leaf.grad, gradients[0])
    leaf.grad = None
    loss = solve(leaf)
    loss.backward(retain_graph=True)
    loss.backward()
    near(leaf.grad, 2 * gradients[0])


def weights_of_one_process(mesh):
    """A parameter that one process alone has: the others take part in backward."""
    from torch.distributed.tensor import DTensor

    A, _ = problem()
    rows = shard(A, mesh).detach()
    theta = torch.tensor(0.3, dtype=REAL, requires_grad=True)

    def products(V):
        whole = V.full_tensor()
        U = rows.to_local() @ whole
        if dist.get_rank() == 0:
            U = U + theta * V.to_local()
        return DTensor.from_local(
            U, mesh, V.placements, shape=V.shape, stride=(V.shape[1], 1)
        )

    start = shard(random(M, 6, seed=4), mesh).detach()
    E, _ = torch.lobpcg(products, K, X=start, largest=False, tol=1e-11)
    count = rows.to_local().shape[0]
    if dist.get_rank() == 0:
        D = torch.zeros(M, dtype=REAL)
        D[:count] = 1
        t = torch.tensor(0.3, dtype=REAL, requires_grad=True)
        E0, _ = dense_pairs(A + torch.diag(D) * t, None)
        (g,) = torch.autograd.grad(E0.sum(), t)
    E.sum().backward()
    if dist.get_rank() == 0:
        near(E.to_local(), E0.detach())
        near(theta.grad, g)


# ----- keeping together


@contextlib.contextmanager
def flipped_signs():
    """Decompositions whose vectors have other signs."""
    eigh, qr = torch.linalg.eigh, torch.linalg.qr

    def other_eigh(M, *args, **kwargs):
        E, U = eigh(M, *args, **kwargs)
        return E, -U

    def other_qr(M, *args, **kwargs):
        Q, R = qr(M, *args, **kwargs)
        return -Q, -R

    torch.linalg.eigh, torch.linalg.qr = other_eigh, other_qr
    try:
        yield
    finally:
        torch.linalg.eigh, torch.linalg.qr = eigh, qr


def processes_that_differ(mesh):
    """Another number of threads, and signs turned on the last process: the same bits everywhere, right ones."""
    A, B = problem()
    last = dist.get_rank() == dist.get_world_size() - 1
    for turned in (False, True):
        torch.set_num_threads(1 + dist.get_rank())
        with flipped_signs() if turned and last else contextlib.nullcontext():
            leaves = [shard(T, mesh) for T in (A, B)]
            E, X = torch.lobpcg(leaves[0], K, B=leaves[1], largest=False, tol=1e-11)
            loss_of(E, X).backward()
        torch.set_num_threads(1)
        E0, P0, gradients = expected(A, B)
        near(E, E0)
        near(projectors(X.full_tensor()), P0)
        same_everywhere(E.to_local().detach())
        for leaf, wanted in zip(leaves, gradients):
            near(leaf.grad, wanted)


@contextlib.contextmanager
def counted():
    """Calls of collectives by name, and the largest number of elements in a sum."""
    counts, originals = {"largest sum": 0}, {}
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object"):
        originals[name] = getattr(dist, name)

        def call(*args, name=name, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            if name == "all_reduce":
                counts["largest sum"] = max(counts["largest sum"], args[0].numel())
            return originals[name](*args, **kwargs)

        setattr(dist, name, call)
    try:
        yield counts
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def counts_of_collectives(mesh):
    """Two sums and a broadcast an iteration, 2.5 sums a product in backward, and none that grows with m."""
    from torch.distributed.tensor import DTensor

    A, B = problem(1000)
    inverse = shard(torch.linalg.inv(A + 100 * torch.eye(1000)), mesh).detach()
    for generalized, iK in ((False, None), (True, None), (False, inverse)):
        a, b = shard(A, mesh), shard(B, mesh)
        options = {"B": b} if generalized else {}
        if iK is not None:
            options["iK"] = iK

        def counts(niter):
            with counted() as found, torch.no_grad():
                torch.lobpcg(a, K, largest=False, niter=niter, tol=0, **options)
            return found

        few, many = counts(5), counts(25)
        sums = (many["all_reduce"] - few["all_reduce"]) / 20
        sent = (many["broadcast"] - few["broadcast"]) / 20
        assert sums <= 2, (generalized, sums)
        assert sent <= 1, (generalized, sent)
        assert many["largest sum"] < 1000, many
        products = [0]

        def product(V):
            products[0] += 1
            return (
                DTensor.from_local(
                    rows @ V.full_tensor(),
                    mesh,
                    V.placements,
                    shape=V.shape,
                    stride=V.stride(),
                )
                + 0.0 * theta * V
            )

        rows, theta = a.detach().to_local(), shard(torch.ones(1000, 1).double(), mesh)
        start = shard(random(1000, 6, seed=4), mesh).detach()
        _, X = torch.lobpcg(product, K, X=start, largest=False, tol=1e-8, **options)
        products[0] = 0
        with counted() as found:
            torch.autograd.backward(X, shard(weights(1000)[1], mesh).detach() * X)
        share = found["all_reduce"] / products[0]
        assert share <= 2.5, (generalized, found, products)
        assert found["largest sum"] < 1000, found


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for T in out if isinstance(out, (tuple, list)) else (out,):
            if type(T) is torch.Tensor:
                self.numel = max(self.numel, T.numel())
        return out


def the_largest_tensor(mesh):
    """The rows held here, or the block that a product gathers: no more."""
    A, B = problem(400)
    a, b = shard(A, mesh), shard(B, mesh)
    g = shard(weights(400)[1], mesh).detach()
    rows, gathered = a.to_local().numel(), 400 * 4 * K
    with Largest() as largest:
        E, X = torch.lobpcg(a, K, B=b, largest=False, tol=1e-8)
    assert largest.numel <= max(rows, gathered), (largest.numel, rows, gathered)
    with Largest() as largest:
        torch.autograd.backward((E, X), (E.detach(), g * X.detach()))
    assert largest.numel <= max(rows, gathered), (largest.numel, rows, gathered)


# ----- refusals and faults


def refused(kind, words, call):
    said = None
    try:
        call()
    except kind as error:
        said = str(error)
    assert said is not None, f"no error that says: {words}"
    assert words in said, said


def bad_arguments(mesh):
    from torch.distributed.tensor import (
        distribute_tensor,
        DTensor,
        init_device_mesh,
        Partial,
        Replicate,
        Shard,
    )

    A, B = problem(40)
    a, b = (shard(T, mesh).detach() for T in (A, B))
    world = mesh.size()
    columns = distribute_tensor(A, mesh, [Shard(1)])
    sums = DTensor.from_local(A, mesh, [Partial()])
    X = random(40, 4)
    wide = init_device_mesh("cpu", (world, 1))
    twice = distribute_tensor(A, wide, [Shard(0), Shard(1)])
    mine = A[: 10 if dist.get_rank() == 0 else 40]
    uneven = DTensor.from_local(
        mine, mesh, [Shard(0)], shape=torch.Size((40, 40)), stride=(40, 1)
    )
    refused(ValueError, "columns of A", lambda: torch.lobpcg(columns, 2))
    refused(ValueError, "columns of B", lambda: torch.lobpcg(a, 2, B=columns))
    refused(
        ValueError,
        "columns of X",
        lambda: torch.lobpcg(a, X=distribute_tensor(X, mesh, [Shard(1)])),
    )
    refused(ValueError, "redistribute", lambda: torch.lobpcg(sums, 2))
    refused(ValueError, "2 dimensions of the mesh", lambda: torch.lobpcg(twice, 2))
    other = distribute_tensor(B, wide, [Shard(0), Replicate()])
    refused(ValueError, "one mesh", lambda: torch.lobpcg(a, 2, B=other))
    for name, T in (("B", B), ("X", X), ("iK", B)):
        refused(
            ValueError,
            f"{name} is a plain tensor",
            lambda: torch.lobpcg(a, 2, **{name: T}),
        )
    refused(ValueError, "A is a plain tensor", lambda: torch.lobpcg(A, 2, B=b))
    refused(ValueError, "its share", lambda: torch.lobpcg(uneven, 2))
    refused(ValueError, "m >= 3*n", lambda: torch.lobpcg(a, 14))
    # ceil(m / world) rows each leave none for the last one.
    few = {2: 1, 3: 4}[world]
    small = shard(A[:few, :few], mesh).detach()
    refused(ValueError, "", lambda: torch.lobpcg(small, 1, n=1))
    if world == 3:
        refused(
            ValueError, "have none of m=4 rows", lambda: torch.lobpcg(small, 1, n=1)
        )
    refused(ValueError, "k <= n", lambda: torch.lobpcg(a, 5, n=4))
    refused(TypeError, "dtype", lambda: torch.lobpcg(a, 2, B=b.float()))
    refused(ValueError, "must be square", lambda: torch.lobpcg(b[:, :30], 2))
    refused(ValueError, "shape", lambda: torch.lobpcg(a, 2, B=shard(B[:30, :30], mesh)))
    negative = shard(B - 3 * torch.eye(40), mesh)
    refused(ValueError, "B is not positive", lambda: torch.lobpcg(a, 2, B=negative))
    refused(
        ValueError, "iK is not positive", lambda: torch.lobpcg(a, 2, iK=shard(-B, mesh))
    )
    tol = 1e-6 if dist.get_rank() == 0 else 1e-5
    refused(ValueError, "different arguments", lambda: torch.lobpcg(a, 2, tol=tol))
    given = {"B": b} if dist.get_rank() == 0 else {}
    refused(ValueError, "different arguments", lambda: torch.lobpcg(a, 2, **given))


def not_implemented(mesh):
    A, _ = problem(40)
    a = shard(A, mesh)
    E, X = torch.lobpcg(a, 2, largest=False)
    refused(
        NotImplementedError,
        "second derivatives",
        lambda: torch.autograd.grad(loss_of(E, X), a, create_graph=True),
    )
    start = shard(random(40, 4), mesh).detach()

    def lowest(t):
        return torch.lobpcg(lambda V: V * t, X=start)[0].sum().to_local()

    one = torch.tensor(1.0, dtype=REAL)
    refused(NotImplementedError, "torch.func", lambda: torch.func.grad(lowest)(one))


class Fault(Exception):
    pass


def faults(mesh):
    """An error of one process is one of all, at once."""
    from torch.distributed.tensor import DTensor, Replicate

    A, B = problem(60)
    X, rank, world = random(60, 4), dist.get_rank(), dist.get_world_size()
    for at in (0, 59):  # rows of the first and of the last process
        for value in (math.nan, math.inf):
            broken = {"A": A.clone(), "B": B.clone(), "X": X.clone(), "iK": B.clone()}
            for name, T in broken.items():
                T[at, 1] = value
                given = {"A": A, "B": B, "X": X, "iK": torch.eye(60).double()}
                given[name] = T
                given = {n: shard(T, mesh).detach() for n, T in given.items()}
                refused(
                    ValueError, f"{name} has NaN", lambda: torch.lobpcg(k=2, **given)
                )
    a, start = shard(A, mesh).detach(), shard(X, mesh).detach()
    rows = a.to_local()
    theta = torch.ones((), dtype=REAL, requires_grad=True)
    calls = [0]

    def wrong_at(call, who, what):
        """A callable that does something wrong in one call on one process, behind its collectives."""
        calls[0] = 0

        def products(V):
            calls[0] += 1
            U = theta * (rows @ V.full_tensor())
            U = DTensor.from_local(
                U, mesh, V.placements, shape=V.shape, stride=V.stride()
            )
            return what(U) if calls[0] == call and rank == who else U

        return products

    def raises(U):
        raise Fault("planted")

    whats = (
        (raises, (Fault, RuntimeError), "planted"),
        (lambda U: U * math.nan, ValueError, "NaN"),
        (lambda U: U.to_local(), TypeError, "DTensor"),
        (
            lambda U: DTensor.from_local(U.to_local(), mesh, [Replicate()]),
            ValueError,
            "placements",
        ),
        (lambda U: U[:, :1], ValueError, "shape"),
        (lambda U: U.to_local() * 0 + 1, TypeError, "DTensor"),
    )
    for who in (0, world - 1):
        for call in (1, 2, 9):
            for what, kind, words in whats:
                products = wrong_at(call, who, what)
                begin = time.monotonic()
                refused(
                    kind,
                    words,
                    lambda: torch.lobpcg(
                        products, 2, X=start, largest=False, method="ortho"
                    ),
                )
                assert time.monotonic() - begin < 15
        # In backward: as a product of the linear system, and where the gradient is pulled back.
        options = {"X": start, "largest": False, "method": "ortho"}
        E, V = torch.lobpcg(wrong_at(0, who, raises), 2, **options)
        solved = calls[0]
        loss_of(E, V).backward()
        last = calls[0]
        for call in (solved + 1, solved + 3, last):
            E, V = torch.lobpcg(wrong_at(call, who, raises), 2, **options)
            loss = loss_of(E, V)
            refused((Fault, RuntimeError), "planted", loss.backward)


def a_part_of_the_world(mesh):
    """A mesh without the second process of three."""
    from torch.distributed.tensor import DeviceMesh

    if "part" not in MESHES:
        MESHES["part"] = DeviceMesh("cpu", [0, 2])
    A, _ = problem()
    if dist.get_rank() != 1:
        E0, _, (gA,) = expected(A, None)
        leaf = shard(A, MESHES["part"])
        E, X = torch.lobpcg(leaf, K, largest=False, tol=1e-11)
        near(E, E0)
        loss_of(E, X).backward()
        near(leaf.grad, gA)


def one_process(mesh):
    """A mesh of one process gives what a plain call of a callable gives."""
    from torch.distributed.tensor import DeviceMesh

    rank = dist.get_rank()
    for other in range(dist.get_world_size()):
        if ("one", other) not in MESHES:
            MESHES["one", other] = DeviceMesh("cpu", [other])
    A, B = problem()
    a, b = (shard(T, MESHES["one", rank]).detach() for T in (A, B))
    E, X = torch.lobpcg(a, K, B=b, largest=False, tol=1e-11)
    alone = torch.lobpcg(A, K, B=B, largest=False, tol=1e-11, method="ortho")
    near(E, alone[0], 1e-13)
    near(X.to_local().abs(), alone[1].abs(), 1e-9)


def a_tracker(mesh):
    """It sees the rows held here, and stops all processes if it stops one."""
    A, _ = problem()
    a, steps = shard(A, mesh).detach(), []

    def tracker(worker):
        steps.append(worker.ivars["istep"])
        assert worker.X.shape[0] == a.to_local().shape[0]
        worker.bvars["force_stop"] = dist.get_rank() == 0 and len(steps) == 4

    torch.lobpcg(a, K, largest=False, tracker=tracker)
    assert steps == [0, 1, 2, 3], steps


def a_killed_process(mesh):
    """The last process ends in the middle of a solve: an error on the others, at the latest after a timeout."""
    from torch.distributed.tensor import DeviceMesh, DTensor

    soon = dist.new_group(timeout=datetime.timedelta(seconds=5))
    mesh = DeviceMesh.from_group(soon, "cpu")
    A, _ = problem(60)
    rows, calls = shard(A, mesh).detach().to_local(), [0]

    def products(V):
        calls[0] += 1
        if calls[0] == 5 and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(0)
        U = rows @ V.full_tensor()
        return DTensor.from_local(
            U, mesh, V.placements, shape=V.shape, stride=V.stride()
        )

    start = shard(random(60, 4), mesh).detach()
    refused(Exception, "", lambda: torch.lobpcg(products, 2, X=start, method="ortho"))


# --------------------------------------------------------------------------------------- tests


@unittest.skipUnless(dist.is_available() and dist.is_gloo_available(), "needs gloo")
class TestLobpcgDistributed(TestCase):
    groups = {}

    @classmethod
    def tearDownClass(cls):
        codes = [code for group in cls.groups.values() for code in group.close()]
        cls.groups.clear()
        assert not any(codes), f"exit codes {codes}"
        super().tearDownClass()

    def on_processes(self, name, worlds=(2, 3)):
        for world in worlds:
            with self.subTest(processes=world):
                if world not in self.groups:
                    self.groups[world] = Group(world)
                said = self.groups[world].run(name)
                if any(text is None or text == "hangs" for text in said):
                    self.groups.pop(world).close()
                wrong = [str(text) for text in said if text != ""]
                self.assertFalse(wrong, "\n".join(wrong))

    def test_dense_matrices(self):
        self.on_processes("dense_matrices")

    def test_other_dtypes(self):
        self.on_processes("other_dtypes")

    def test_a_matrix_that_is_not_hermitian(self):
        self.on_processes("not_hermitian")

    def test_scaled_matrices(self):
        self.on_processes("scaled_matrices", (2,))

    def test_preconditioners(self):
        self.on_processes("a_preconditioner")

    def test_cotangents_of_any_placement(self):
        self.on_processes("cotangents")

    def test_replicated_operands(self):
        self.on_processes("replicated_operands", (3,))

    def test_meshes_of_two_dimensions(self):
        self.on_processes("meshes_of_two_dimensions", (2,))

    def test_batches(self):
        self.on_processes("batches")

    def test_callables(self):
        self.on_processes("callables")

    def test_a_replicated_weight(self):
        self.on_processes("a_replicated_weight", (2,))

    def test_a_loss_of_one_process(self):
        self.on_processes("a_loss_of_one_process")

    def test_the_default_start_block(self):
        self.on_processes("the_default_start_block", (3,))

    def test_checkpoint_and_two_backwards(self):
        self.on_processes("checkpointed", (2,))

    def test_weights_of_one_process(self):
        self.on_processes("weights_of_one_process", (2,))

    def test_processes_that_differ(self):
        self.on_processes("processes_that_differ")

    def test_counts_of_collectives(self):
        self.on_processes("counts_of_collectives", (2,))

    def test_the_largest_tensor(self):
        self.on_processes("the_largest_tensor", (3,))

    def test_bad_arguments(self):
        self.on_processes("bad_arguments")

    def test_not_implemented(self):
        self.on_processes("not_implemented", (2,))

    def test_faults(self):
        self.on_processes("faults")

    def test_a_part_of_the_world(self):
        self.on_processes("a_part_of_the_world", (3,))

    def test_one_process(self):
        self.on_processes("one_process", (2,))

    def test_a_tracker(self):
        self.on_processes("a_tracker", (3,))

    def test_a_killed_process(self):
        """What cannot be caught ends in the group's own timeout."""
        group = Group(2)
        said = group.run("a_killed_process")
        group.close()
        self.assertEqual(said, ["", None])

    def test_torch_imports_no_dtensor(self):
        code = (
            "import sys, torch; A = torch.eye(9); torch.lobpcg(A, 2); "
            "assert 'torch.distributed.tensor' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    run_tests()
