"""A pytest plugin that writes down each outcome at once, so that a crash or a time limit loses one test alone."""

import json
import os
from typing import Any


def _note(**fields: str) -> None:
    with open(os.environ["UPSTREAM_RECORD"], "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def _name(nodeid: str) -> str:
    """FILE::Class::test, without the folders that depend on where pytest was started."""
    return nodeid.split("::", 1)[-1]


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _note(test=_name(nodeid), outcome="started")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _note(test=_name(report.nodeid), outcome=report.outcome)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _note(test="(collection)", outcome="failed")


def pytest_sessionfinish(session: Any, exitstatus: Any) -> None:
    _note(test="", outcome="finished")
