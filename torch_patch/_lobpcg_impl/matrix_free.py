"""MatrixFree: an operand known by its products alone, differentiated in the tensors that its callable reads.

Autograd has to be told which tensors these are: nothing of the iteration is recorded.

discovery      One product with a few fixed vectors, recorded, under a mode that sees every operation.  The graph of the
               product ends in leaves, or in results of earlier operations that the mode has seen: the parameters.
pull back      A gradient needs the cotangent of the parameters for a cotangent U of the product with V.  It comes from
               another recorded product, in which V is a variable of its own: V depends on the parameters, too, and
               autograd must not walk through it.  Derivatives of this one come from a graph that is recorded anew.
substitution   Inside torch.func the parameters that a formula sees are other objects than those which the callable
               holds: wrapped for a level, or unwrapped.  A second mode puts the ones in the place of the others.
"""

import contextlib
import functools
import warnings
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch._lobpcg_impl.abstract_operand import Operand, Probe
from torch._lobpcg_impl.blocks import all_finite
from torch._lobpcg_impl.transforms import (
    accepts_legacy_vmap,
    in_transform,
    twin,
    without_autocast,
)
from torch.autograd import forward_ad, Function
from torch.overrides import TorchFunctionMode


_functorch = torch._C._functorch
# A walk of so many nodes takes some hundredths of a second.
_MOST_NODES = 10000


