"""torch.lobpcg on DTensor: matrices whose rows live on several processes, and batches of which each holds a part.

Inside, blocks are plain tensors of the rows that a process holds, operands multiply those, and solver and derivative
are the ones of a single process; their sums over m end in module processes.  This module opens the DTensors, and wraps
what comes out: E the same everywhere, X by rows.  It is imported where an argument is a DTensor, and by nothing else.
"""

import dataclasses
import functools
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._lobpcg_impl.abstract_operand import Operand, Probe
from torch._lobpcg_impl.arguments import declared, Options, options_of
from torch._lobpcg_impl.blocks import largest_entries
from torch._lobpcg_impl.derivative import find_pairs, reverse_mode
from torch._lobpcg_impl.matrix_free import MatrixFree, products_of, takes_arrays
from torch._lobpcg_impl.operand import Identity, Pencil
from torch._lobpcg_impl.pairs import Pairs
from torch._lobpcg_impl.processes import Processes
from torch._lobpcg_impl.transforms import (
    in_transform,
    is_traced,
    may_be_differentiated,
    twin,
    without_autocast,
)
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


_NAMES = ("A", "B", "X", "iK")


def lobpcg_on_processes(
    lobpcg: Callable[..., Tuple[Tensor, Tensor]],
    A: Any,
    B: Any,
    X: Any,
    iK: Any,
    numbers: Sequence[Any],
    **others: Any,
) -> Tuple[Tensor, Tensor]:
    """torch.lobpcg where an argument is a DTensor, or carries a device_mesh; lobpcg: what solves plain tensors."""
    given = dict(zip(_NAMES, (A, B, X, iK)))
    _refuse_transforms(given)
    mesh = _mesh_of(given)
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"lobpcg: rank {dist.get_rank()} is not in the mesh of its arguments; only the processes of a mesh may "
            "call lobpcg on it"
        )
    model = next((T for T in given.values() if isinstance(T, DTensor)), None)
    device = torch.device(mesh.device_type) if model is None else model.device
    space = Processes(mesh, _rows_along(given, mesh), device)
    make = functools.partial(_checked, given, mesh, space, numbers, others)
    options = space.attempt(make)
    _agree_on_arguments(space, given, numbers)
    if _is_batch(given):
        return _batch_of_local_solves(lobpcg, given, mesh, space, numbers, others)
    return _over_rows(given, mesh, space, options)


# ------------------------------------------------------------------------------------------------- arguments


def _refuse_transforms(given: Any) -> None:
    local = [T._local_tensor for T in given.values() if isinstance(T, DTensor)]
    if in_transform():
        raise NotImplementedError(
            "lobpcg: torch.func and forward mode over processes are not implemented; use backward() or "
            "torch.autograd.grad, or gather the matrices with full_tensor()"
        )
    if is_traced(*local):
        raise NotImplementedError(
            "lobpcg: a graph over processes is not implemented; call lobpcg on DTensors outside of what is traced or "
            "compiled"
        )


def _mesh_of(given: Any) -> Any:
    """The mesh that all arguments share."""
    found = [
        (name, T.device_mesh)
        for name, T in given.items()
        if getattr(T, "device_mesh", None) is not None
    ]
    first, mesh = found[0]
    for name, other in found[1:]:
        if other != mesh:
            raise ValueError(
                f"lobpcg: {name} is on mesh {other}, {first} on mesh {mesh}; all must be on one mesh: make {name} with "
                f"distribute_tensor({name}, {first}.device_mesh, ...)"
            )
    return mesh


def _rows_along(given: Any, mesh: Any) -> int:
    """The dimension of the mesh that rows are split over; the first where nothing is."""
    for T in given.values():
        for d, placement in enumerate(getattr(T, "placements", None) or ()):
            if isinstance(placement, Shard):
                return d
    return 0


def _is_batch(given: Any) -> bool:
    """Whether the problem is a batch."""
    return any(isinstance(T, DTensor) and T.dim() > 2 for T in given.values())


