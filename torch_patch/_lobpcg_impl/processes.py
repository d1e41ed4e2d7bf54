"""Processes: the rows of tall blocks over a device mesh; where a sum over m ends there.

Every process holds some rows of each block as a plain tensor, and all run the same program.  What keeps them together:

- A sum over m is one all-reduce of whatever numbers are needed at the time, and every decision is read from such sums,
  which have the same bits everywhere.
- Decompositions of small matrices are those of the first process, since a thread more may turn a sign.
- An error on one process is noted, travels with the next sum, and is then raised on all.

Of a mesh with more dimensions than one the rows are split over one; along the others every process has a twin, whose
sums are averaged with its own, so that twins stay equal to the bit.
"""

import itertools
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._lobpcg_impl import blocks
from torch._lobpcg_impl.blocks import Space


# Fields of what `first` sends, and numbers that describe one.
_FIELDS, _HEAD = 8, 4
_NONE, _NUMBER, _REAL, _COMPLEX, _MASK = range(5)


class Processes(Space):
    """m rows over the dimension `along` of a mesh, by the rule of torch.chunk: `each` rows a process, the last ones
    fewer.

    offset, rows: those of this process.  fault: an error of this process that the others do not know of yet.
    """

    split = True
    m = each = offset = rows = 0

    def __init__(self, mesh: Any, along: int, device: torch.device) -> None:
        dims = [along, *(d for d in range(mesh.ndim) if d != along)]
        self.mesh, self.dims = mesh, dims
        # Rank of the first process of each group.
        self.firsts = [dist.get_global_rank(group, 0) for group in self.groups]
        self.ranks = [dist.get_rank(group) for group in self.groups]
        self.count = dist.get_world_size(self.groups[0])
        self.twins = mesh.size() // self.count
        self.device, self.complex = device, False
        self.fault: Optional[BaseException] = None

    @property
    def groups(self) -> List[Any]:
        """Of the rows, then of their twins.  Looked up, not held: what a cycle of references keeps alive beyond
        destroy_process_group() aborts the interpreter at its exit, now and then."""
        return [self.mesh.get_group(d) for d in self.dims]

    def hold(self, m: int, dtype: torch.dtype) -> None:
        """Take the rows of an m x m problem."""
        self.m, self.each, self.complex = m, -(-m // self.count), dtype.is_complex
        self.offset = min(m, self.ranks[0] * self.each)
        self.rows = min(self.each, m - self.offset)

    def of(self, process: int) -> Tuple[int, int]:
        """First row of a process of this group, and how many it has."""
        start = min(self.m, process * self.each)
        return start, min(self.each, self.m - start)

    # -- errors -------------------------------------------------------------------------------------------------------

    def note(self, error: BaseException) -> None:
        """Keep an error until all processes know of it."""
        self.fault = self.fault or error

    def attempt(self, make: Callable[[], Any], otherwise: Any = None) -> Any:
        """make(), or, where that is an error, `otherwise`, the error being noted."""
        try:
            return make()
        except Exception as error:
            self.note(error)
            return otherwise

    def exchange(self, thing: Any) -> List[Any]:
        """What each process has, of all."""
        held = [thing]
        for group in self.groups:
            lists: List[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(lists, held, group=group)
            held = list(itertools.chain.from_iterable(lists))
        return held

    def raise_together(self) -> NoReturn:
        """The own error, or that of the first process that has one.  All processes are here."""
        error, self.fault = self.fault, None
        text = None if error is None else (_kind(error).__name__, str(error))
        told = self.exchange((dist.get_rank(), text))
        if error is not None:
            raise error
        rank, (kind, said) = next(pair for pair in told if pair[1] is not None)
        classes = {T.__name__: T for T in _KINDS}
        raise classes[kind](f"lobpcg: on rank {rank}: {said}")

    # -- sums ---------------------------------------------------------------------------------------------------------

    def size(self, V: Tensor) -> int:
        return self.m

    def joined(self, parts: List[Tensor], lengths: int = 0) -> List[Tensor]:
        """Sums in double precision; of 2-norms those of their squares, and roots of them."""
        wide = [T.to(torch.promote_types(T.dtype, torch.float64)) for T in parts]
        wide[:lengths] = [T.square() for T in wide[:lengths]]
        real = [torch.view_as_real(T) if T.is_complex() else T for T in wide]
        alarm = real[0].new_full((1,), 0.0 if self.fault is None else 1.0)
        sums = self._sum(torch.cat([*(T.reshape(-1) for T in real), alarm]))
        if float(sums[-1]) != 0.0:
            self.raise_together()
        whole = []
        pieces = sums[:-1].split([T.numel() for T in real])
        for i, (piece, T, part) in enumerate(zip(pieces, real, parts)):
            total = piece.reshape(T.shape)
            if part.is_complex():
                total = torch.complex(*total.unbind(-1))
            whole.append((total.sqrt() if i < lengths else total).to(part.dtype))
        return whole

    def _sum(self, message: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(message, group=group)
        return message if self.twins == 1 else message.div_(self.twins)

    def agree(self, flag: bool = False) -> bool:
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> List[bool]:
        """Of each flag, whether it is set on any process."""
        numbers = torch.tensor(flags, dtype=torch.float64, device=self.device)
        return [number > 0.0 for number in self.joined([numbers])[0].tolist()]

    def gram(self, U: Tensor, V: Tensor) -> Tensor:  # type: ignore[override]
        return self.joined([blocks.gram(U, V)])[0]

    def inner(self, U: Tensor, V: Tensor, keepdim: bool = False) -> Tensor:  # type: ignore[override]
        return self.joined([blocks.inner(U, V, keepdim)])[0]

    def norms(self, V: Tensor, keepdim: bool = False) -> Tensor:  # type: ignore[override]
        return self.joined([blocks.norms(V, keepdim)], 1)[0]

    def safe_norms(self, V: Tensor) -> Tensor:  # type: ignore[override]
        top = self.largest_entries(V).unsqueeze(-2)
        unit = torch.where(top > 0, top, torch.ones_like(top))
        return top * self.norms(V / unit, keepdim=True)

    def largest_entries(self, V: Tensor) -> Tensor:  # type: ignore[override]
        return self.largest(blocks.largest_entries(V))

    def largest(self, T: Tensor) -> Tensor:
        """The largest numbers of all processes, NaN where one is: a reduction by MAX would drop that."""
        for group in self.groups:
            size = dist.get_world_size(group)
            every = T.new_empty((size, *T.shape))
            dist.all_gather(list(every.unbind(0)), T.contiguous(), group=group)
            T = every.amax(0)
        return T

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fixed_block(  # type: ignore[override]
        self, m: int, count: int, first: int, like: Tensor, offset: int = 0
    ) -> Tensor:
        return blocks.fixed_block(self.rows, count, first, like, self.offset)

    def gather(self, V: Tensor) -> Tensor:
        """The whole block (m, p) of rows V (rows, p)."""
        own = torch.view_as_real(V) if V.is_complex() else V
        shape = own.shape[1:]
        if self.rows == self.each:
            own = own.contiguous()
        else:
            own = torch.cat([own, own.new_zeros((self.each - self.rows, *shape))])
        whole = own.new_empty((self.count * self.each, *shape))
        dist.all_gather(list(whole.split(self.each)), own, group=self.groups[0])
        whole = whole[: self.m]
        return torch.view_as_complex(whole) if V.is_complex() else whole

    def swap(self, step: int, tile: Tensor, received: Tensor) -> None:
        """Send a tile to the process `step` after this one; what the one `step` before sends comes into `received`."""
        group, own = self.groups[0], self.ranks[0]
        there, back = (
            dist.get_global_rank(group, (own + s) % self.count) for s in (step, -step)
        )
        real = [
            torch.view_as_real(T) if T.is_complex() else T for T in (tile, received)
        ]
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, real[0], there, group),
                dist.P2POp(dist.irecv, real[1], back, group),
            ]
        )
        for one in work:
            one.wait()

    # -- small matrices -----------------------------------------------------------------------------------------------

    def first(self, make: Callable[[], Any], order: int) -> Any:
        """The fields that make() returns on the first process: tensors of two dimensions at most, in double where they
        are not masks, numbers and None.  One broadcast, however large they turn out to be.
        """
        room = order * (order + 1) * 2 * (2 if self.complex else 1) + 4 * order
        message = torch.zeros(1 + _FIELDS * _HEAD + room, dtype=torch.float64)
        if not any(self.ranks):
            fields = self.attempt(make)
            message[0] = -1.0 if fields is None else len(fields)
            _pack(message, fields or ())
        message = message.to(self.device)
        # To the twins of the first process, and from these along the rows.
        for group, first in list(zip(self.groups, self.firsts))[::-1]:
            dist.broadcast(message, src=first, group=group)
        message = message.cpu()
        if message[0] < 0:
            self.raise_together()
        return _unpack(message)