class MatrixFree(Operand):
    """A matrix known by its products: a callable on blocks (*, m, p), or an object that has `matmul` or `@`.

    batch: the shape (*) of the blocks that the callable gets; dimensions in front of it become columns.
    """

    def __init__(self, name: str, given: Any, batch: Sequence[int]) -> None:
        super().__init__(name)
        self.call = given  # as a tracker sees it
        products = products_of(given)
        self.batch = () if isinstance(products, _OfArrays) else tuple(batch)
        self.function: Any = _Pure(name, products, (), True)
        self.values: Tuple[Tensor, ...] = ()
        self.scale: Optional[Tensor] = None
        self._probe: Optional[Tuple[Tensor, Tensor]] = None

    @property
    def parameters(self) -> Tuple[Tensor, ...]:  # type: ignore[override]
        return self.values

    def with_parameters(self, *parameters: Tensor) -> "MatrixFree":
        same = twin(self)
        same.values = parameters
        return same

    def with_gradient(self, probe: Probe) -> Operand:
        """The operand with its parameters, found by one product; nothing is done where nothing is differentiated."""
        transform = in_transform()
        if not transform and not torch.is_grad_enabled():
            return self
        V = _three(probe())
        block = self._columns(V)
        before = block.clone()
        seen = _Discovery(self.name, transform)
        with torch.enable_grad(), without_autocast(V.device):
            with seen:
                U = self.function((), block)
        self._check_block(U, block)
        same = twin(self)
        if transform:
            # Values cannot be looked at here: `_probed` checks them below the transforms.
            found = list(seen.found.values())
        else:
            self._check_untouched(block, before)
            self._check_finite(U)
            found = _ends(U, seen.found)
            same._probe = V, self._from_columns(U.detach(), V)
        same.function = _Pure(self.name, self.function.call, found, not transform)
        same.values = tuple(found)
        return same

    def mapped(self, size: int, in_dims: Sequence[Optional[int]]) -> "MatrixFree":
        """The operand of a batch of `size`, whose parameters have the batch dimensions in_dims, or None."""
        same = twin(self)
        same.function, same.batch = (
            _Mapped(self.function, tuple(in_dims)),
            (size, *self.batch),
        )
        same._probe = None
        return same

    # -- products -----------------------------------------------------------------------------------------------------

    def _multiply(self, V: Tensor) -> Tensor:
        with torch.no_grad():
            block = self._columns(V)
            # Tensors of inference mode count no writes; the probe's values are compared there as everywhere.
            version = -1 if block.is_inference() else block._version
            U = self.function(self._variables(), block)
            self._check_block(U, block)
            if version >= 0 and block._version != version:
                self._raise_written()
            self._check_finite(U)
            U = U.detach()
            if _shares_memory(U, block):
                U = U.clone()  # whoever gets a product may write to it
            if self.scale is not None:
                U = _times(U, self.scale)
            return self._from_columns(U, V)

    def product(self, V: Tensor) -> Tensor:
        if not in_transform() and not torch.is_grad_enabled():
            return self.apply(V)
        block = self._columns(V)
        if self._by_transform():
            U = self._product_by_transform(block)
        else:
            (U,) = _Recorded.apply(
                self._product, self._stand_ins, len(self.values), *self.values, block
            )
        return self._from_columns(U, V)

    def pullback(self, *pairs: Tuple[Tensor, Tensor]) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        U, V = self._side_by_side(pairs)
        if self._by_transform():
            return self._with_none(self._pull_by_transform(V)(U))
        pulled = _Recorded.apply(
            self._pull, self._stand_ins, len(self.values), *self.values, U, V
        )
        return tuple(pulled)

    def tangent(self, tangents: Sequence[Optional[Tensor]], V: Tensor) -> Tensor:
        """The pull back is linear in U, and the tangent is its adjoint: so no operation inside needs a forward rule."""
        block = self._columns(V)
        pull = self._pull_by_transform(block)
        transposed = torch.func.vjp(pull, torch.zeros_like(block))[1]
        given = [
            torch.zeros_like(p) if t is None else t
            for t, p in zip(tangents, self.values)
            if _is_differentiable(p)
        ]
        (U,) = transposed(tuple(given))
        return self._from_columns(U, V)

    def _by_transform(self) -> bool:
        """Whether parameters are substituted, so that a derivative is one of torch.func, and else of `_Recorded`."""
        return not self.function.as_it_is or in_transform()

    def _product(self, *tensors: Tensor) -> Tuple[Tensor, ...]:
        """(parameters ..., V) -> the product, for `_Recorded`."""
        *parameters, V = tensors
        return (self.function.substituted(parameters, V),)

    def _pull(self, *tensors: Tensor) -> Tuple[Tensor, ...]:
        """(parameters ..., U, V) -> cotangents of the parameters, for `_Recorded`."""
        *parameters, U, V = tensors
        with torch.enable_grad():
            product = self.function.substituted(parameters, V)
        return _gradients((product,), parameters, (U,))

    def _product_by_transform(self, V: Tensor) -> Tensor:
        """Detached parameters are variables inside all the same: the callable may differentiate in them itself."""
        own = [p for p in self.values if _is_differentiable(p)]
        if not own or any(p.requires_grad for p in own):
            return self.function(self.values, V)
        return torch.func.vjp(self._of_varied(V), *own)[0]

    def _pull_by_transform(self, V: Tensor) -> Callable[[Tensor], Tuple[Tensor, ...]]:
        """U -> cotangents of the parameters that have one."""
        own = [p for p in self.values if _is_differentiable(p)]
        product = self._of_varied(V)

        def pull(U: Tensor) -> Tuple[Tensor, ...]:
            return torch.func.vjp(product, *own)[1](U) if own else ()

        return pull

    def _of_varied(self, V: Tensor) -> Callable[..., Tensor]:
        """The product with V as a function of the parameters that a derivative exists in."""

        def product(*varied: Tensor) -> Tensor:
            own = iter(varied)
            values = [next(own) if _is_differentiable(p) else p for p in self.values]
            return self.function(values, V)

        return product

    def _variables(self) -> Sequence[Tensor]:
        """Values below all transforms, as variables where they are put in the place of the callable's own."""
        if self.function.as_it_is:
            return self.values
        return [p.detach().requires_grad_(_is_differentiable(p)) for p in self.values]

    def _with_none(self, given: Sequence[Tensor]) -> Tuple[Optional[Tensor], ...]:
        own = iter(given)
        return tuple(next(own) if _is_differentiable(p) else None for p in self.values)

    def _stand_ins(self) -> List[Tensor]:
        """The parameters as variables of an inner graph: themselves, or aliases where that graph must end in them."""
        return [
            p.detach().requires_grad_() if aliased or _has_hooks(p) else p
            for p, aliased in zip(self.function.originals, self.function.aliased)
        ]

    # -- shapes of blocks ---------------------------------------------------------------------------------------------

    def _columns(self, V: Tensor) -> Tensor:
        """V (+, *, m, p) as the callable gets it, (*, m, + p); a block without batch goes to every member."""
        extra = V.dim() - 2 - len(self.batch)
        if extra < 0:
            return V.expand(tuple(self.batch) + tuple(V.shape[-2:]))
        if extra == 0:
            return V
        V = V.movedim(tuple(range(extra)), tuple(range(-1 - extra, -1)))
        return V.flatten(-1 - extra)

    def _from_columns(self, U: Tensor, V: Tensor) -> Tensor:
        """The product (*, m, + p) in the shape of V."""
        extra = V.dim() - 2 - len(self.batch)
        if extra <= 0:
            return U
        U = U.unflatten(-1, tuple(V.shape[:extra]) + tuple(V.shape[-1:]))
        return U.movedim(tuple(range(-1 - extra, -1)), tuple(range(extra)))

    def _side_by_side(
        self, pairs: Sequence[Tuple[Tensor, Tensor]]
    ) -> Tuple[Tensor, Tensor]:
        """All U and all V as one block each: one product serves them all."""
        both = [torch.broadcast_tensors(U, V) for U, V in pairs]
        U = torch.cat([self._columns(blocks[0]) for blocks in both], -1)
        V = torch.cat([self._columns(blocks[1]) for blocks in both], -1)
        return U, V

    # -- what the products say of the matrix --------------------------------------------------------------------------

    def scaled(self, scale: Tensor) -> Operand:
        if bool((scale == 1.0).all()):
            return self
        same = twin(self)
        same.scale = scale if self.scale is None else self.scale * scale
        if self._probe is not None:
            V, U = self._probe
            same._probe = V, _times(U, scale)
        return same

    def _probed(self, probe: Probe) -> Tuple[Tensor, Tensor]:
        """A block of three fixed vectors, the last made of the others, and its product, made once.

        Where the parameters are substituted this is the check that none was missed: see `_check_reached`.
        """
        if self._probe is None:
            V = _three(probe())
            before = V.clone()
            if not self.function.as_it_is:
                self._check_reached(V)
            U = self.apply(V)
            self._check_untouched(V, before)
            self._probe = V, U
        return self._probe

    def largest(self, probe: Probe) -> Tensor:
        U = self._probed(probe)[1]
        return self.space.largest_entries(U).amax(-1).to(torch.float64)

    def mean_square(self, probe: Probe) -> Tensor:
        V, U = self._probed(probe)
        both = [torch.linalg.vector_norm(T, dim=(-2, -1)) for T in (U, V)]
        image, length = self.space.joined(both, 2)
        return (image / length).square()

    def in_double(self) -> Operand:
        return self

    def member(self, position: Tuple[int, ...]) -> Operand:
        if not self.batch:
            return self
        same = twin(self)
        same.function, same.batch = _Member(self.function, self.batch, position), ()
        same.scale = (
            None if self.scale is None else self.scale.expand(self.batch)[position]
        )
        same._probe = None
        return same

    def check_hermitian(self, probe: Probe) -> None:
        """ValueError where the callable is not linear, a warning where it is not Hermitian, by the products with fixed
        u, v and u + v (complex: u + i v).

        Rounding: eight times the bound for a stored matrix (see `Sparse.check_hermitian`), since a product may take
        several steps.  Up to 64 eps of single precision what deviates may be a product computed there, or by an inner
        iteration: a warning, too.
        """
        V, U = self._probed(probe)
        eps, name = torch.finfo(V.dtype).eps, self.name
        rms = self.mean_square(probe).sqrt().to(V.dtype.to_real())
        limit = 64.0 * eps * self.space.size(V) * rms
        u, v, both = U.split(1, -1)
        apart = u + (1j * v if V.is_complex() else v) - both
        apart = self.space.largest_entries(apart)[..., 0]
        if bool((apart > limit + 64.0 * torch.finfo(torch.float32).eps * rms).any()):
            raise ValueError(
                f"lobpcg: {name} is not linear: {name}(u) + {name}(v) and {name}(u + v) differ by "
                f"{float(apart.max())} for fixed vectors u, v with entries in (-1, 1), at most {float(limit.max())} "
                f"expected; a callable must map V to {name} V, without a constant part"
            )
        forms = self.space.gram(V[..., :2], U[..., :2])
        skew = (forms - forms.mH).abs().amax((-2, -1))
        if bool((skew > limit).any()):
            warnings.warn(
                f"lobpcg: the callable {name} is not Hermitian: |u^H {name} v - (v^H {name} u)^H| = "
                f"{float(skew.max())} for fixed vectors u, v with entries in (-1, 1), at most {float(limit.max())} "
                "expected; pairs and gradients are those of a Hermitian matrix only: pass the products of one",
                stacklevel=2,
            )
        elif bool((apart > limit).any()):
            warnings.warn(
                f"lobpcg: the callable {name} is linear to {float(apart.max())} only, for vectors with entries in "
                f"(-1, 1), where rounding explains {float(limit.max())}; pairs and gradients are no more accurate: "
                f"raise the accuracy of its products",
                stacklevel=2,
            )

    # -- what a callable must not do ----------------------------------------------------------------------------------

    def _check_block(self, U: Any, V: Tensor) -> None:
        name = self.name
        if not isinstance(U, Tensor):
            raise TypeError(
                f"lobpcg: {name} returned {type(U).__name__}; a callable {name} must map a block (*, m, p) to a tensor "
                "of the same shape"
            )
        kept = (U.shape, U.dtype, U.device) == (V.shape, V.dtype, V.device)
        if not kept or U.layout != torch.strided:
            raise ValueError(
                f"lobpcg: {name} returned shape {tuple(U.shape)}, {U.dtype}, {U.layout}, {U.device} for a block of "
                f"shape {tuple(V.shape)}, {V.dtype}, {V.device}; a callable must keep shape, dtype, layout and device"
            )

    def _check_finite(self, U: Tensor) -> None:
        # Seen here a NaN has a name; later it would be a factorisation that fails.  The norm of all is one pass over
        # memory in any order, and infinite besides where only squares overflow.
        U = U.detach()
        if not all_finite(torch.linalg.vector_norm(U)) and not all_finite(U):
            raise ValueError(
                f"lobpcg: {self.name} returned NaN or infinite values for a finite block; check the callable "
                f"{self.name}"
            )

    def _check_untouched(self, V: Tensor, before: Tensor) -> None:
        """Values, not version numbers: a write through NumPy counts as none."""
        if not torch.equal(V, before):
            self._raise_written()

    def _raise_written(self) -> None:
        raise ValueError(
            f"lobpcg: {self.name} wrote to the block that it was called with; a callable must leave it as it is: "
            "compute out of place, or on V.clone()"
        )

    def _check_reached(self, V: Tensor) -> None:
        """RuntimeError where the product depends on a variable that substitution does not reach."""
        with torch.enable_grad():
            own = self._variables()
            U = self.function(own, self._columns(V))
        if not isinstance(U, Tensor):
            self._check_block(U, V)
        known = {id(p) for p in own}
        strangers = [end for end in _ends(U, {}) if id(end) not in known]
        if _functorch.is_functorch_wrapped_tensor(U):
            strangers.append(U)
        if strangers:
            raise RuntimeError(
                f"lobpcg: the product of {self.name} depends on a tensor of shape {tuple(strangers[0].shape)} by a way "
                "that torch.func does not see, such as an autograd.Function or a scripted function; its gradient would "
                f"be lost: let {self.name} read it in an ordinary operation, as a closure or an nn.Module does, and "
                "pass on the result"
            )


