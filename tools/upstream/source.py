"""The source tree of a PyTorch release, tests included, from Debian's source package."""

import re
import shutil
import subprocess
import tarfile
from pathlib import Path


SUITE = "trixie"  # whose package `pytorch` is release 2.6.0
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
WANTED = (
    *("aten/src/ATen/native/native_functions.yaml", "docs/source/", "setup.py", "test/", "torch/", "version.txt"),
    *(".flake8", ".lintrunner.toml", "pyproject.toml", "tools/linter/"),
)


class FetchError(Exception):
    """The tree cannot be had; the message says why, and that --tree names one."""


def fetched(folder: Path) -> Path:
    """The tree in `folder`, downloaded there once: 27 MB, in a list of sources and a cache of its own."""
    ready = folder / "ready"
    if ready.exists() and (folder / ready.read_text(encoding="utf-8") / ".lintrunner.toml").exists():
        return folder / ready.read_text(encoding="utf-8")
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise FetchError("no apt-get with Debian's keys here; name the source tree of a release with --tree")
    print("downloading Debian's source package of PyTorch, 27 MB, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "tree"):
        (folder / name).mkdir(parents=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb-src [signed-by={KEYRING}] {_mirror()} {SUITE} main\n", encoding="utf-8")
    places = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-q", *(f"-o{name}={place}" for name, place in places.items())]
    _call([*apt, "update"], folder)
    _call([*apt, "source", "--download-only", "pytorch"], folder)
    archives = sorted(folder.glob("pytorch_*.orig.tar.*"))
    if len(archives) != 1:
        raise FetchError(f"{len(archives)} archives of the source in {folder}; expected one; name a tree with --tree")
    name = _unpack(archives[0], folder / "tree")
    ready.write_text(name, encoding="utf-8")
    return folder / name


def _mirror() -> str:
    """The mirror of Debian that this machine uses."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)"], capture_output=True, text=True, check=False
    )
    found = re.search(r"^Debian (\S+)|(\S+/debian/?)$", listed.stdout, re.MULTILINE)
    if found is None:
        raise FetchError("apt-get knows no mirror of Debian; run apt-get update, or name a source tree with --tree")
    return found.group(1) or found.group(2)


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{command[0]} {command[-1]} failed: {done.stderr.strip()}; name a source tree with --tree")


def _unpack(archive: Path, folder: Path) -> str:
    """Unpack what is wanted; the path of the tree from the folder above."""
    with tarfile.open(archive) as packed:
        members = []
        for member in packed:
            inside = member.name.partition("/")[2]
            if inside.startswith(WANTED) and (member.isfile() or member.isdir()):
                members.append(member)
        packed.extraction_filter = getattr(
            tarfile, "data_filter", None
        )  # newer Pythons refuse paths that leave the folder
        packed.extractall(folder, members=members)
        return f"{folder.name}/{members[0].name.split('/')[0]}"
