"""A pytest plugin that lets the tests of an older PyTorch be imported on a newer one: helpers are where they were.

pytest -p older_tests, with the folder of this file on the path. A name is put where the older tests import it from only
if it is missing there, so that nothing changes on the PyTorch that the tests belong to.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def _skip_ops(case: str, test: str, to_skip: Sequence[object]) -> object:
    """skipOps as it was, which named the test that it decorates; it finds that out itself since."""
    newer: Any = importlib.import_module(f"{_INTERNAL}.common_device_type")
    return newer.skipOps(to_skip)


_INTERNAL = "torch.testing._internal"
# where the tests look for a name -> where a newer PyTorch has the same, or what takes its place
MOVED: dict[tuple[str, str], tuple[str, str] | bool | Callable[..., object]] = {
    (f"{_INTERNAL}.common_mkldnn", "bf32_on_and_off"): (f"{_INTERNAL}.common_mkldnn", "reduced_f32_on_and_off"),
    (f"{_INTERNAL}.common_methods_invocations", "skip"): (f"{_INTERNAL}.common_device_type", "skip"),
    (f"{_INTERNAL}.common_methods_invocations", "skipOps"): _skip_ops,
    (f"{_INTERNAL}.common_methods_invocations", "xfail"): (f"{_INTERNAL}.common_device_type", "xfail"),
    (f"{_INTERNAL}.common_utils", "dtype_abbrs"): ("torch.utils._dtype_abbrs", "dtype_abbrs"),
    ("torch.jit.frontend", "_IS_ASTUNPARSE_INSTALLED"): True,  # ast.unparse is used since
}


def bridge() -> None:
    """Put every name of MOVED where it is missing; one that a PyTorch has nowhere stays missing, as the tests say."""
    for (place, name), source in MOVED.items():
        with contextlib.suppress(ImportError, AttributeError):
            _bring(importlib.import_module(place), name, source)


def _bring(module: Any, name: str, source: Any) -> None:
    if hasattr(module, name):
        return
    if isinstance(source, tuple):
        source = getattr(importlib.import_module(source[0]), source[1])
    setattr(module, name, source)


def keep_known(common: Any) -> None:
    """Let functorch's tests name operators that the database has no more: what is said of them is left out."""
    databases = ("op_db", "additional_op_db", "autograd_function_db", "custom_op_db")
    operators = [operator for name in databases for operator in getattr(common, name, [])]
    known = {(operator.name, operator.variant_test_name) for operator in operators}
    for function in ("skipOps", "opsToleranceOverride"):
        setattr(common, function, _filtered(getattr(common, function), known))


def _filtered(function: Callable[..., object], known: set[tuple[str, str]]) -> Callable[..., object]:
    def with_known(case: str, test: str, entries: Sequence[Any]) -> object:
        return function(case, test, [entry for entry in entries if _named(entry) in known])

    return with_known


def _named(entry: Any) -> tuple[str, str]:
    """The operator of an entry and its variant; a tuple begins with them."""
    return (entry.op_name, entry.variant_name) if hasattr(entry, "op_name") else (entry[0], entry[1])


def pytest_configure() -> None:
    bridge()
    if Path("functorch_additional_op_db.py").exists():  # in functorch's folder, whose modules its tests import by name
        sys.path.insert(0, os.getcwd())
        keep_known(importlib.import_module("common_utils"))
