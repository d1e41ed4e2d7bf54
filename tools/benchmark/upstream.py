"""Find and load the unpatched torch/_lobpcg.py beside whatever PyTorch the interpreter imports."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import types
import zipfile
from pathlib import Path


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
    files = importlib.metadata.distribution("torch").files or ()
    installed = next((f for f in files if f.as_posix() == MEMBER), None)
    if installed is not None:
        path = Path(installed.locate())
        backup = _backup(path.parent.parent)
        if backup is not None:
            return backup.read_text(encoding="utf-8"), str(backup)
        if installed.hash is not None and _digest(path.read_bytes()) == installed.hash.value:
            return path.read_text(encoding="utf-8"), str(path)
    raise FileNotFoundError(f"no unpatched {MEMBER} beside this PyTorch; name a wheel or the file with --upstream")


def load(option: str = "") -> types.ModuleType:
    """The module, under a name of its own; it shares torch's other modules."""
    source, origin = pristine_source(option)
    module = types.ModuleType("torch_lobpcg_upstream")
    module.__file__ = origin
    exec(compile(source, origin, "exec"), module.__dict__)
    return module


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _backup(site: Path) -> Path | None:
    """The original of the patched file: tools/patch.py lists it in its state, under its hash."""
    folder = site / ".torch_lobpcg_patch"
    try:
        steps = json.loads((folder / "state.json").read_text(encoding="utf-8"))["steps"]
    except FileNotFoundError:
        return None
    before = next((before for path, before, _ in steps if path == MEMBER), None)
    return folder / "objects" / before[0] if before else None