def _checked(
    given: Any, mesh: Any, space: Processes, numbers: Sequence[Any], others: Any
) -> Optional[Options]:
    """The options; ValueError, TypeError or NotImplementedError where something does not fit."""
    for name, T in given.items():
        if isinstance(T, Tensor) and not isinstance(T, DTensor):
            raise ValueError(
                f"lobpcg: {name} is a plain tensor beside a DTensor; all must be DTensors on one mesh: pass "
                f"distribute_tensor({name}, mesh, placements)"
            )
        if isinstance(T, DTensor):
            _check_kinds(name, T)
    A, B, X, iK = given.values()
    if _is_batch(given):
        _check_batch(given)
        return None
    for name, T in given.items():
        if isinstance(T, DTensor):
            _check_rows(name, T)
    options = options_of(A, B, X, iK, *numbers, **others)
    m, dtype = _size_of(given)
    space.hold(m, dtype)
    if m < 3 * options.n:
        raise ValueError(
            f"lobpcg: expected m >= 3*n over processes, got m={m}, n={options.n}; reduce k or n, or solve so small a "
            "matrix on one process: pass A.full_tensor()"
        )
    if (space.count - 1) * space.each >= m:
        raise ValueError(
            f"lobpcg: some of {space.count} processes have none of m={m} rows; each must have one at least: use a mesh "
            f"of {-(-m // space.each)} processes or fewer"
        )
    for name, T in given.items():
        if isinstance(T, DTensor):
            _check_length(name, T, space)
    return options


def _size_of(given: Any) -> Tuple[int, torch.dtype]:
    """m and the dtype of the problem."""
    for name in ("A", "X", "B"):
        if isinstance(given[name], DTensor):
            return given[name].shape[-2], given[name].dtype
    for name in ("A", "B"):
        shape, dtype = declared(given[name], name)
        if shape is not None and dtype is not None:
            return shape[-2], dtype
    raise AssertionError("options_of has refused what has no size")


def _check_kinds(name: str, T: DTensor) -> None:
    for placement in T.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"lobpcg: {name} has placement {placement}; it must be Shard(0) or Replicate(): call "
                f"{name}.redistribute(placements=...)"
            )
    sharded = [p for p in T.placements if isinstance(p, Shard)]
    if len(sharded) > 1:
        raise ValueError(
            f"lobpcg: {name} is sharded over {len(sharded)} dimensions of the mesh; one at most can be: call {name}."
            "redistribute(placements=...) with Shard for one dimension and Replicate for the others"
        )


def _check_rows(name: str, T: DTensor) -> None:
    if any(isinstance(p, Shard) and p.dim % T.dim() != 0 for p in T.placements):
        raise ValueError(
            f"lobpcg: the columns of {name} are sharded; rows must be: call {name}.redistribute(placements="
            f"{_text([Shard(0) if isinstance(p, Shard) else p for p in T.placements])})"
        )


def _check_length(name: str, T: DTensor, space: Processes) -> None:
    """The rows of torch.chunk, which from_local need not keep to."""
    local = T._local_tensor.shape[0]
    whole = all(isinstance(p, Replicate) for p in T.placements)
    if local != (space.m if whole else space.rows):
        raise ValueError(
            f"lobpcg: this process holds {local} rows of {name} where {space.rows} of {space.m} are its share; split "
            f"rows as distribute_tensor does"
        )


def _text(placements: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, placements)) + "]"


def _agree_on_arguments(space: Processes, given: Any, numbers: Sequence[Any]) -> None:
    """The errors of all processes, and one where they were called with different arguments."""
    same = [type(T).__name__ if T is None else "given" for T in given.values()]
    told = space.exchange((space.fault is not None, repr((same, list(numbers)))))
    if any(faulty for faulty, _ in told):
        space.raise_together()
    if len({arguments for _, arguments in told}) > 1:
        raise ValueError(
            "lobpcg: the processes of the mesh were called with different arguments; A, B, X, iK, k and all other "
            "numbers must be the same on each"
        )


