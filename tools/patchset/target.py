"""Which PyTorch a TARGET means: an installed wheel or a checkout, found without importing it."""

import importlib.util
import json
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from . import disk
from .errors import PatchError


_VERSION = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_GIVE_TARGET = "name a PyTorch checkout, a virtual environment or a site-packages folder that holds torch"


class Target(NamedTuple):
    """A PyTorch: `root` is the folder that holds torch/; `record` is the path of RECORD below it (wheels only)."""

    root: Path
    version: str
    record: str | None

    @property
    def is_checkout(self) -> bool:
        return self.record is None

    @property
    def restore(self) -> str:
        """What gives upstream's files back."""
        if self.record:
            return "reinstall torch (pip install --force-reinstall --no-deps torch)"
        if (self.root / ".git").exists():
            return "let git restore the files (git checkout -- FILE; git clean FILE for new ones)"
        return "unpack the sources anew"

    def __str__(self) -> str:
        return f"{'checkout' if self.is_checkout else 'torch'} {self.version} in {self.root}"


def find_target(given: str | None) -> Target:
    """The PyTorch that `given` means; without it, the one that this interpreter would import."""
    if given is None:
        return _from_folder(_importable())
    folder = Path(given)
    if not folder.is_dir():
        raise PatchError(f"{given} is not a folder", "a TARGET", _GIVE_TARGET)
    folder = folder.resolve()
    if not (folder / "torch").exists():
        environment = _site_packages(folder)
        if environment:
            return _from_environment(folder, environment)
    return _from_folder(folder)


def version_numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for 2.13.0+cpu or 2.13.0a0."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _importable() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise PatchError(
            f"{sys.executable} finds no torch", "one", "run this with that environment's python, or " + _GIVE_TARGET
        )
    if spec.origin is None:
        folder = next(iter(spec.submodule_search_locations or ["?"]))
        raise PatchError(
            f"{folder} has no __init__.py", "a complete torch", "delete what an uninstall left and reinstall"
        )
    # Not the file itself: it may be a link into a package manager's cache.
    return Path(spec.origin).parent.parent.resolve()


def _site_packages(folder: Path) -> list[Path]:
    patterns = ("lib/python*/site-packages", "lib64/python*/site-packages", "Lib/site-packages")
    return sorted({place.resolve() for pattern in patterns for place in folder.glob(pattern)})


def _from_environment(folder: Path, places: list[Path]) -> Target:
    holding = [place for place in places if (place / "torch").exists() or _editable(place) is not None]
    if len(holding) != 1:
        found = f"{len(holding)} of the site-packages folders of {folder} hold torch"
        raise PatchError(found, "exactly one", "install torch there, or " + _GIVE_TARGET)
    return _from_folder(holding[0])


def _from_folder(folder: Path) -> Target:
    if (folder / "torch").is_symlink():
        real = (folder / "torch").resolve().parent
        raise PatchError(f"{folder / 'torch'} is a symbolic link", "a folder of its own", f"give {real} as TARGET")
    if (folder / "torch" / "__init__.py").exists():
        if (folder / "setup.py").exists() and (folder / "version.txt").exists():
            return Target(folder, (folder / "version.txt").read_text("utf-8").strip(), None)
        return _installed(folder)
    checkout = _editable(folder)
    if checkout is not None:
        return _from_folder(checkout)
    if (folder / "torch").exists():
        found = f"{folder / 'torch'} has no __init__.py"
        raise PatchError(found, "a complete torch", "delete what an uninstall left and reinstall torch")
    if folder.name == "torch" and (folder / "__init__.py").exists():
        raise PatchError(f"{folder} is the package itself", "the folder that holds it", f"give {folder.parent}")
    raise PatchError(f"{folder} holds no torch", "one", _GIVE_TARGET)


def _installed(folder: Path) -> Target:
    infos = _distributions(folder)
    if len(infos) != 1:
        names = ", ".join(info.name for info in infos) or "no torch-*.dist-info"
        remedy = "reinstall torch with pip or uv; a checkout needs its setup.py and version.txt"
        raise PatchError(f"{folder} has {names} beside torch/", "exactly one", remedy)
    info = infos[0]
    if not (info / "RECORD").is_file():
        raise PatchError(f"{info} has no RECORD", "the list of installed files", "install torch with pip or uv")
    imported = _VERSION.search((disk.read(folder / "torch" / "version.py") or b"").decode("utf-8", "replace"))
    installed = _field(info, "Version")
    if imported is None or version_numbers(imported.group(1)) != version_numbers(installed):
        found = f"torch/version.py says {imported.group(1) if imported else 'nothing'}, {info.name} says {installed}"
        raise PatchError(found, "one version", "reinstall torch")
    return Target(folder, imported.group(1), f"{info.name}/RECORD")


def _distributions(folder: Path) -> list[Path]:
    return [info for info in sorted(folder.glob("torch-*.dist-info")) if _field(info, "Name").lower() == "torch"]


def _field(info: Path, name: str) -> str:
    header = (disk.read(info / "METADATA") or b"").decode("utf-8", "replace").split("\n\n")[0]
    match = re.search(rf"^{name}: *(\S+)", header, re.MULTILINE)
    return match.group(1) if match else ""


def _editable(folder: Path) -> Path | None:
    """The checkout that an editable install in `folder` points at."""
    for info in _distributions(folder):
        source = _source(info)
        if source is not None:
            return Path(urllib.request.url2pathname(urllib.parse.urlparse(source).path)).resolve()
    link = disk.read(folder / "torch.egg-link")
    return Path(link.decode("utf-8").split("\n")[0].strip()).resolve() if link else None


def _source(info: Path) -> str | None:
    """The address of what was installed to be edited where it is."""
    try:
        source = json.loads(disk.read(info / "direct_url.json") or b"{}")
        return str(source["url"]) if source.get("dir_info", {}).get("editable") else None
    except (ValueError, AttributeError, KeyError) as error:
        found = f"{info / 'direct_url.json'} cannot be read ({error})"
        raise PatchError(found, "where torch was installed from", "reinstall torch") from None
