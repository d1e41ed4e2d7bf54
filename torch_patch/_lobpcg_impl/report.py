"""What is said about a derivative: one warning, of the worst that was found, on the line that asked for it."""

import math
import os
import sys
import threading
import warnings
from typing import Any, Optional, Tuple, Type

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
    """Of what is `found` inside the block only the worst is said, at its end; nothing, where the block raises."""

    text: Optional[str] = None
    error = -math.inf

    def __enter__(self) -> "OneWarning":
        self.outer = getattr(_this_thread, "block", None)
        _this_thread.block = self
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        _this_thread.block = self.outer
        if self.text is not None and kind is None:
            found(self.text, self.error)


def found(text: str, error: float = 1e30) -> None:
    """Something to be said, about a relative error of that size; by default about a part that does not exist.

    Infinite, and so before all else, is the error of pairs that have not converged: everything else may follow from
    that.
    """
    block = getattr(_this_thread, "block", None)
    if block is None:
        warn(text)
    elif not error <= block.error:
        block.text, block.error = text, error


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