# ------------------------------------------------------------------------------------------------ over rows


def _over_rows(
    given: Any, mesh: Any, space: Processes, options: Options
) -> Tuple[Tensor, Tensor]:
    placements: List[Any] = [Replicate()] * mesh.ndim
    placements[_rows_along(given, mesh)] = Shard(0)
    opened = {}
    for name, T in given.items():
        if isinstance(T, DTensor):
            # A replicated matrix costs no message: its rows are there.
            T = T.redistribute(mesh, placements).to_local()
        opened[name] = T
    layout = (mesh, placements)
    A, B, iK = (
        _operand(opened[name], name, space, layout) for name in ("A", "B", "iK")
    )
    m, dtype = _size_of(given)
    like = torch.empty((m, 0), dtype=dtype, device=space.device)
    pencil = Pencil(A, B, iK if given["iK"] is not None else None, like, [])
    pencil.space = space
    pencil = pencil.with_gradients()
    X = opened["X"] if opened["X"] is None else opened["X"].detach()
    for M in (X if X is None else _Rows("X", X, space), iK):
        if isinstance(M, _Rows):
            M.check_finite(pencil.probe)
    if options.tracker is not None:
        tracker = _TogetherTracked(options.tracker, space)
        options = dataclasses.replace(options, tracker=tracker)
    if space.agree(may_be_differentiated(*pencil.parameters)):
        options = options.with_derivative()
        # Where this process has nothing to differentiate, others have, and wait for it in backward.
        anchor = torch.zeros((), requires_grad=True)
        E, X = _OverRows.apply(pencil.bare(), options, X, anchor, *pencil.parameters)
    else:
        with torch.no_grad(), without_autocast(space.device):
            E, X = find_pairs(pencil, X, options)
        space.agree()
    return _wrapped(E, X, m, layout)


def _wrapped(E: Tensor, X: Tensor, m: int, layout: Any) -> Tuple[Tensor, Tensor]:
    mesh, placements = layout
    k = E.shape[-1]
    return (
        DTensor.from_local(E, mesh, [Replicate()] * mesh.ndim, run_check=False),
        DTensor.from_local(
            X,
            mesh,
            placements,
            run_check=False,
            shape=torch.Size((m, k)),
            stride=(k, 1),
        ),
    )


class _TogetherTracked:
    """A tracker on each process, which stops all if it stops one."""

    def __init__(self, tracker: Callable[[Any], Any], space: Processes) -> None:
        self.tracker, self.space = tracker, space

    def __call__(self, worker: Any) -> None:
        self.space.attempt(lambda: self.tracker(worker))
        stop = self.space.agree(worker.bvars["force_stop"])
        worker.bvars["force_stop"] = stop


class _OverRows(Function):
    """(pencil, options, X, anchor, parameters ...) -> E, X (rows, k)."""

    @staticmethod
    def forward(
        ctx: Any,
        pencil: Pencil,
        options: Options,
        X: Any,
        _: Tensor,
        *parameters: Tensor,
    ) -> Any:
        ctx.pencil, ctx.options = pencil, options
        with without_autocast(pencil.device):
            kept = find_pairs(pencil.with_parameters(parameters, X), X, options)
        pencil.space.agree()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *parameters)
        return kept[0], kept[1]

    @staticmethod
    def backward(ctx: Any, gE: Optional[Tensor], gX: Optional[Tensor]) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
        kept, parameters = saved[:8], saved[8:]
        pencil = ctx.pencil.with_parameters(parameters)
        pairs = Pairs(pencil, ctx.options, *kept)
        E, X = kept[:2]
        needed = pencil.split(ctx.needs_input_grad[4:])
        asked = [gE is not None, gX is not None, any(needed[0]), any(needed[1])]
        values, vectors, need_A, need_B, graph = pencil.space.any_of(
            [*asked, torch.is_grad_enabled()]
        )
        if graph:
            _refuse_second_order()
        # A loss that a process has no part in is a constant there.
        if values and gE is None:
            gE = torch.zeros_like(E)
        if vectors and gX is None:
            gX = torch.zeros_like(X)
        gA: Any = (None,) * len(parameters)
        gB = gA
        if values or vectors:
            with without_autocast(X.device):
                gA, gB = reverse_mode(pairs, gE, gX, need_A, need_B)
        pencil.space.agree()
        found = [*gA[: len(needed[0])], *gB[: len(needed[1])]]
        rest = [None] * (len(parameters) - len(found))
        return (None, None, None, None, *found, *rest)


