"""The views, slowly: each walks the rows of the tables one by one. Shares nothing with the SQL but the definitions."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import polars as pl

import kvtrace
from kvtrace.clients import client_ids

Row = dict[str, Any]


def rows_of(trace: kvtrace.Trace, table: str, engine: int = 0) -> list[Row]:
    """The rows of a table that belong to one engine, in order."""
    return [row for row in getattr(trace, table).to_dicts() if row["engine_index"] == engine]


def request_blocks(trace: kvtrace.Trace) -> list[Row]:
    head = trace.header
    size, stride = head["block_size"], head["block_size"] // (head.get("granule") or head["block_size"])
    chains = trace.chains()
    found = []
    for request in rows_of(trace, "requests"):
        r, prompt, output = request["request"], request["prompt_tokens"], request["output_tokens"]
        chain = chains.identities[chains.indptr[r] : chains.indptr[r + 1]].tolist()
        imported = head["source"] == "import"
        pieces = [chain[i : i + stride] for i in range(0, len(chain), stride)]
        for position, piece in enumerate(pieces):
            if not imported:
                known = output is None or (position + 1) * size <= prompt + output - (1 if output else 0)
                if len(piece) < stride or not known:
                    continue
            last = imported and position == len(pieces) - 1
            found.append(
                {
                    "engine_index": 0, "request": r, "position": position, "identity": piece[-1],
                    "tokens": max(1, min(size, prompt - position * size)) if last else size,
                    "in_prompt": imported or (position + 1) * size <= prompt,
                }
            )  # fmt: skip
    return found


def block_lifetimes(trace: kvtrace.Trace) -> list[Row]:
    done: list[Row] = []
    held: dict[int, Row] = {}

    def end(block: int, event: Row | None, why: str | None) -> None:
        life = held.pop(block)
        frees, last_free = life.pop("frees"), life.pop("last_free")
        when = event["time_ns"] if event else None
        life |= {
            "ended_by": why, "evicted_by": event["request"] if event and why == "evict" else None,
            "evict_step": event["step"] if event else None, "evict_ns": when,
        }  # fmt: skip
        hits = life.pop("hits")
        life["lifetime_ns"] = None if when is None else when - life["fill_ns"]
        life["idle_ns"] = when - last_free if when is not None and frees == hits + 1 else None
        done.append(life)

    for event in rows_of(trace, "block_events"):
        block, kind, identity = event["block"], event["kind"], event["identity"]
        if kind == "reset":
            for other in list(held):
                end(other, event, "reset")
        elif identity is None:
            continue
        elif kind == "fill":
            if block in held:
                end(block, event, "fill")
            held[block] = {
                "engine_index": 0, "block": block, "identity": identity, "request": event["request"],
                "fill_step": event["step"], "fill_ns": event["time_ns"], "uses": 0, "hits": 0, "first_use_ns": None,
                "last_use_ns": None, "frees": 0, "last_free": None,
            }  # fmt: skip
        elif block not in held:
            continue
        elif kind == "hit":
            life = held[block]
            life["hits"] += 1
            if event["request"] is None:
                continue  # a connector holds it while it copies it
            life["uses"] += 1
            life["last_use_ns"] = event["time_ns"]
            life["first_use_ns"] = event["time_ns"] if life["first_use_ns"] is None else life["first_use_ns"]
        elif kind == "free":
            held[block]["frees"] += 1
            held[block]["last_free"] = event["time_ns"]
        elif kind == "evict":
            end(block, event, "evict")
    for block in list(held):
        end(block, None, None)
    return done


def block_tables(trace: kvtrace.Trace) -> list[Row]:
    found, held = [], Counter[Any]()
    last: dict[Any, Row] = {}
    for event in rows_of(trace, "block_events"):
        if event["kind"] not in ("allocate", "hit", "free") or event["request"] is None:
            continue
        whose = (event["request"], event["group"])
        before = last.pop((*whose, event["block"]), None)
        if event["kind"] == "free":
            held[whose] -= 1
            if before:
                before["free_step"] = event["step"]
            continue
        held[whose] += 1
        row = {
            "engine_index": 0, "request": event["request"], "group": event["group"], "position": held[whose] - 1,
            "block": event["block"], "taken_by": event["kind"], "step": event["step"], "free_step": None,
        }  # fmt: skip
        last[(*whose, event["block"])] = row
        if row["position"] >= 0:
            found.append(row)
    return found


def reads(trace: kvtrace.Trace) -> list[Row]:
    size = trace.header["block_size"]
    tables = defaultdict(list)
    for entry in block_tables(trace):
        tables[entry["request"]].append(entry)
    found = []
    for scheduled in rows_of(trace, "step_requests"):
        computed = scheduled["computed_before"] + scheduled["tokens"]
        for entry in tables[scheduled["request"]]:
            end = entry["free_step"]
            if entry["step"] > scheduled["step"] or (end is not None and end < scheduled["step"]):
                continue
            tokens = min(size, computed - entry["position"] * size)
            if tokens > 0:
                found.append(
                    {"engine_index": 0, "step": scheduled["step"], "request": scheduled["request"],
                     "group": entry["group"], "position": entry["position"], "block": entry["block"],
                     "tokens": tokens}
                )  # fmt: skip
    return found


def step_reads(trace: kvtrace.Trace) -> list[Row]:
    blocks, tokens = Counter[int](), Counter[int]()
    for read in reads(trace):
        blocks[read["step"]] += 1
        tokens[read["step"]] += read["tokens"]
    return [{"engine_index": 0, "step": step, "blocks": n, "tokens": tokens[step]} for step, n in blocks.items()]


def block_reads(trace: kvtrace.Trace) -> list[Row]:
    times, requests = Counter[int](), defaultdict(set)
    for read in reads(trace):
        times[read["block"]] += 1
        requests[read["block"]].add(read["request"])
    return [{"engine_index": 0, "block": block, "times": n, "requests": len(requests[block])}
            for block, n in times.items()]  # fmt: skip


def shared_reads(trace: kvtrace.Trace) -> list[Row]:
    readers = Counter((read["block"], read["step"]) for read in reads(trace))
    return [{"engine_index": 0, "readers": n, "blocks": many} for n, many in Counter(readers.values()).items()]


def prefixes(trace: kvtrace.Trace) -> list[Row]:
    """A trie of single blocks, then chains of equal passage merged from the roots on."""
    per_block = trace.header["bytes_per_block"]
    chains: dict[int, list[Row]] = defaultdict(list)
    for block in request_blocks(trace):
        chains[block["request"]].append(block)
    root: Row = {"children": {}, "requests": []}
    for request, blocks in sorted(chains.items()):
        at = root
        for block in blocks:
            fresh = {"children": {}, "requests": [], "tokens": 0, "identity": block["identity"]}
            at = at["children"].setdefault(block["identity"], fresh)
            at["requests"].append(request)
            at["tokens"] = max(at["tokens"], block["tokens"])
    found = []

    def grow(node: Row, parent: int | None, depth: int) -> None:
        run = [node]
        while len(run[-1]["children"]) == 1:
            (child,) = run[-1]["children"].values()
            if len(child["requests"]) != len(node["requests"]):
                break
            run.append(child)
        last = run[-1]
        found.append(
            {
                "engine_index": 0, "node": last["identity"], "parent": parent, "depth": depth, "blocks": len(run),
                "requests": len(node["requests"]), "first_request": node["requests"][0],
                "tokens": sum(each["tokens"] for each in run),
                "bytes": None if per_block is None else per_block * len(run),
            }
        )  # fmt: skip
        for child in last["children"].values():
            grow(child, last["identity"], depth + len(run))

    for child in root["children"].values():
        grow(child, None, 0)
    return found


def reuse(trace: kvtrace.Trace) -> list[Row]:
    imported = trace.header["source"] == "import"
    starts = {step["step"]: step["start_ns"] for step in rows_of(trace, "steps")}
    looked = {}
    for n, lookup in enumerate(rows_of(trace, "lookups")):
        looked.setdefault((lookup["request"], lookup["step"]), n)
    requests = rows_of(trace, "requests")
    if not imported:
        requests = [request for request in requests if request["first_step"] is not None]
        requests.sort(
            key=lambda q: (q["first_step"], looked.get((q["request"], q["first_step"]), 1 << 60), q["request"])
        )
    timed = any(request["arrival_ns"] for request in requests)
    chains: dict[int, list[Row]] = defaultdict(list)
    for block in request_blocks(trace):
        chains[block["request"]].append(block)
    uses, found = [], []
    latest: dict[int, int] = {}
    for request in requests:
        r = request["request"]
        time = (request["arrival_ns"] if timed else None) if imported else starts[request["first_step"]]
        for block in chains[r]:
            identity = block["identity"]
            before = latest.get(identity)
            row = {"engine_index": 0, "request": r, "position": block["position"], "identity": identity,
                   "time_ns": time, "nth_use": sum(other == identity for other, _, _ in uses) + 1,
                   "previous_request": None, "distance_blocks": None, "reuse_ns": None}  # fmt: skip
            if before is not None:
                row["previous_request"] = uses[before][1]
                row["distance_blocks"] = len({other for other, _, _ in uses[before + 1 :]})
                row["reuse_ns"] = None if time is None else time - uses[before][2]
            latest[identity] = len(uses)
            uses.append((identity, r, time))
            found.append(row)
    return found


def preemptions(trace: kvtrace.Trace) -> list[Row]:
    """Token by token: which were computed before, and are computed again?"""
    starts = {step["step"]: step["start_ns"] for step in rows_of(trace, "steps")}
    acts: dict[int, list[Any]] = defaultdict(list)
    told = []
    for row in rows_of(trace, "preemptions"):
        row = {**row, "readmit_step": None, "readmit_ns": None, "tokens_found": None, "tokens_recomputed": None}
        acts[row["request"]].append((row["step"], 0, row))
        told.append(row)
    for row in rows_of(trace, "step_requests"):
        acts[row["request"]].append((row["step"], 1, row))
    for mine in acts.values():
        computed: set[int] = set()
        latest: Row | None = None
        for step, scheduled, row in sorted(mine, key=lambda act: act[:2]):
            if not scheduled:
                latest = row
                continue
            tokens = range(row["computed_before"], row["computed_before"] + row["tokens"])
            if latest is not None:
                if latest["readmit_step"] is None:
                    latest |= {"readmit_step": step, "readmit_ns": starts[step], "tokens_recomputed": 0,
                               "tokens_found": row["computed_before"]}  # fmt: skip
                latest["tokens_recomputed"] += len(computed.intersection(tokens))
            else:
                computed.update(range(row["computed_before"]))  # found: not computed, but had
            computed.update(tokens)
    return told


def occupancy(trace: kvtrace.Trace) -> list[Row]:
    head = trace.header
    usable, size = head["num_blocks"] - 1, head["block_size"]
    events, losses = rows_of(trace, "block_events"), rows_of(trace, "preemptions")
    ends = sorted((row for row in rows_of(trace, "requests") if row["finish_ns"] is not None),
                  key=lambda row: row["finish_ns"])  # fmt: skip
    scheduled = defaultdict(list)
    for row in rows_of(trace, "step_requests"):
        scheduled[row["step"]].append(row)
    references: Counter[int] = Counter()
    cached: set[int] = set()
    computed: dict[int, int] = {}
    rows = []
    for step in rows_of(trace, "steps"):
        while events and events[0]["time_ns"] <= step["start_ns"]:
            event = events.pop(0)
            block, kind, identity = event["block"], event["kind"], event["identity"]
            if kind in ("allocate", "hit", "free"):
                references[block] += -1 if kind == "free" else 1
            if kind == "reset":
                cached.clear()
            elif kind in ("allocate", "evict") or (kind in ("hit", "free") and identity is None):
                cached.discard(block)
            elif kind in ("fill", "hit", "free") and identity is not None:
                cached.add(block)
        while losses and losses[0]["step"] <= step["step"]:
            computed.pop(losses.pop(0)["request"], None)
        while ends and ends[0]["finish_ns"] <= step["start_ns"]:
            computed.pop(ends.pop(0)["request"], None)
        for row in scheduled[step["step"]]:
            computed[row["request"]] = row["computed_before"] + row["tokens"]
        used, holds = usable - step["free_blocks"], sum(references.values())
        idle = min(sum(references[block] <= 0 for block in cached), step["free_blocks"])
        wasted: int | None = holds * size - sum(computed.values())
        if set(trace.header["inexact"]) - {"carried-state"} or not 0 <= wasted <= used * size:
            wasted = None
        rows.append(
            {"engine_index": 0, "step": step["step"], "start_ns": step["start_ns"], "used": used, "cached_idle": idle,
             "free": step["free_blocks"] - idle, "holds": holds,
             "used_tokens": None if wasted is None else used * size - wasted, "wasted_slots": wasted}
        )  # fmt: skip
    return rows


def latencies(trace: kvtrace.Trace) -> list[Row]:
    steps = {step["step"]: step for step in rows_of(trace, "steps")}
    first_token: dict[int, int] = {}
    prompts = {row["request"]: row["prompt_tokens"] for row in rows_of(trace, "requests")}
    for row in rows_of(trace, "step_requests"):
        done = row["computed_before"] + row["tokens"] >= prompts[row["request"]]
        if done and row["request"] not in first_token:
            first_token[row["request"]] = row["step"]
    paused: Counter[int] = Counter()
    for row in preemptions(trace):
        if row["readmit_ns"] is not None:
            paused[row["request"]] += row["readmit_ns"] - row["time_ns"]
    found = []
    for row in rows_of(trace, "requests"):
        if row["first_step"] is None:
            continue
        step = first_token.get(row["request"])
        at = None if step is None else steps[step]["end_ns"]
        rest = None if at is None or row["finish_ns"] is None else row["finish_ns"] - at
        many = (row["output_tokens"] or 0) - 1
        found.append(
            {
                "engine_index": 0, "request": row["request"], "finish_reason": row["finish_reason"],
                "queue_ns": steps[row["first_step"]]["start_ns"] - row["arrival_ns"], "first_token_step": step,
                "first_token_ns": at, "ttft_ns": None if at is None else at - row["arrival_ns"],
                "generation_ns": rest, "itl_ns": None if rest is None or many < 1 else rest / many,
                "e2e_ns": None if row["finish_ns"] is None else row["finish_ns"] - row["arrival_ns"],
                "preempted_ns": paused[row["request"]],
            }
        )  # fmt: skip
    return found


def misses(trace: kvtrace.Trace) -> list[Row]:
    """Every token of a lookup by itself."""
    size = trace.header["block_size"]
    first_fill: dict[int, int] = {}
    for event in rows_of(trace, "block_events"):
        if event["kind"] == "fill" and event["identity"] is not None:
            first_fill.setdefault(event["identity"], event["step"])
    chains: dict[int, dict[int, int]] = defaultdict(dict)
    for block in request_blocks(trace):
        chains[block["request"]][block["position"]] = block["identity"]
    silent = {row["request"] for row in rows_of(trace, "requests") if row["no_cache_read"]}
    lost = rows_of(trace, "preemptions")
    found = []
    for lookup in rows_of(trace, "lookups"):
        r, step = lookup["request"], lookup["step"]
        had = max((row["tokens_lost"] for row in lost if row["request"] == r and row["step"] <= step), default=0)
        kinds = Counter[str]()
        for token in range(lookup["tokens_hit"], lookup["tokens_asked"]):
            identity = chains[r].get(token // size)
            if lookup["after_preemption"] and token < had:
                kinds["preemption"] += 1
            elif token // size >= (lookup["tokens_asked"] - 1) // size:
                kinds["short"] += 1
            elif r in silent:
                kinds["unread"] += 1
            elif identity is not None and first_fill.get(identity, step) < step:
                kinds["capacity"] += 1
            else:
                kinds["cold"] += 1
        order = ("cold", "capacity", "preemption", "short", "unread")
        found.append({**lookup, **{f"{kind}_tokens": kinds[kind] for kind in order}})
    return found


def clients(trace: kvtrace.Trace) -> list[Row]:
    found = []
    for row in rows_of(trace, "requests"):
        name, tenant = row["request_id"], row["tenant"]
        client = client_ids(pl.Series([name], dtype=pl.String))[0]
        found.append(
            {"engine_index": 0, "request": row["request"], "tenant": f"{tenant:016x}" if tenant else "none",
             "client": client}
        )  # fmt: skip
    return found
