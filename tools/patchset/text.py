"""Lines as `ast` counts them: split at newlines only (not at form feeds), line ends kept."""

import hashlib
from collections.abc import Iterable


def split_lines(text: str) -> list[str]:
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def newline_of(line: str) -> str:
    return "\r\n" if line.endswith("\r\n") else "\n"


def indented(text: str, column: str, newline: str) -> list[str]:
    """The lines of `text` moved to `column`, empty lines left empty, ended by `newline`."""
    lines = text.strip("\n").split("\n")
    return [(column + line if line.strip() else "") + newline for line in lines]


def leading_space(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def comma_list(names: Iterable[str]) -> str:
    return ", ".join(names)