def _refuse_second_order() -> NoReturn:
    raise NotImplementedError(
        "lobpcg: second derivatives over processes are not implemented; leave create_graph=True out, or gather the "
        "matrices with full_tensor()"
    )


# ------------------------------------------------------------------------------------------------- operands


def _operand(M: Any, name: str, space: Processes, layout: Any) -> Operand:
    if M is None:
        found: Operand = Identity(name)
    elif isinstance(M, Tensor):
        found = _Rows(name, M, space, hermitian=name != "iK")
    elif takes_arrays(M):
        raise TypeError(
            f"lobpcg: {name} multiplies NumPy arrays; over processes it must map DTensor blocks: pass a function"
        )
    else:
        found = _OnBlocks(name, M, space, layout)
    found.space = space
    return found


class _Rows(Operand):
    """Rows (rows, m) of a dense matrix: a product gathers the block, (m, p)."""

    def __init__(
        self, name: str, tensor: Tensor, space: Processes, hermitian: bool = False
    ) -> None:
        super().__init__(name)
        self.tensor, self.space = tensor, space
        self.hermitian = hermitian
        self.made: List[Tensor] = []  # shared by all copies with other parameters

    @property
    def parameters(self) -> Tuple[Tensor, ...]:  # type: ignore[override]
        return (self.tensor,)

    def with_parameters(self, *parameters: Tensor) -> "_Rows":
        same = twin(self)
        (same.tensor,) = parameters
        return same

    @property
    def stored(self) -> int:  # type: ignore[override]
        return self.space.m**2  # type: ignore[attr-defined]

    @property
    def rows(self) -> Tensor:
        """Those of the Hermitian part."""
        if not self.made:
            rows = self.tensor.detach()
            self.made.append(
                _hermitian_rows(rows, self.space) if self.hermitian else rows
            )
        return self.made[0]

    def _multiply(self, V: Tensor) -> Tensor:
        return self.rows @ self.space.gather(V)  # type: ignore[attr-defined]

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Tensor, ...]:
        U, V = (torch.cat(blocks, -1) for blocks in zip(*pairs))
        whole_U, whole_V = self.space.gather(torch.cat([U, V], -1)).chunk(2, -1)  # type: ignore[attr-defined]
        g = torch.matmul(U, whole_V.mH)
        return (g.addmm_(V, whole_U.mH).div_(2),)

    def largest(self, probe: Probe) -> Tensor:
        own = largest_entries(self.tensor.detach().reshape(-1, 1))
        return self.space.largest(own)[0].to(torch.float64)  # type: ignore[attr-defined]

    def mean_square(self, probe: Probe) -> Tensor:
        (length,) = self.space.joined([torch.linalg.vector_norm(self.rows)], 1)
        return length.square() / self.space.m  # type: ignore[attr-defined]

    def diagonal(self) -> Tensor:
        d = self.rows.diagonal(self.space.offset)  # type: ignore[attr-defined]
        return d.real if d.is_complex() else d

    def row_squares(self, d: Tensor) -> Tensor:
        s = d.rsqrt()
        whole = self.space.gather(s.unsqueeze(-1)).squeeze(-1)  # type: ignore[attr-defined]
        M = self.rows * (s.unsqueeze(-1) * whole)
        return torch.linalg.vector_norm(M, dim=-1).square()

    def scaled(self, scale: Tensor) -> Operand:
        if bool((scale == 1.0).all()):
            return self
        rows = self.rows * scale.to(self.tensor.dtype.to_real())
        return _Rows(self.name, rows, self.space)  # type: ignore[arg-type]

    def check_positive(self) -> None:
        if self.space.agree(bool((self.diagonal() <= 0).any())):
            raise ValueError(
                f"lobpcg: {self.name} is not positive definite: a diagonal entry is not positive; {self.name} must be "
                "Hermitian positive definite"
            )


