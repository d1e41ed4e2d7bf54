"""One patch command at a time per PyTorch; the lock dies with its process."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import PatchError
from .text import sha256


if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`. Raises PatchError at once if another process holds it."""
    handle = _open(folder)
    try:
        try:
            if sys.platform == "win32":
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PatchError(
                f"{folder}: another patch command is at work here", "no other", "wait for it to end and run this again"
            ) from None
        yield
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    if sys.platform == "win32":  # where folders cannot be opened
        name = "torch-patch-" + sha256(str(folder).encode("utf-8"))[:16]
        return os.open(os.path.join(tempfile.gettempdir(), name), os.O_RDWR | os.O_CREAT)
    return os.open(folder, os.O_RDONLY)  # the folder itself: nothing to create, nothing left behind
