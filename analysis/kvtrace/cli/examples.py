"""The two examples that every `--help` ends with."""

from __future__ import annotations


def examples(first: str, second: str) -> str:
    """An epilog for click that shows two command lines as they are typed. The tests run each of them."""
    return f"\b\nExamples:\n  {first}\n  {second}"
