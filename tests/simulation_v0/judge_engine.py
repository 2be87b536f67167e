"""Runs vLLM 0.4.2's own `LLMEngine.step`, `Scheduler` and block manager on scripted requests, without a model.

A program of its own (see judge.py): `python judge_engine.py FD SOURCES` reads pickled cases from stdin and writes
pickled results to the file descriptor FD. SOURCES is a folder with the Python files of vLLM 0.4.2. What these import
beside themselves (torch and the like) is replaced by empty modules, so any Python runs them. It imports nothing of
this project.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import pickle
import sys
import traceback
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

#: Top-level packages, and parts of vLLM, that are never used here.
ABSENT = {
    "torch", "transformers", "psutil", "packaging", "pydantic", "numpy", "prometheus_client", "cpuinfo", "requests",
    "ray", "msgspec", "tqdm", "typing_extensions",
}  # fmt: skip
ABSENT_PARTS = ("vllm.model_executor", "vllm.transformers_utils", "vllm.usage", "vllm.executor", "vllm.worker")
EPOCH = 1 << 30  # what the scheduler's clock counts from: later than every arrival


class _Mock(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes empty modules in place of those that are not needed, also where they are installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT or name.startswith(ABSENT_PARTS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        import typing

        if spec.name == "typing_extensions":
            return typing
        module = _Mock(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _load(sources: Path) -> None:
    """Make `vllm` importable from `sources`, without running its `__init__`, which imports everything."""
    sys.meta_path.insert(0, _Absent())
    package = ModuleType("vllm")
    package.__path__ = [str(sources / "vllm")]
    package.__version__ = "0.4.2"  # type: ignore[attr-defined]
    sys.modules["vllm"] = package
    import logging

    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    logging.disable(logging.CRITICAL)


class Judge:
    """One run: drives `LLMEngine.step`, with an executor that returns scripted tokens, and takes down what it does."""

    def __init__(self, case: dict[str, Any]) -> None:
        from vllm.config import CacheConfig, SchedulerConfig
        from vllm.core import scheduler as scheduler_module
        from vllm.engine.llm_engine import LLMEngine
        from vllm.engine.output_processor.single_step import SingleStepOutputProcessor
        from vllm.engine.output_processor.stop_checker import StopChecker
        from vllm.utils import Counter

        self.case, self.settings = case, case["settings"]
        s = self.settings
        cache = CacheConfig(s["block_size"], 0.9, 0, "auto")
        cache.num_gpu_blocks, cache.num_cpu_blocks = s["num_gpu_blocks"], s["num_cpu_blocks"]
        config = SchedulerConfig(s["max_num_batched_tokens"], s["max_num_seqs"], s["max_model_len"])
        self.scheduler = scheduler_module.Scheduler(config, cache, None)
        self.manager = self.scheduler.block_manager
        # No argument leads to the block manager's share; the rest of its constructor does not use it.
        self.manager.watermark_blocks = int(s["watermark"] * s["num_gpu_blocks"])
        self.calls = 0
        scheduler_module.time = SimpleNamespace(time=lambda: float(EPOCH + self.calls))
        engine = self.engine = LLMEngine.__new__(LLMEngine)
        engine.scheduler, engine.log_stats = self.scheduler, False
        engine.cache_config, engine.scheduler_config = cache, config
        engine.model_executor = SimpleNamespace(execute_model=self._execute)
        checker = StopChecker(s["max_model_len"], None)
        engine.output_processor = SingleStepOutputProcessor(config, None, self.scheduler, Counter(), checker)
        self.groups: dict[int, Any] = {}
        self.steps: list[Any] = []
        # first, last, recomputes, swaps, blocks out, blocks in, tokens recomputed, tokens at the end, end
        self.rows: list[list[Any]] = [
            [-1, -1, 0, 0, 0, 0, 0, spec["prompt"], "unfinished"] for spec in case["requests"]
        ]
        self.way: dict[int, str | None] = dict.fromkeys(range(len(self.rows)))  # how each was preempted last
        self._observe()
        mend(self.scheduler, self.settings["mend"])
        choose(self.settings["victim"], self.manager)

    def _observe(self) -> None:
        scheduler, inner_schedule = self.scheduler, self.scheduler.schedule
        inner_preempt, inner_in = scheduler._preempt, scheduler._swap_in

        def preempt(group: Any, blocks_out: Any, mode: Any = None) -> Any:
            number = int(group.request_id)
            blocks = len(self.manager.block_tables[group.get_seqs()[0].seq_id])
            result = inner_preempt(group, blocks_out, self._mode(group, blocks))
            if result.name == "SWAP":
                self.swapped_out.append((number, blocks))
                self.way[number] = "swapped"
            else:
                self.recomputed.append(number)
                self.way[number] = "recomputed"
            return result

        def swap_in(group: Any, blocks_in: Any) -> None:
            number, before = int(group.request_id), len(blocks_in)
            inner_in(group, blocks_in)
            self.swapped_in.append((number, len(blocks_in) - before))

        def schedule() -> Any:
            self.recomputed, self.swapped_out, self.swapped_in = [], [], []
            metadata, outputs = inner_schedule()
            self._note(outputs)
            return metadata, outputs

        scheduler._preempt, scheduler._swap_in, scheduler.schedule = preempt, swap_in, schedule

    def _mode(self, group: Any, blocks: int) -> Any:
        """How to preempt. 0.4.2 has no option for it: it takes RECOMPUTE for a group of one sequence."""
        from vllm.core.scheduler import PreemptionMode

        how = self.settings["preemption"]
        fits = blocks <= self.manager.get_num_free_cpu_blocks()
        if how == "recompute" or (how == "swap" and not fits and "swap-space" in self.settings["mend"]):
            return PreemptionMode.RECOMPUTE
        if how == "swap":
            return PreemptionMode.SWAP
        tokens = group.get_seqs()[0].get_len()
        cheaper = self.settings["swap_cost_per_block"] * blocks < self.settings["recompute_cost_per_token"] * tokens
        return PreemptionMode.SWAP if fits and cheaper else PreemptionMode.RECOMPUTE

    def _note(self, outputs: Any) -> None:
        scheduled = [(int(one.seq_group.request_id), one.token_chunk_size) for one in outputs.scheduled_seq_groups]
        prefill = outputs.num_prefill_groups
        assert prefill in (0, len(scheduled))
        assert sum(blocks for _, blocks in self.swapped_out) == len(outputs.blocks_to_swap_out)
        assert sum(blocks for _, blocks in self.swapped_in) == len(outputs.blocks_to_swap_in)
        for number in self.recomputed:
            self.rows[number][2] += 1
        for number, blocks in self.swapped_out:
            self.rows[number][3] += 1
            self.rows[number][4] += blocks
        for number, blocks in self.swapped_in:
            self.rows[number][5] += blocks
        ignored = [int(group.request_id) for group in outputs.ignored_seq_groups]
        for number in ignored:
            row = self.rows[number]
            row[1], row[7] = self.calls, self._known(number)
            if self.way[number] is not None:
                row[8] = f"dropped-{self.way[number]}"
            else:
                row[8] = "prompt-too-long" if row[7] > self.scheduler.prompt_limit else "never-fits"
        for number, tokens in scheduled:
            row = self.rows[number]
            row[0] = self.calls if row[0] < 0 else row[0]
            if prefill and row[2]:
                row[6] += tokens - 1  # the last of its tokens had never been computed
        known = [self._known(number) for number, _ in scheduled]
        work = (
            sum(known), sum(tokens * (tokens + 1) // 2 for tokens in known), 0, 0
        ) if prefill else (0, 0, len(known), sum(known))  # fmt: skip
        queues = (self.scheduler.running, self.scheduler.waiting, self.scheduler.swapped)
        self.steps.append(
            (
                "prefill" if prefill else "decode" if scheduled else "idle",
                scheduled, self.recomputed, self.swapped_out, self.swapped_in, ignored,
                self.manager.get_num_free_gpu_blocks(), self.manager.get_num_free_cpu_blocks(),
                *map(len, queues), *work,
            )
        )  # fmt: skip

    def _execute(self, execute_model_req: Any) -> list[Any]:
        from vllm.sequence import Logprob, SamplerOutput, SequenceGroupOutput, SequenceOutput

        if not execute_model_req.seq_group_metadata_list:
            return []  # as `Worker.execute_model`
        groups = []
        for one in execute_model_req.seq_group_metadata_list:
            ((seq_id, data),) = one.seq_data.items()
            assert len(one.block_tables[seq_id]) * self.settings["block_size"] >= data.get_len()
            groups.append(SequenceGroupOutput([SequenceOutput(seq_id, 3, {3: Logprob(0.0)})], None))
        return [SamplerOutput(groups)]

    def _add(self, number: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.sequence import Sequence, SequenceGroup

        spec = self.case["requests"][number]
        seq = Sequence(number, "", [1] * spec["prompt"], self.settings["block_size"])
        params = SamplingParams(temperature=0.0, max_tokens=spec["output"], ignore_eos=True, detokenize=False)
        group = SequenceGroup(str(number), [seq], params, spec["arrival_time"])
        self.groups[number] = group
        self.scheduler.add_seq_group(group)

    def _abort(self, number: int) -> None:
        row = self.rows[number]
        if not self.groups[number].is_finished():
            self.engine.abort_request(str(number))
            row[1], row[7], row[8] = max(self.calls - 1, 0), self._known(number), "aborted"

    def _known(self, number: int) -> int:
        return int(self.groups[number].get_seqs()[0].get_len())

    def run(self) -> dict[str, Any]:
        specs = self.case["requests"]
        events = sorted(
            [(spec["arrival"], 0, n) for n, spec in enumerate(specs)]
            + [(spec["abort"], 1, n) for n, spec in enumerate(specs) if spec["abort"] is not None]
        )  # fmt: skip
        gone, coming, now, ended = set(), deque(events), 0, "done"
        while True:
            while coming and coming[0][0] <= now:
                _, abort, number = coming.popleft()
                if not abort and number not in gone:
                    self._add(number)
                elif abort and number in self.groups:
                    self._abort(number)
                elif abort:
                    gone.add(number)
                    self.rows[number][8] = "aborted"
            if self.engine.has_unfinished_requests():
                try:
                    if self._call():
                        now += self._cost()
                        continue
                except RuntimeError as error:
                    if "lack of CPU swap space" not in str(error):
                        raise
                    ended = "swap-space"
                    break
            if not coming:
                ended = "livelock" if self.engine.has_unfinished_requests() else "done"
                break
            now = max(now, coming[0][0])
        for number in self.groups:
            if self.rows[number][8] == "unfinished":
                self.rows[number][7] = self._known(number)
        leaked = sum(
            len(self.manager.block_tables.get(number, ()))
            for number, group in self.groups.items()
            if group.is_finished()
        )
        return {"steps": self.steps, "requests": [tuple(row) for row in self.rows], "ended": ended, "leaked": leaked}

    def _cost(self) -> int:
        """What the last call took: one, or, with costs, so many nanoseconds."""
        costs = self.case["costs"]
        if costs is None:
            return 1
        step = self.steps[-1]
        moved = [sum(blocks for _, blocks in step[place]) for place in (4, 3)]
        total = costs[0]
        for cost, amount in zip(costs[1:], [*step[11:], *moved], strict=True):
            total += cost * amount
        return int(total)

    def _call(self) -> bool:
        """One call of `LLMEngine.step`. False if it changed nothing: then it does not count, and none after it would
        change anything either."""
        before = len(self.steps)
        self.engine.step()
        _, scheduled, recomputed, out, back, ignored = self.steps[before][:6]
        if not (scheduled or recomputed or out or back or ignored):
            del self.steps[before]
            return False
        for number, _ in scheduled:
            if self.groups[number].is_finished():
                spec, tokens, row = self.case["requests"][number], self._known(number), self.rows[number]
                row[1], row[7] = self.calls, tokens
                row[8] = "finished" if tokens == spec["prompt"] + spec["output"] else "model-length"
        self.calls += 1
        return True


def mend(scheduler: Any, which: set[str]) -> None:
    """Replace the functions of the engine that have the defects in `which` by ones that have not."""
    from vllm.core.interfaces import AllocStatus

    manager = scheduler.block_manager
    total, tables = manager.num_total_gpu_blocks, manager.block_tables

    def missing(seq: Any) -> int:
        return len(seq.logical_token_blocks) - len(tables[seq.seq_id])

    def status(required: int, watermark_always: bool) -> Any:
        free = manager.get_num_free_gpu_blocks()
        kept = 0 if free == total and not watermark_always else manager.watermark_blocks
        return AllocStatus.OK if free - required >= kept else AllocStatus.LATER

    def can_append_slots(seq_group: Any, num_lookahead_slots: int = 0) -> bool:
        return missing(seq_group.get_seqs()[0]) <= manager.get_num_free_gpu_blocks()

    def can_allocate(seq_group: Any) -> Any:
        required = len(seq_group.get_seqs()[0].logical_token_blocks)
        return AllocStatus.NEVER if required > total else status(required, False)

    def can_swap_in(seq_group: Any, num_lookahead_slots: int = 0) -> Any:
        seq = seq_group.get_seqs()[0]
        required = len(tables[seq.seq_id]) + (missing(seq) if "no-return" in which else 1)
        return AllocStatus.NEVER if required > total else status(required, "livelock" not in which)

    if "spare-block" in which:
        manager.can_append_slots = can_append_slots
    if "no-return" in which:
        manager.can_allocate = can_allocate
    if which & {"no-return", "livelock"}:
        manager.can_swap_in = can_swap_in
    if "leak" in which:
        inner = scheduler._schedule_swapped

        def schedule_swapped(*args: Any, **kwargs: Any) -> Any:
            queue, outputs = inner(*args, **kwargs)
            for group in outputs.infeasible_seq_groups:
                scheduler.free_seq(group.get_seqs()[0])
            return queue, outputs

        scheduler._schedule_swapped = schedule_swapped


class _Queue(deque):  # type: ignore[type-arg]
    """The running queue, from which the victim is taken by another rule than 0.4.2's."""

    def pop(self) -> Any:  # type: ignore[override]
        sizes = [len(self.tables[group.get_seqs()[0].seq_id]) for group in self]
        size = (max if self.rule == "most-blocks" else min)(sizes)
        place = max(n for n, one in enumerate(sizes) if one == size)
        victim = self[place]
        del self[place]
        return victim

    tables: Any = None
    rule = ""


def choose(rule: str, manager: Any) -> None:
    """Have victims chosen by `rule`."""
    from vllm.core import policy

    class Sorted(policy.FCFS):  # type: ignore[misc]
        def sort_by_priority(self, now: float, seq_groups: Any) -> Any:
            queue = _Queue(super().sort_by_priority(now, seq_groups))
            queue.tables, queue.rule = manager.block_tables, rule
            return queue

    chosen = policy.FCFS if rule == "last" else Sorted
    policy.PolicyFactory._POLICY_REGISTRY["fcfs"] = chosen


def main() -> None:
    """Serve cases until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "wb")
    _load(Path(sys.argv[2]))
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = Judge(case).run()
        except Exception:
            result = {"error": traceback.format_exc()}
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
