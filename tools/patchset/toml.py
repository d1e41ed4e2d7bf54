"""A strict reader for the part of TOML that the manifests use.

tomllib exists only from Python 3.11, and the tools run on 3.10. Whatever lies outside the subset is an error with its
line, never a guess: comments, bare keys, [tables], [[arrays of tables]] (one dot deep or more), strings of all four
kinds, decimal integers, booleans and arrays. A test compares the result with tomllib.
"""

import re
from typing import Any


_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"(\[\[?)[ \t]*([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)[ \t]*(\]\]?)")
_LINE_END = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?![\w.+-])")
_BOOLEAN = re.compile(r"(?:true|false)(?!\w)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


class TOMLError(ValueError):
    """The text is not TOML, or uses a construct outside the subset."""


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.root: dict[str, Any] = {}
        self.table = self.root
        self.arrays: set[int] = set()  # ids of the arrays of tables

    def fail(self, expected: str) -> TOMLError:
        line = self.text.count("\n", 0, self.at) + 1
        rest = self.text[self.at :].split("\n", 1)[0][:40]
        return TOMLError(f"line {line}: found {rest!r}; expected {expected}; see the subset in tools/patchset/toml.py")

    def take(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.fail(expected)
        self.at = match.end()
        return match

    def document(self) -> dict[str, Any]:
        self.take(_BLANK, "")
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                self.header()
            else:
                self.pair()
            self.take(_LINE_END, "the end of the line")
            self.take(_BLANK, "")
        return self.root

    def header(self) -> None:
        start = self.at
        opening, dotted, closing = self.take(_HEADER, "[table] or [[array of tables]]").groups()
        if len(opening) != len(closing):
            self.at = start
            raise self.fail("as many closing as opening brackets")
        *parents, last = dotted.split(".")
        table = self.root
        for name in parents:
            table = table.setdefault(name, {})
            if isinstance(table, list) and table and isinstance(table[-1], dict):
                table = table[-1]
            if not isinstance(table, dict):
                self.at = start
                raise self.fail(f"{name} to be a table")
        self.table = {}
        if len(opening) == 2:
            rows = table.setdefault(last, [])
            if not isinstance(rows, list) or (rows and (id(rows) not in self.arrays)):
                self.at = start
                raise self.fail(f"{dotted} to be an array of tables")
            self.arrays.add(id(rows))
            rows.append(self.table)
        elif last in table:
            self.at = start
            raise self.fail(f"{dotted} to be defined once")
        else:
            table[last] = self.table

    def pair(self) -> None:
        start = self.at
        key = self.take(_KEY, "a bare key").group()
        if key in self.table:
            self.at = start
            raise self.fail(f"{key} to be defined once")
        self.take(_SPACE, "")
        self.take(re.compile("="), "'='")
        self.take(_SPACE, "")
        self.table[key] = self.value()

    def value(self) -> Any:
        if self.text.startswith(("'''", '"""'), self.at):
            return self.long_string()
        first = self.text[self.at : self.at + 1]
        if first in ("'", '"'):
            return self.short_string(first)
        if first == "[":
            return self.array()
        if first in ("t", "f"):
            return self.take(_BOOLEAN, "true or false").group() == "true"
        return int(self.take(_INTEGER, "a string, an array, true, false or a decimal integer").group())

    def array(self) -> list[Any]:
        values = []
        self.at += 1
        self.take(_BLANK, "")
        while not self.text.startswith("]", self.at):
            values.append(self.value())
            self.take(_BLANK, "")
            if self.text.startswith("]", self.at):
                break
            self.take(re.compile(","), "',' or ']'")
            self.take(_BLANK, "")
        self.at += 1
        return values

    def short_string(self, quote: str) -> str:
        self.at += 1
        start = self.at
        while self.text[self.at : self.at + 1] not in (quote, "\n", ""):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        if self.text[self.at : self.at + 1] != quote:
            raise self.fail(f"the closing {quote} on the same line")
        return self.finished(start, quote)

    def long_string(self) -> str:
        quotes = self.text[self.at : self.at + 3]
        self.at += 3
        if self.text.startswith("\n", self.at):
            self.at += 1
        start = self.at
        while not self.text.startswith(quotes, self.at):
            if self.at >= len(self.text):
                self.at = start
                raise self.fail(f"a closing {quotes}")
            self.at += 2 if quotes == '"""' and self.text[self.at] == "\\" else 1
        if self.text.startswith(quotes[0], self.at + 3):
            raise self.fail(f"exactly {quotes}")
        return self.finished(start, quotes)

    def finished(self, start: int, quotes: str) -> str:
        raw = self.text[start : self.at]
        self.at += len(quotes)
        if _CONTROL.search(raw) or (len(quotes) == 1 and "\n" in raw):
            raise self.fail("no control character in the string before this")
        if quotes[0] == "'":
            return raw
        return re.sub(r"\\(.?)", self.escape, raw, flags=re.DOTALL)

    def escape(self, match: re.Match[str]) -> str:
        try:
            return _ESCAPES[match.group(1)]
        except KeyError:
            raise self.fail('only the escapes \\n \\t \\" \\\\ in the string before this') from None


def loads(text: str) -> dict[str, Any]:
    """The tables of `text` as dictionaries and lists. Raises TOMLError outside the subset."""
    text = text.replace("\r\n", "\n")
    reader = _Reader(text)
    control = _CONTROL.search(text)
    if control:
        reader.at = control.start()
        raise reader.fail("no control character")
    return reader.document()