def _hermitian_rows(rows: Tensor, space: Any) -> Tensor:
    """The rows of (A + A^H) / 2; `rows` itself where no bit differs.

    Tile (i, j) goes to process j, and back comes the tile (j, i): each entry travels once, and no process holds more
    than a tile besides its rows.
    """
    given, own = rows, space.ranks[0]
    for step in range(space.count):
        first, count = space.of((own - step) % space.count)
        to, width = space.of((own + step) % space.count)
        if step:
            other = rows.new_empty((count, space.rows))
            space.swap(step, given[:, to : to + width].contiguous(), other)
        else:
            other = given[:, first : first + count].clone()
        tile, other = given[:, first : first + count], other.mH
        if not torch.equal(tile, other):
            rows = rows.clone() if rows is given else rows
            rows[:, first : first + count] = (tile + other) / 2
    return rows


class _OnBlocks(MatrixFree):
    """A callable on DTensor blocks.  Its errors are noted and raised on all processes by the next sum."""

    def __init__(self, name: str, given: Any, space: Processes, layout: Any) -> None:
        super().__init__(name, _Wrapped(name, given, space, layout), ())
        self.call, self.space = given, space

    def with_gradient(self, probe: Probe) -> Operand:
        V = probe()
        find = functools.partial(super().with_gradient, lambda: V)
        found = self.space.attempt(find, self)  # type: ignore[attr-defined]
        self.space.agree()
        return found

    def _multiply(self, V: Tensor) -> Tensor:
        multiply = functools.partial(super()._multiply, V)
        U = self.space.attempt(multiply)  # type: ignore[attr-defined]
        return torch.zeros_like(V) if U is None else U

    def _check_untouched(self, V: Tensor, before: Tensor) -> None:
        check = functools.partial(super()._check_untouched, V, before)
        self.space.attempt(check)  # type: ignore[attr-defined]

    def product(self, V: Tensor) -> Tensor:
        return self.apply(V)

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        U, V = self._side_by_side(pairs)
        pull = functools.partial(self._pulled, U, V)
        nothing = tuple(torch.zeros_like(p) for p in self.values)
        return self.space.attempt(pull, nothing)  # type: ignore[attr-defined]

    def _pulled(self, U: Tensor, V: Tensor) -> Tuple[Tensor, ...]:
        found = self._pull(*self._stand_ins(), U, V)
        return tuple(_as_placed(g, p) for g, p in zip(found, self.values))


def _as_placed(g: Tensor, p: Tensor) -> Tensor:
    """A gradient with the placement of its parameter."""
    if not isinstance(p, DTensor) or not isinstance(g, DTensor):
        return g
    placements = [Replicate() if p.is_partial() else p for p in p.placements]
    return g.redistribute(p.device_mesh, placements)


class _Wrapped:
    """Products on the rows that this process holds, of a callable on DTensor blocks (m, p)."""

    def __init__(self, name: str, given: Any, space: Processes, layout: Any) -> None:
        self.name, self.space = name, space
        self.products = products_of(given)
        self.mesh, self.placements = layout

    def __call__(self, V: Tensor) -> Tensor:
        p = V.shape[-1]
        block = DTensor.from_local(
            V.contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size((self.space.m, p)),
            stride=(p, 1),
        )
        U: Any = self.products(block)
        name, rule = (
            self.name,
            f"must return a DTensor {_text(self.placements)} like its block",
        )
        if not isinstance(U, DTensor):
            raise TypeError(
                f"lobpcg: {name} returned {type(U).__name__}; over processes a callable {rule}: "
                "DTensor.from_local(rows, V.device_mesh, V.placements, shape=V.shape, stride=V.stride())"
            )
        if U.device_mesh != self.mesh or list(U.placements) != self.placements:
            raise ValueError(
                f"lobpcg: {name} returned placements {_text(U.placements)}; over processes a callable {rule}: call "
                "redistribute(V.device_mesh, V.placements) on what it returns"
            )
        if U.shape != block.shape:
            raise ValueError(
                f"lobpcg: {name} returned shape {tuple(U.shape)} for a block of shape {tuple(block.shape)}; a callable "
                "must keep it"
            )
        return U.to_local()