_KINDS = (
    ValueError,
    TypeError,
    NotImplementedError,
    RuntimeError,
)


def _kind(error: BaseException) -> Any:
    """The class that an error has on the other processes."""
    return next((T for T in _KINDS if isinstance(error, T)), RuntimeError)


def _pack(message: Tensor, fields: Sequence[Any]) -> None:
    """Fields behind their descriptions: kind, number of dimensions, sizes."""
    place = 1 + _FIELDS * _HEAD
    for i, field in enumerate(fields):
        head = [_NONE, 0, 0, 0]
        if isinstance(field, Tensor):
            kind = _REAL
            if field.dtype == torch.bool:
                kind = _MASK
            elif field.is_complex():
                kind = _COMPLEX
            head = [kind, field.dim(), *field.shape, 0, 0][:_HEAD]
            real = torch.view_as_real(field) if field.is_complex() else field
            message[place : place + real.numel()] = real.reshape(-1)
            place += real.numel()
        elif field is not None:
            head = [_NUMBER, 0, 0, 0]
            message[place] = field
            place += 1
        message[1 + i * _HEAD : 1 + (i + 1) * _HEAD] = torch.tensor(head)


def _unpack(message: Tensor) -> List[Any]:
    numbers = message[: 1 + _FIELDS * _HEAD].tolist()
    place = len(numbers)
    fields: List[Any] = []
    for i in range(int(numbers[0])):
        head = [int(x) for x in numbers[1 + i * _HEAD : 1 + (i + 1) * _HEAD]]
        kind, shape = head[0], head[2 : 2 + head[1]]
        if kind == _NONE:
            fields.append(None)
            continue
        if kind == _NUMBER:
            fields.append(float(message[place]))
            place += 1
            continue
        whole = [*shape, 2] if kind == _COMPLEX else shape
        count = torch.Size(whole).numel()
        T = message[place : place + count].reshape(whole)
        place += count
        if kind == _COMPLEX:
            T = torch.complex(*T.unbind(-1))
        fields.append(T.bool() if kind == _MASK else T.clone())
    return fields
