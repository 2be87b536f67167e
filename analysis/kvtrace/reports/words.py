"""Figures as sentences have them; tables carry more digits."""

from __future__ import annotations

from kvtrace.people import percent


def share(ratio: float | None) -> str:
    """A ratio with one decimal, or that it is less than that shows."""
    return "under 0.1%" if ratio is not None and 0 < ratio < 0.0005 else percent(ratio, 1)


def counted(count: float, what: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count:,.0f} {what}" + ("" if count == 1 else "s")
