"""What an importer reads: files, unpacked where need be, as chunks of whole lines or as bytes, and the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.errors import KvtraceError

CHUNK_BYTES = 8 << 20
LOOK_BYTES = 1 << 16  # where a record or two tell enough
_PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}

Progress = Callable[[int, int], None]


class Lines(NamedTuple):
    """Whole lines of ``file``, of which the first has number ``first``; ``data``: uint8."""

    file: Path
    first: int
    data: NDArray[np.uint8]


@dataclass
class Options:
    """What the user may say about a source. Which of it a format takes stands in its registration.

    ``block_size`` and ``granule``: tokens; ``tokenizer``: ``tiktoken:NAME`` or a ``tokenizer.json``; ``columns``: what
    a CSV's columns are, by our name for them.
    """

    block_size: int | None = None
    granule: int | None = None
    tokenizer: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Source:
    """The files to import and how to read them. ``notes``: what a reader wants the user to know at the end."""

    path: Path
    files: list[Path]
    options: Options
    progress: Progress | None = None
    granule: int = 1
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self._total = sum(file.stat().st_size for file in self.files)
        except OSError as error:
            raise KvtraceError(f"{self.path}: {error.strerror}") from None
        self._done = self._told = 0

    def rewind(self) -> None:
        """Begin anew: what was read so far was only a look."""
        self._done = 0

    def finish(self) -> None:
        """Tell that all is read, if anything was told."""
        if self.progress is not None and self._told:
            self.progress(self._total, self._total)

    def _tell(self, done: int) -> None:
        if self.progress is not None and self._told + CHUNK_BYTES <= done < self._total:
            self._told = done
            self.progress(done, self._total)

    def where(self, file: Path, line: int) -> str:
        """A place in the source, for messages."""
        return f"{file}, line {line}" if file != self.path else f"{self.path}, line {line}"

    def pieces(self, file: Path, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes of a file, unpacked, at most ``size`` at a time. Raises :class:`KvtraceError`."""
        try:
            with file.open("rb") as raw:
                start = raw.read(4)
                raw.seek(0)
                packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
                stream: Any = raw
                if packed is not None:
                    import pyarrow as pa

                    stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), packed)
                while piece := stream.read(size):
                    self._tell(self._done + raw.tell())
                    yield piece
                self._done += raw.tell()
        except OSError as error:
            # Arrow's own errors carry no number: the packed stream ends early, or is damaged.
            raise KvtraceError(f"{file}: {error.strerror or _first_line(error)}") from None

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[Lines]:
        """The lines of all files, about ``size`` bytes at a time; a line that is longer comes whole."""
        for file in self.files:
            first, kept, before = 1, b"", b""
            for piece in self.pieces(file, size):
                cut = piece.rfind(b"\n") + 1
                if not cut:
                    kept += piece
                    continue
                data = kept + piece[:cut] if kept else piece[:cut]
                kept = piece[cut:]
                first += before.count(b"\n")  # of the chunk before: of a file of one chunk nobody asks
                before = data
                yield Lines(file, first, np.frombuffer(data, np.uint8))
            if kept:
                first += before.count(b"\n")
                yield Lines(file, first, np.frombuffer(kept, np.uint8))

    def lines(self, size: int = CHUNK_BYTES) -> Iterator[tuple[Path, int, bytes]]:
        """File, number and bytes of every line that is not blank, numbered from 1; read ``size`` bytes at a time."""
        for chunk in self.chunks(size):
            for number, line in enumerate(chunk.data.tobytes().split(b"\n"), chunk.first):
                if line.strip():
                    yield chunk.file, number, line


def _first_line(error: OSError) -> str:
    text = str(error).splitlines()[0] if str(error) else "it cannot be read"
    return f"the packed data is cut short or damaged ({text})"
