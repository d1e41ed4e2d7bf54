"""A pytest plugin that lets the tests of an older PyTorch be imported on a newer one: helpers are where they were.

pytest -p older_tests, with the folder of this file on the path. A name is put where the older tests import it from only
if it is missing there, so that nothing changes on the PyTorch that the tests belong to.
"""

import importlib
from typing import Any


_INTERNAL = "torch.testing._internal"
# where the tests look for a name -> where a newer PyTorch has the same, or what takes its place
MOVED: dict[tuple[str, str], tuple[str, str] | bool] = {
    (f"{_INTERNAL}.common_mkldnn", "bf32_on_and_off"): (f"{_INTERNAL}.common_mkldnn", "reduced_f32_on_and_off"),
    (f"{_INTERNAL}.common_methods_invocations", "skip"): (f"{_INTERNAL}.common_device_type", "skip"),
    (f"{_INTERNAL}.common_methods_invocations", "skipOps"): (f"{_INTERNAL}.common_device_type", "skipOps"),
    (f"{_INTERNAL}.common_methods_invocations", "xfail"): (f"{_INTERNAL}.common_device_type", "xfail"),
    (f"{_INTERNAL}.common_utils", "dtype_abbrs"): ("torch.utils._dtype_abbrs", "dtype_abbrs"),
    ("torch.jit.frontend", "_IS_ASTUNPARSE_INSTALLED"): True,  # ast.unparse is used since
}


def bridge() -> None:
    """Put every name of MOVED where it is missing; one that a PyTorch has nowhere stays missing, as the tests say."""
    for (place, name), source in MOVED.items():
        try:
            module: Any = importlib.import_module(place)
            if not hasattr(module, name):
                found = source if isinstance(source, bool) else getattr(importlib.import_module(source[0]), source[1])
                setattr(module, name, found)
        except (ImportError, AttributeError):
            continue


def pytest_configure() -> None:
    bridge()