# -------------------------------------------------------------------------------------------------- batches


def _check_batch(given: Any) -> None:
    """A batch has its Shard in a batch dimension, the same of all arguments that are sharded."""
    found = {}
    for name, T in given.items():
        if T is None:
            continue
        if not isinstance(T, DTensor):
            raise NotImplementedError(
                f"lobpcg: {name} is a callable beside a batch on DTensors, which is not implemented; pass a DTensor, "
                "or call lobpcg on local batches"
            )
        for d, placement in enumerate(T.placements):
            if isinstance(placement, Shard):
                dim = placement.dim % T.dim() - T.dim()
                if dim >= -2:
                    raise ValueError(
                        f"lobpcg: {name} is a batch whose matrices are sharded; a batch must be sharded over a batch "
                        f"dimension: call {name}.redistribute(placements=[Shard(0)])"
                    )
                found[name] = (d, dim)
    if len(set(found.values())) > 1:
        raise ValueError(
            f"lobpcg: {' and '.join(found)} are sharded over different dimensions; shard the same batch dimension of "
            "each over the same dimension of the mesh"
        )


def _batch_of_local_solves(
    lobpcg: Callable[..., Tuple[Tensor, Tensor]],
    given: Any,
    mesh: Any,
    space: Processes,
    numbers: Sequence[Any],
    others: Any,
) -> Tuple[Tensor, Tensor]:
    """Each process solves the members that it holds."""
    batch = max((T.shape[:-2] for T in given.values() if T is not None), key=len)
    sharded = [
        (d, p.dim % T.dim() - T.dim())
        for T in given.values()
        if T is not None
        for d, p in enumerate(T.placements)
        if isinstance(p, Shard)
    ]
    along, dim = sharded[0] if sharded else (0, -3)
    place = len(batch) + dim + 2
    placements: List[Any] = [Replicate()] * mesh.ndim
    if sharded:
        placements[along] = Shard(place)
    local = [_local_part(T, mesh, along, dim, bool(sharded)) for T in given.values()]
    A, B, X, iK = local
    k = space.attempt(lambda: lobpcg(A, B, X, iK, numbers, **others))
    space.agree()
    shape = torch.broadcast_shapes(
        *(T.shape[:-2] for T in given.values() if T is not None)
    )
    return tuple(
        DTensor.from_local(
            T,
            mesh,
            placements,
            run_check=False,
            shape=torch.Size((*shape, *T.shape[len(shape) :])),
            stride=torch.empty(
                (*shape, *T.shape[len(shape) :]), device="meta"
            ).stride(),
        )
        for T in k
    )  # type: ignore[return-value]


def _local_part(T: Any, mesh: Any, along: int, dim: int, sharded: bool) -> Any:
    """What this process needs of an argument: its members, or the whole where all members share it."""
    if T is None:
        return None
    placements = list(T.placements)
    if sharded and T.dim() >= -dim and T.shape[dim] > 1:
        placements[along] = Shard(T.dim() + dim)
        return T.redistribute(mesh, placements).to_local()
    if not sharded:
        return T.to_local()
    # Its gradient is the sum of what the members give.
    of_gradient = [Partial() if d == along else p for d, p in enumerate(placements)]
    return T.to_local(grad_placements=of_gradient)
