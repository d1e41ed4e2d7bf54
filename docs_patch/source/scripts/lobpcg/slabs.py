"""Lowest modes of -Laplacian + v on a cube whose rows live on several processes, and their gradient in v.

    torchrun --standalone --nproc-per-node 2 slabs.py --side 48

Each process holds a slab of the grid: its rows of the matrix as CSR, and its part of the potential v.  A product needs
a layer of the block from each neighbour, a few hundred kilobytes.  At the end every process prints what it held, and
the results are compared with the closed form.
"""

import argparse
import gc
import math
import os
import time
import warnings

import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, DTensor, init_device_mesh, Shard


def laplacian_rows(side: int, first: int, count: int) -> torch.Tensor:
    """Rows `first` to `first + count - 1` of the 7-point Laplacian as CSR; column c stands for row first - side^2 + c
    of the grid."""
    halo = side * side
    row = torch.arange(first, first + count)
    x, y, z = row // halo, row // side % side, row % side
    columns, there = [row], [torch.ones_like(row, dtype=torch.bool)]
    for coordinate, stride in ((x, halo), (y, side), (z, 1)):
        for step in (-1, 1):
            columns.append(row + step * stride)
            there.append((coordinate + step >= 0) & (coordinate + step < side))
    columns, there = torch.stack(columns, 1), torch.stack(there, 1)
    order = columns.argsort(1)
    columns, there = columns.gather(1, order), there.gather(1, order)
    values = torch.where(columns == row[:, None], 6.0, -1.0).double()
    start = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
    shape = (count, count + 2 * halo)
    return torch.sparse_csr_tensor(
        start, (columns - first + halo)[there], values[there], shape
    )


def with_neighbours(rows: torch.Tensor, halo: int, group) -> torch.Tensor:
    """Rows of a block (rows, p) between the last `halo` of the process before and the first of the one after."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    count, p = rows.shape
    wide = rows.new_zeros((count + 2 * halo, p))
    wide[halo : halo + count] = rows
    messages = []
    for other, sent, received in (
        (rank - 1, rows[:halo], wide[:halo]),
        (rank + 1, rows[count - halo :], wide[halo + count :]),
    ):
        if 0 <= other < world:
            peer = dist.get_global_rank(group, other)
            messages.append(dist.P2POp(dist.isend, sent, peer, group))
            messages.append(dist.P2POp(dist.irecv, received, peer, group))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return wide


class Slabs:
    """V -> (-Laplacian + v) V on DTensor blocks; v: a DTensor of m numbers."""

    def __init__(self, side: int, v: DTensor) -> None:
        mesh = v.device_mesh
        self.halo, self.v, self.group = side * side, v, mesh.get_group()
        self.products = 0
        each = -(-(side**3) // mesh.size())
        count = v.to_local().shape[0]
        if count < self.halo:
            raise ValueError("a process needs a layer of the grid at least")
        self.rows = laplacian_rows(side, each * mesh.get_local_rank(), count)

    def __call__(self, V: DTensor) -> DTensor:
        self.products += 1
        own = V.to_local()
        wide = with_neighbours(own.detach(), self.halo, self.group)
        U = self.rows @ wide + self.v.to_local()[:, None] * own
        return DTensor.from_local(
            U, V.device_mesh, V.placements, shape=V.shape, stride=V.stride()
        )


def measured(work):
    """What work() returns, and the seconds and the processor time that it took."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def solve(side: int, k: int, niter: int, gradient: bool) -> None:
    mesh, m = init_device_mesh("cpu", (dist.get_world_size(),)), side**3
    v = distribute_tensor(torch.zeros(m, dtype=torch.float64), mesh, [Shard(0)])
    A = Slabs(side, v.requires_grad_(gradient))
    A.shape, A.dtype, A.device_mesh = (m, m), torch.float64, mesh
    forget_peak()
    start = memory("VmRSS")
    dist.barrier()
    limit = {} if niter == 0 else {"niter": niter}
    (E, X), wall, cpu = measured(lambda: torch.lobpcg(A, k, largest=False, **limit))
    count = A.products
    text = (
        f"rank {dist.get_rank()}: {X.to_local().shape[0]} of {m} rows, {A.rows.values().numel()} entries of A, "
        f"memory {memory('VmHWM') - start:.0f} MB; {count} products, "
        f"{1e3 * cpu / count:.1f} ms of processor time for each, {wall:.1f} s"
    )
    if gradient:
        # A loss that does not see signs: where the lowest k modes are.
        place = distribute_tensor(
            torch.linspace(0, 1, m, dtype=torch.float64), mesh, [Shard(0)]
        )
        loss = E.sum() + (X.square().sum(1) * place).sum()
        _, wall, cpu = measured(loss.backward)
        text += f"; backward {wall:.1f} s, v.grad {tuple(v.grad.to_local().shape)}"
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    if dist.get_rank() == 0:
        print(*said, sep="\n")
        j = torch.arange(1, side + 1, dtype=torch.float64)
        one = 2 - 2 * torch.cos(math.pi * j / (side + 1))
        one = one[: k + 1]
        sums = one[:, None, None] + one[:, None] + one
        error = (E.to_local() - sums.flatten().sort()[0][:k]).abs().max()
        print(f"eigenvalues to {error:.1e} of the closed form")
    if gradient:
        (first,) = torch.autograd.grad(
            torch.lobpcg(A, k, largest=False, X=X.detach())[0][0], v
        )
        off = (first - X[:, 0].square()).abs().max().full_tensor()
        if dist.get_rank() == 0:
            print(f"gradient of the first in v to {off:.1e} of x^2")


def memory(name: str) -> float:
    """A line of /proc/self/status in MB: VmRSS, what is held, or VmHWM, the most that was since `forget_peak`; NaN
    where there is no such file."""
    if not os.path.exists("/proc/self/status"):
        return math.nan
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) / 1024


def forget_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=32, help="points along an edge")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument(
        "--niter", type=int, default=0, help="stop after so many iterations"
    )
    parser.add_argument("--no-gradient", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse")
    dist.init_process_group("gloo")
    try:
        solve(given.side, given.k, given.niter, not given.no_gradient)
    finally:
        # A cycle of references that holds the mesh, and with it the group, must not
        # live on until the interpreter exits, when its threads are gone.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
