"""The one exception a user of the patch tool sees."""

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