def _three(V: Tensor) -> Tensor:
    """u, v and u + v, or u + i v where that can be told: u + v would not show a callable that conjugates."""
    u, v = V[..., :1], V[..., 1:2]
    return torch.cat([u, v, u + (1j * v if V.is_complex() else v)], -1)


def _shares_memory(U: Tensor, V: Tensor) -> bool:
    return U.untyped_storage().data_ptr() == V.untyped_storage().data_ptr()


def _times(U: Tensor, scale: Tensor) -> Tensor:
    return U * scale[..., None, None].to(U.dtype.to_real())


def _is_differentiable(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


# ----------------------------------------------------------------------------------------- what is called


def products_of(given: Any) -> Callable[[Tensor], Tensor]:
    """The products with torch blocks of a callable or of an object that has `matmul` or `@`."""
    if takes_arrays(given):
        return _OfArrays(given)
    if callable(given):
        return given
    return getattr(given, "matmul", None) or (lambda V: given @ V)


def takes_arrays(given: Any) -> bool:
    """Whether the object multiplies NumPy arrays, as the LinearOperator of SciPy does, and what pyamg makes of it."""
    dtype = getattr(given, "dtype", None)
    foreign = dtype is not None and not isinstance(dtype, torch.dtype)
    return hasattr(given, "matmat") or (foreign and hasattr(given, "__matmul__"))


class _OfArrays:
    """The products of an object that multiplies arrays (m, p); on the CPU no block is copied."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __call__(self, V: Tensor) -> Tensor:
        import numpy

        block = V.detach().resolve_conj().resolve_neg().cpu().numpy()
        array = numpy.asarray(self.given @ block)
        if not array.flags.writeable or any(step < 0 for step in array.strides):
            array = array.copy()
        U = torch.from_numpy(array).to(V.device)
        return U if U.is_complex() and not V.is_complex() else U.to(V.dtype)


class _Pure:
    """The callable as a function of its parameters and a block.

    as_it_is: the parameters are those that the callable holds, since they were found outside of any transform; then
    it is called without substitution unless a transform is active.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[Tensor], Tensor],
        originals: Sequence[Tensor],
        as_it_is: bool,
    ) -> None:
        self.name, self.call, self.originals = name, call, tuple(originals)
        self.as_it_is = as_it_is
        self.aliased = _follow_others(originals) if as_it_is else ()

    def __call__(self, parameters: Sequence[Tensor], V: Tensor) -> Tensor:
        if self.as_it_is and not in_transform():
            return self.call(V)
        return self.substituted(parameters, V)

    def substituted(self, parameters: Sequence[Tensor], V: Tensor) -> Tensor:
        others = {id(o): p for o, p in zip(self.originals, parameters) if o is not p}
        with _Substitution(self.name, others) if others else contextlib.nullcontext():
            return self.call(V)


