"""Azure's LLM inference traces (AzurePublicDataset, 2023 and 2024): a CSV of
``TIMESTAMP,ContextTokens,GeneratedTokens``.

They tell when requests came and how long they were, and nothing of which had the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace_traces.importers import importer, lengths
from kvtrace_traces.importers.batches import Piece
from kvtrace_traces.importers.source import Source


@importer(
    "azure", "Azure LLM inference CSV: times and lengths, reuse unknown",
    granule=lambda source: source.options.block_size or lengths.ANY_BLOCK_TOKENS, reuse=False,
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line."""
    return lengths.read(source, (("TIMESTAMP",), ("ContextTokens",), ("GeneratedTokens",)))
