"""What the TARGET of the patch tool means, and what is no target."""

import shutil
import sys

import fake_pytorch as fake
import pytest
from fake_pytorch import posix
from patchset.errors import PatchError
from patchset.target import find_target


def test_targets(tmp_path, monkeypatch, wheel):
    environment = tmp_path / "venv"
    place = environment / "lib/python3.11/site-packages"
    place.parent.mkdir(parents=True)
    shutil.copytree(wheel, place)
    (environment / "lib64").symlink_to("lib")
    assert find_target(str(environment)).root == place
    assert find_target(str(wheel)) == (wheel, "2.13.0+cpu", "torch-2.13.0+cpu.dist-info/RECORD")
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    assert find_target(str(tree)) == (tree, "2.13.0a0", None)
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert find_target(None).root == wheel
    assert "torch" not in sys.modules


@posix
def test_a_linked_package_is_found_where_it_is_installed(tmp_path, monkeypatch, wheel):
    shutil.copytree(wheel, tmp_path / "cache")
    (wheel / "torch/__init__.py").unlink()
    (wheel / "torch/__init__.py").symlink_to(tmp_path / "cache/torch/__init__.py")
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert find_target(None).root == wheel


@pytest.mark.parametrize("style", ["direct_url.json", "egg-link"])
def test_an_editable_build_is_its_checkout(tmp_path, style):
    tree = fake.make_checkout(tmp_path / "pytorch", git=False)
    place = tmp_path / "venv/lib/python3.11/site-packages"
    if style == "egg-link":
        fake.write_files(place, {"torch.egg-link": f"{tree}\n.".encode()})
    else:
        source = f'{{"url": "{tree.as_uri()}", "dir_info": {{"editable": true}}}}'.encode()
        metadata = b"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0a0\n\n"
        info = place / "torch-2.13.0a0.dist-info"
        fake.write_files(info, {"METADATA": metadata, "direct_url.json": source, "RECORD": b""})
    assert find_target(str(tmp_path / "venv")).root == tree


def without_info(wheel):
    shutil.rmtree(wheel / "torch-2.13.0+cpu.dist-info")


def without_record(wheel):
    (wheel / "torch-2.13.0+cpu.dist-info/RECORD").unlink()


def twice_installed(wheel):
    fake.write_files(wheel / "torch-2.12.0.dist-info", {"METADATA": b"Name: torch\nVersion: 2.12.0\n\n"})


def half_uninstalled(wheel):
    (wheel / "torch/__init__.py").unlink()


def uninstalled(wheel):
    shutil.rmtree(wheel / "torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_info, "no torch-.*dist-info"),
        (without_record, "has no RECORD"),
        (twice_installed, "torch-2.12.0.dist-info, torch-2.13.0"),
        (half_uninstalled, "has no __init__.py"),
        (uninstalled, "holds no torch"),
    ],
)
def test_no_target(wheel, change, message):
    change(wheel)
    with pytest.raises(PatchError, match=message):
        find_target(str(wheel))


def test_no_target_at_all(tmp_path, wheel):
    for folder, message in (("nowhere", "is not a folder"), (".", "holds no torch"), ("site-packages/torch", "give ")):
        with pytest.raises(PatchError, match=message):
            find_target(str(tmp_path / folder))
    (tmp_path / "venv/lib/python3.11/site-packages").mkdir(parents=True)
    with pytest.raises(PatchError, match="0 of the site-packages folders"):
        find_target(str(tmp_path / "venv"))