class _Mapped:
    """A pure function on a batch of parameters: (parameters, V (size, *, m, p)) -> the same of each."""

    as_it_is = False

    def __init__(self, function: Any, in_dims: Tuple[Optional[int], ...]) -> None:
        self.function, self.in_dims = function, in_dims

    @property
    def originals(self) -> Tuple[Tensor, ...]:
        return self.function.originals

    def __call__(self, parameters: Sequence[Tensor], V: Tensor) -> Tensor:
        return torch.vmap(self.function, in_dims=(self.in_dims, 0))(
            tuple(parameters), V
        )


class _Member:
    """A pure function for one matrix of a batch, whose callable knows the whole batch only."""

    def __init__(
        self, function: Any, batch: Tuple[int, ...], position: Tuple[int, ...]
    ) -> None:
        self.function, self.batch, self.position = function, batch, position
        self.originals, self.as_it_is = function.originals, function.as_it_is

    def __call__(self, parameters: Sequence[Tensor], V: Tensor) -> Tensor:
        block = V.expand(self.batch + tuple(V.shape)).contiguous()
        return self.function(parameters, block)[self.position]


# --------------------------------------------------------------------------------- discovery, substitution


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _replaced(value: Any, other: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return other(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, other) for part in value)
    if type(value) is dict:
        return {key: _replaced(part, other) for key, part in value.items()}
    return value


