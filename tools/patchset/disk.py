"""What a path holds, and writes that a crash cannot tear.

No file is ever written in place: package managers link installed files to a shared cache, and a write through such a
link would corrupt every other environment. A new file is completed and synchronised elsewhere, then renamed over the
old name.
"""

import glob
import os
import stat
from pathlib import Path
from typing import NamedTuple

from .errors import PatchError
from .text import sha256


class FileState(NamedTuple):
    """Content (by its sha256), permission bits, and the target where the path is a symbolic link."""

    sha256: str
    mode: int
    link: str | None = None


def read(path: Path) -> bytes | None:
    """The bytes of the regular file that `path` leads to; None where there is nothing."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # a pipe or a device would never come to its end
            raise PatchError(f"{path} is no regular file", "one", "move it away and run this again")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def state_of(path: Path) -> FileState | None:
    """What is at `path`; a dangling link counts as a file of no content."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(status.st_mode):
        return FileState(sha256(read(path) or b""), 0, os.readlink(path))
    return FileState(sha256(read(path) or b""), stat.S_IMODE(status.st_mode))


def write(path: Path, data: bytes, mode: int, owner: os.stat_result | None = None) -> None:
    """Create `path`, which must be no name that anything else reads, and bring it to the disk."""
    if os.path.lexists(path):
        os.unlink(path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        if hasattr(os, "fchmod"):
            if owner is not None and os.geteuid() == 0:
                os.fchown(handle, owner.st_uid, owner.st_gid)
            os.fchmod(handle, mode)
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, destination: Path) -> None:
    os.replace(source, destination)
    sync_folder(destination.parent)


def remove(path: Path) -> None:
    os.unlink(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folders; its renames are journalled by the file system
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder that belongs to the owner of the one that it is in."""
    try:
        path.mkdir()
    except FileExistsError:
        return
    owner = os.stat(path.parent)
    if hasattr(os, "chown") and os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)
    sync_folder(path.parent)


def remove_bytecode(path: Path) -> None:
    """Delete the compiled forms of `path`: one made in the same second from as many bytes would pass for current."""
    folder = path.parent / "__pycache__"
    if path.suffix == ".py" and not folder.is_symlink():
        for compiled in folder.glob(glob.escape(path.stem) + ".*.pyc"):
            compiled.unlink(missing_ok=True)
