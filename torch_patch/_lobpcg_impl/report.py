"""What is said about a derivative: one warning, of the worst that was found, on the line that asked for it."""

import os
import sys
import threading
import warnings
from typing import Any, Callable, List, Optional, Tuple, Type

import torch
from torch import Tensor


_TORCH = os.path.dirname(torch.__file__) + os.sep
_MOST_NAMED = 4
_this_thread = threading.local()


def warn(text: str, category: Type[Warning] = RuntimeWarning) -> None:
    """A warning on the nearest line outside of torch: in backward, that is behind the autograd engine.

    Python shows a text once for each such line, so a training loop hears of what changes, and of nothing twice.
    """
    frame: Any = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame, level = frame.f_back, level + 1
    # Without such a line, as on the engine's own threads, the level does not matter.
    warnings.warn(text, category, stacklevel=level)


class OneWarning:
    """Of what is `found` inside the block only the worst is said, at its end; nothing, where the block raises.

    doubtful: whether something was found that rests on an estimate, or an estimate came near to what is worth a word.
    hidden(): what is left out of the factors of the gradient, where that was noted.
    """

    def __enter__(self) -> "OneWarning":
        self.outer = getattr(_this_thread, "block", None)
        self.entries: List[Tuple[str, float, Optional[float], Optional[float]]] = []
        self.doubtful = False
        self.hidden: Callable[[], Optional[Tensor]] = lambda: None
        _this_thread.block = self
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        _this_thread.block = self.outer
        if kind is None and self.entries:
            found(*max(self.entries, key=lambda entry: entry[1]))

    def measured(self, error: float, least: float, otherwise: str) -> None:
        """The relative error was measured: what was estimated is said from `least` on, and with it; `otherwise`, where
        no estimate has said anything."""
        certain = [entry for entry in self.entries if entry[3] is None]
        estimated = [entry for entry in self.entries if entry[3] is not None]
        self.entries = certain
        for text, rank, _, own in estimated:
            if error >= (own or least):
                self.entries.append((text, rank, error, None))
        if not self.entries and error >= least:
            self.entries.append((otherwise, error, error, None))


def found(
    text: str,
    error: float = 1e30,
    estimate: Optional[float] = None,
    measurable: Optional[float] = None,
) -> None:
    """Something to be said, about a relative error of that size; by default about a part that does not exist.

    Infinite, and so before all else, is the error of pairs that have not converged: everything else may follow from
    that.  estimate: what stands for {estimate} in the text.  measurable: the error from which it is said where one is
    measured, 0 for that of all; None, where no measurement overrules it.
    """
    block = getattr(_this_thread, "block", None)
    if block is not None:
        block.entries.append((text, error, estimate, measurable))
        block.doubtful = block.doubtful or measurable is not None
    elif estimate is not None:
        warn(text.replace("{estimate}", f"{estimate:.1e}"))
    else:
        warn(text)


def doubt() -> None:
    """What has been estimated does not say that nothing is wrong."""
    block = getattr(_this_thread, "block", None)
    if block is not None:
        block.doubtful = True


def left_out(hidden: Callable[[], Tensor]) -> None:
    """Note what finds what is known to be missing: (+, *, k, k)."""
    block = getattr(_this_thread, "block", None)
    if block is not None:
        block.hidden = hidden


def members(bad: Tensor, batch: int) -> str:
    """Nothing, or " (member 3 of the batch)": where bad is true; its last `batch` dimensions are those of the batch."""
    if batch == 0:
        return ""
    where = bad.reshape((-1,) + tuple(bad.shape[bad.dim() - batch :])).any(0).nonzero()
    named = [", ".join(map(str, index)) for index in where[:_MOST_NAMED].tolist()]
    if batch > 1:
        named = [f"({name})" for name in named]
    if len(where) > _MOST_NAMED:
        named.append(f"{len(where) - _MOST_NAMED} more")
    if len(named) == 1:
        return f" (member {named[0]} of the batch)"
    return f" (members {', '.join(named[:-1])} and {named[-1]} of the batch)"


def first(bad: Tensor, dims: int) -> Tuple[int, ...]:
    """Trailing `dims` indices of the first element that is true."""
    return tuple(bad.nonzero()[0, bad.dim() - dims :].tolist())