def _level() -> int:
    """The level of torch.func that is active; 0 where none is."""
    return _functorch.maybe_current_level() or 0


def _level_of(T: Tensor) -> int:
    return _functorch.maybe_get_level(T) if _is_wrapped(T) else 0


def _is_wrapped(T: Tensor) -> bool:
    return _functorch.is_functorch_wrapped_tensor(T)


class _Discovery(TorchFunctionMode):
    """Notes the tensors that operations read, that a derivative can be taken in, and that were made before.

    found: these, by identity.  Made inside is what an operation returned, every layer of torch.func of it, or what has
    a node younger than the mode.
    """

    def __init__(self, name: str, transform: bool) -> None:
        super().__init__()
        self.name, self.transform = name, transform
        self.found: Dict[int, Tensor] = {}
        self.made: Dict[int, Tensor] = {}  # held, so that no identity comes twice
        self.level = _level()
        with torch.enable_grad():
            node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
        self.first: int = node._sequence_nr()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for T in _tensors((args, kwargs)):
            self._meet(T)
        out = func(*args, **kwargs)
        for T in _tensors(out):
            self.made[id(T)] = T
            while _is_wrapped(T):
                T = _functorch.get_unwrapped(T)
                self.made[id(T)] = T
        return out

    def _meet(self, T: Tensor) -> None:
        if id(T) in self.made:
            return
        inside = _level_of(T) > self.level
        while _level_of(T) > self.level:
            T = _functorch.get_unwrapped(T)
        if id(T) in self.made or not self._varies(T):
            return
        if T.grad_fn is not None and T.grad_fn._sequence_nr() >= self.first:
            return
        if inside and self.transform and T.requires_grad:
            _raise_inside(self.name, T)
        self.found[id(T)] = T

    def _varies(self, T: Tensor) -> bool:
        if T.requires_grad:
            return True
        if not self.transform:
            return False
        if _is_wrapped(T):
            return True
        dual = forward_ad._current_level >= 0 and _is_differentiable(T)
        return dual and forward_ad.unpack_dual(T).tangent is not None


