"""What is public: every name is there, and nothing is forgotten."""

import importlib

import pytest

import pyps


@pytest.mark.parametrize("package", ["pyps", "pyps.engine", "pyps.forkjoin", "pyps.workflow"])
def test_all_names_exist_and_are_sorted(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__


def test_what_a_result_and_an_event_are_made_of_can_be_imported() -> None:
    """Whoever annotates what pyps returns needs no inner module."""
    for name in ("BranchResult", "Chat", "Synthesis", "Timing", "ToolCall", "Tokens", "MachineError", "read_slots"):
        assert name in pyps.__all__


def test_forkjoin_is_where_it_always_was() -> None:
    from pyps.forkjoin import ForkJoin

    assert ForkJoin is pyps.ForkJoin
