"""The one exception a user of the patch tool sees."""


class PatchError(Exception):
    """What was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{found}; expected {expected}; {remedy}")


class Problems(PatchError):
    """Several errors found by one check, reported together."""

    def __init__(self, errors: list) -> None:
        Exception.__init__(self, "\n".join(str(error) for error in errors))