class _Substitution(TorchFunctionMode):
    """Operations read other tensors in the place of some; others: these by the identity of those."""

    def __init__(self, name: str, others: Dict[int, Tensor]) -> None:
        super().__init__()
        self.name, self.others, self.level = name, others, _level()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = _replaced((args, kwargs or {}), self._other)
        return func(*args, **kwargs)

    def _other(self, T: Tensor) -> Tensor:
        if id(T) in self.others:
            return self.others[id(T)]
        inner = T
        while _level_of(inner) > self.level:
            inner = _functorch.get_unwrapped(inner)
            if id(inner) in self.others:
                _raise_inside(self.name, inner)
        return T


def _raise_inside(name: str, T: Tensor) -> None:
    raise RuntimeError(
        f"lobpcg: the callable {name} hands a tensor of shape {tuple(T.shape)} to torch.func, which does not show it "
        "to the transform around lobpcg, and its gradient would be lost; hand on a copy: tensor.clone()"
    )


def _ends(U: Tensor, known: Dict[int, Tensor]) -> List[Tensor]:
    """The tensors in which the graph of U ends: those of the known ones that it meets, and leaves."""
    if not U.requires_grad:
        return []
    edges = {(T.grad_fn, T.output_nr): T for T in known.values() if not T.is_leaf}
    ends: Dict[int, Tensor] = {}
    pending: List[Any] = [(U.grad_fn, U.output_nr)]
    seen = set()
    while pending:
        edge = pending.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        end = edges.get(edge, getattr(edge[0], "variable", None))
        if end is not None:
            ends[id(end)] = end
        else:
            pending.extend(edge[0].next_functions)
    return [U] if U.is_leaf else list(ends.values())


