"""One frame of `kvtrace top`: lines of at most so many columns, the most important ones first."""

from __future__ import annotations

from typing import NamedTuple

from kvtrace import people
from kvtrace.top.engine import Engine
from kvtrace.top.kept import Totals
from kvtrace.top.watch import Watched

BOLD, DIM, GREEN, CYAN, RED = "1", "2", "32", "36", "31"
_MOST_PREFIXES = 20
_LEAST_WIDTH = 40
Line = list[tuple[str, str]]  # pieces of text, each with a style


class Look(NamedTuple):
    """How to draw: `colour` for terminals that may show it; `plain` for those that show ASCII alone."""

    colour: bool = False
    plain: bool = False


def frame(
    title: str, watched: Watched, width: int, height: int, look: Look, others: str = "", keys: str = ""
) -> list[str]:
    """The lines of a frame for one engine, at most `height` of at most `width` columns. `others`: which engine it is of
    how many; `keys`: what one can press."""
    engine = watched.engine
    lines = [_head(title, watched.status, width), _about(engine, others)]
    if problems := _problems(watched):
        lines.append([(problems, RED)])
    if engine.joined is not None:
        lines.append(
            [(f"read from step {engine.joined:,} on: what was cached before counts as free until it is used", DIM)]
        )
    lines += [[], *_blocks(engine, width), _requests(engine), []]
    lines += [*_figures(engine), [], *_curve(engine)]
    foot = [[(keys, DIM)]] if keys else []
    room = height - len(lines) - len(foot) - 1
    if room > 0:
        lines += [[], *_prefixes(engine, room)]
    lines = lines[: max(1, height - len(foot))] + foot if height > len(foot) else lines[:height]
    return [_paint(line, max(width, 1), look) for line in lines]


def waiting(title: str, width: int, look: Look) -> list[str]:
    """The frame while no engine has written anything."""
    return [
        _paint(line, width, look)
        for line in (_head(title, "no log yet", width), [], [("waiting for an engine to start", "")])
    ]


def _paint(line: Line, width: int, look: Look) -> str:
    """The line as text, cut to `width` columns."""
    out = []
    for text, style in line:
        if look.plain:
            text = text.translate(_ASCII)
            text = text.encode("ascii", "replace").decode()
        text = "".join(c if c.isprintable() else "?" for c in text)[:width]
        width -= len(text)
        out.append(f"\x1b[{style}m{text}\x1b[0m" if look.colour and style and text.strip() else text)
    return "".join(out).rstrip(" ")


_ASCII = {ord("█"): "#", ord("▒"): "=", ord("░"): ".", ord("≥"): ">", ord("…"): "~", ord("·"): "-", ord("½"): "1/2"}


def _head(title: str, status: str, width: int) -> Line:
    name = "kvtrace top"
    room = width - len(name) - len(status) - 4
    if len(title) > room:
        title = "…" + title[len(title) - max(room, 1) + 1 :]
    gap = " " * max(2, width - len(name) - 2 - len(title) - len(status))
    return [(name, BOLD), ("  " + title + gap, ""), (status, GREEN if status == "recording" else BOLD)]


def _about(engine: Engine, others: str) -> Line:
    header = engine.header
    words = [str(header[key]) for key in ("model", "engine", "engine_version") if header.get(key)]
    tokens = engine.capacity * engine.block_size
    size = f"{engine.capacity:,} blocks of {engine.block_size} tokens = {tokens:,} tokens"
    return [(f"{others}{' '.join(words)}: {size}", DIM)]


def _problems(watched: Watched) -> str:
    losses = watched.engine.losses
    many = f"{len(losses)} losses, the last: " if len(losses) > 1 else ""
    return f"incomplete: {many}{losses[-1]}" if losses else ""


# ---------------------------------------------------------------- now


