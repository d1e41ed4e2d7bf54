"""RECORD of an installed wheel: which bytes upstream installed, and the lines of what the patch adds."""

import base64
import csv
import hashlib
import io

from .errors import PatchError
from .text import split_lines


class Record:
    """Lines kept as they are; a line is rewritten only where its file changes, new files go to the end."""

    def __init__(self, data: bytes) -> None:
        try:
            self.lines = split_lines(data.decode("utf-8"))
            self.rows = [next(csv.reader([line.rstrip("\r\n")]), []) for line in self.lines]
        except (UnicodeDecodeError, csv.Error) as error:
            raise PatchError(f"RECORD: {error}", "lines of path, hash and size", "reinstall torch with pip") from None
        self.newline = "\r\n" if data.endswith(b"\r\n") else "\n"
        self.index = {row[0]: i for i, row in enumerate(self.rows) if row}

    def __contains__(self, path: str) -> bool:
        return path in self.index

    def matches(self, path: str, data: bytes) -> bool | None:
        """Whether `data` is what RECORD says of `path`; None where RECORD says nothing."""
        row = self.rows[self.index[path]] if path in self.index else []
        if len(row) < 2 or "=" not in row[1]:
            return None
        name, value = row[1].split("=", 1)
        if name not in hashlib.algorithms_guaranteed:
            raise PatchError(f"RECORD: {path} has a {name} hash", "sha256", "reinstall torch with pip")
        return _encoded(hashlib.new(name, data).digest()) == value

    def updated(self, contents: dict[str, bytes]) -> bytes:
        """RECORD once the files of `contents` hold these bytes."""
        lines = list(self.lines)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += self.newline
        for path, data in contents.items():
            line = _line(path, data) + self.newline
            if path in self.index:
                lines[self.index[path]] = line
            else:
                lines.append(line)
        return "".join(lines).encode("utf-8")


def _encoded(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")


def _line(path: str, data: bytes) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([path, "sha256=" + _encoded(hashlib.sha256(data).digest()), len(data)])
    return out.getvalue()