# ------------------------------------------------------------------------------- derivatives without torch.func


def _has_hooks(p: Tensor) -> bool:
    """Whether an inner graph that ends in p would run hooks that are meant for the whole gradient."""
    return bool(p._backward_hooks) or (p.retains_grad and not p.is_leaf)


def _follow_others(parameters: Sequence[Tensor]) -> Tuple[bool, ...]:
    """Whether a parameter was computed from another one, whose gradient would then come through both."""
    edges = {(p.grad_fn, p.output_nr) for p in parameters if not p.is_leaf}
    leaves = {id(p) for p in parameters if p.is_leaf}
    return tuple(
        not p.is_leaf and len(parameters) > 1 and _leads_to(p.grad_fn, edges, leaves)
        for p in parameters
    )


def _leads_to(node: Any, edges: Any, leaves: Any) -> bool:
    """Whether a path from the node meets an edge or a leaf; true as well where the graph is too large to tell."""
    pending, seen = list(node.next_functions), set()
    while pending:
        edge = pending.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        met = edge in edges or id(getattr(edge[0], "variable", None)) in leaves
        if met or len(seen) > _MOST_NODES:
            return True
        pending.extend(edge[0].next_functions)
    return False


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Tuple[Tensor, ...]:
    """Zeros where an input has no influence; recorded where grad mode is on."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if o.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(T) for T in inputs)
    outputs, cotangents = zip(*pairs)
    # The graph is this function's own, but for what lies before a result that an autograd.Function has hidden.
    found = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return tuple(torch.zeros_like(T) if g is None else g for g, T in zip(found, inputs))


class _Recorded(Function):
    """(function, stand_ins, count, parameters ..., blocks ...) -> function(parameters ..., blocks ...), a tuple.

    The function runs on variables of its own, blocks that are cut from their history; the parameters, `count` of them,
    are read where the callable holds them.  A derivative runs it again and differentiates what is recorded then, so
    that every order is right, and nothing is kept meanwhile.
    """

    @staticmethod
    def forward(
        function: Callable[..., Tuple[Tensor, ...]],
        stand_ins: Callable[[], List[Tensor]],
        count: int,
        *tensors: Tensor,
    ) -> Tuple[Tensor, ...]:
        blocks = [V.detach().requires_grad_() for V in tensors[count:]]
        outputs = function(*stand_ins(), *blocks)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, ctx.stand_ins, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @accepts_legacy_vmap
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = ctx.saved_tensors
        transposed = functools.partial(_transposed, ctx.function, len(tensors))
        found = _Recorded.apply(
            transposed, ctx.stand_ins, ctx.count, *tensors, *cotangents
        )
        return (None, None, None, *found)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        function: Any,
        stand_ins: Any,
        count: int,
        *tensors: Any,
    ) -> Any:
        rows = [
            _Recorded.apply(
                function,
                stand_ins,
                count,
                *[
                    T if dim is None else T.select(dim, i)
                    for T, dim in zip(tensors, in_dims[3:])
                ],
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(column) for column in zip(*rows))
        return outputs, (0,) * len(outputs)


def _transposed(
    function: Callable[..., Tuple[Tensor, ...]], count: int, *tensors: Tensor
) -> Tuple[Tensor, ...]:
    """(inputs of the function ..., cotangents of its outputs ...) -> cotangents of its inputs."""
    inputs, cotangents = tensors[:count], tensors[count:]
    with torch.enable_grad():
        outputs = function(*inputs)
    return _gradients(outputs, inputs, cotangents)
