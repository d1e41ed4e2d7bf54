"""Find and load the unpatched torch/_lobpcg.py beside whatever PyTorch the interpreter imports."""

from __future__ import annotations

import types
import zipfile
from pathlib import Path

from patchset.plan import originals
from patchset.record import Record
from patchset.store import Store
from patchset.target import find_target


MEMBER = "torch/_lobpcg.py"


def pristine_source(option: str = "") -> tuple[str, str]:
    """Source text and where it is from: a .py file, a wheel, or (option empty) the installed distribution.

    In an installed PyTorch that tools/patch.py patched, the backup it keeps; else the installed file, provided that its
    hash is the one in RECORD. FileNotFoundError if neither is there.
    """
    if option:
        path = Path(option)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(MEMBER).decode(), f"{path.name}/{MEMBER}"
        return path.read_text(encoding="utf-8"), str(path)
    target = find_target(None)
    store = Store(target, list)
    before = originals(store, store.applied())
    source, record = (before(path)[1] if path else None for path in (MEMBER, target.record))
    if source is None or record is None or not Record(record).matches(MEMBER, source):
        raise FileNotFoundError(f"no unpatched {MEMBER} beside this PyTorch; name a wheel or the file with --upstream")
    return source.decode(), f"{MEMBER} of torch {target.version}, unpatched"


def load(option: str = "") -> types.ModuleType:
    """The module, under a name of its own; it shares torch's other modules."""
    source, origin = pristine_source(option)
    module = types.ModuleType("torch_lobpcg_upstream")
    module.__file__ = origin
    exec(compile(source, origin, "exec"), module.__dict__)
    return module