def _blocks(engine: Engine, width: int) -> list[Line]:
    if not engine.capacity or not engine.totals.steps:
        return [
            [("blocks    nothing has run yet" if engine.capacity else "blocks    how many there are is not known", "")]
        ]
    used, idle, free = engine.occupancy()
    room = max(_LEAST_WIDTH, width) - 11
    cells = _shares([used, idle, free], room)
    bar: Line = [("blocks    ", "")]
    bar += [(char * n, style) for char, n, style in zip("█▒░", cells, (GREEN, CYAN, DIM), strict=True)]
    told = [("█ used", used), ("▒ cached, idle", idle), ("░ free", free)]
    text = "   ".join(f"{name} {n:,} ({people.percent(n / engine.capacity, 0)})" for name, n in told)
    return [bar, [(" " * 10 + text, "")]]


def _shares(parts: list[int], cells: int) -> list[int]:
    """Whole cells for each part, `cells` in all; a part that is not 0 has one at least, where there is room."""
    total = sum(parts) or 1
    ends = [round(sum(parts[: i + 1]) * cells / total) for i in range(len(parts))]
    found = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    for i, part in enumerate(parts):
        if part and not found[i] and max(found) > 1:
            found[found.index(max(found))] -= 1
            found[i] = 1
    return found


def _requests(engine: Engine) -> Line:
    running, waiting = engine.queues()
    counts = ((running, "running"), (waiting, "waiting"), (engine.finished, "finished"))
    line: Line = [("requests  ", "")]
    for n, name in counts:
        line += [(f"{n:,}", BOLD), (f" {name}   ", "")]
    return line


def _figures(engine: Engine) -> list[Line]:
    """Two columns: the last seconds, and everything since the log began."""
    whole, recent = engine.totals, engine.recent()
    since_s = (whole.time_ns - engine.first_ns) / 1e9 if engine.first_ns is not None else 0.0
    columns = [_column(recent, recent.time_ns / 1e9), _column(whole, since_s)]
    heads = [f"last {_short(recent.time_ns / 1e9)}", f"all {_short(since_s)}"]
    lines: list[Line] = [[(f"{'':22}{heads[0]:>16}{heads[1]:>16}", DIM)]]
    for i, name in enumerate(
        ("hit ratio (tokens)", "prefill, tokens/s", "decode, tokens/s", "steps/s", "preemptions", "evictions")
    ):
        style = RED if name == "preemptions" and recent.preemptions else BOLD if not i else ""
        lines.append(
            [(f"{name:22}", ""), (f"{columns[0][i]:>16}", style), (f"{columns[1][i]:>16}", BOLD if not i else "")]
        )
    return lines


def _column(sums: Totals, seconds: float) -> list[str]:
    rates = [sums.prefill, sums.decode, sums.steps]
    told = [f"{n / seconds:,.0f}" if seconds > 0 else "-" for n in rates]
    ratio = people.percent(sums.hit / sums.asked, 1) if sums.asked else "-"
    return [ratio, *told, f"{sums.preemptions:,}", f"{sums.evictions:,}"]


def _short(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


# ---------------------------------------------------------------- elsewhere


def _curve(engine: Engine) -> list[Line]:
    curve = engine.curve
    if not curve.capacities:
        return []
    how = "an estimate from all chains" if curve.rate == 1 else f"an estimate from {curve.rate:.2%} of the chains"
    names = ("half", "as it is", "double")
    told = [f"{name}: {people.percent(ratio, 1)}" for name, ratio in zip(names, curve.token_hit_ratios(), strict=True)]
    sizes = ", ".join(f"{size:,}" for size in curve.capacities)
    return [
        [(f"hit ratio with LRU at other capacities: {how}", DIM)],
        [("   ".join(told), BOLD), (f"   ({sizes} blocks)", DIM)],
    ]


def _prefixes(engine: Engine, room: int) -> list[Line]:
    heads = engine.prefixes.hottest(min(room - 1, _MOST_PREFIXES))
    if room < 2 or not heads:
        return []
    lines: list[Line] = [[(f"{'hot prefixes':18}{'requests':>12}{'found':>8}{'blocks':>10}{'tokens':>12}", DIM)]]
    for head in heads:
        found = people.percent(head.found / max(1, head.requests - head.error), 0)
        least = "≥" if head.blocks > 2 else ""
        row = f"{head.identity:016x}  {head.requests:>12,}{found:>8}{least + format(head.blocks, ','):>10}"
        lines.append([(row + f"{least + format(head.blocks * engine.block_size, ','):>12}", "")])
    return lines
