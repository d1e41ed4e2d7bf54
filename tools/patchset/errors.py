"""The one exception a user of the patch tool sees."""

import errno
from collections.abc import Sequence


class PatchError(Exception):
    """What was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}; expected {expected}; {remedy}")


class _Several(PatchError):
    def __init__(self, errors: Sequence[PatchError]) -> None:
        Exception.__init__(self, "\n".join(str(error) for error in errors))


def raise_all(errors: Sequence[PatchError]) -> None:
    """Raise what a check found, all of it at once; return if it found nothing."""
    if errors:
        raise errors[0] if len(errors) == 1 else _Several(errors)


def explained(error: OSError) -> PatchError:
    """What the system refused, with what to do; the files are whole either way."""
    place = f": {error.filename}" if error.filename else ""
    undone = "it is rolled back, at once or by the next apply or revert"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return PatchError(f"the disk is full{place}", "room for a copy of the patched files", f"make some; {undone}")
    found = f"{error.strerror or error}{place}"
    return PatchError(found, "a folder that can be read and written", f"correct that and run this again; {undone}")
