"""`kvtrace record`: run a command, and have every vLLM engine that it starts traced."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from kvtrace import people
from kvtrace.cli.examples import examples
from kvtrace.cli.output import note
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.trim import trim

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have it
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
SI_KERNEL = 0x80  # siginfo's si_code of a signal that came from the terminal, hence went to the whole group
LEAST_BYTES = 8 << 10  # the header and a few steps
READ_BACK_BYTES = 256 << 20  # a trace up to this size is opened for the closing summary
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip

LIKELY_CAUSES = """no trace was recorded; the likely causes, most likely first:
  1. the command never started a vLLM engine
  2. its vLLM runs in another Python environment, without kvtrace: `pip install --no-deps kvtrace` there
  3. VLLM_PLUGINS is set inside the command, without kvtrace in its list
  4. vLLM failed to start, or is not installed"""


class ByteCount(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number of bytes: 1000, 500MB, 10GiB, 1.5G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower()
        digits = text.rstrip("bkmgti").strip()
        unit = text[len(digits) :].strip()
        unit = unit[:-1] if len(unit) > 1 and unit.endswith("b") else unit
        try:
            count = int(float(digits) * _UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{value!r} is no size; write 500MB or 10GiB", param, ctx)
        if count <= 0:
            self.fail(f"{value!r} is not more than nothing", param, ctx)
        return count


@click.command(
    "record",
    epilog=examples(
        '''kvtrace record -o traces-out -- python -c "print('start vLLM here')"''',
        "kvtrace record -o traces-out --granule 16 --max-bytes 10GiB -- sh -c 'echo vllm serve MODEL'",
    ),
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="OUT",
    help="Folder for the traces.",
)
@click.option("--granule", type=click.IntRange(min=1), metavar="N",
              help="Tokens between recorded identities; default: the engine's hash block size.")  # fmt: skip
@click.option(
    "--max-bytes",
    type=ByteCount(),
    metavar="SIZE",
    help="Stop tracing an engine at this size (10GiB, 500MB).",
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARG]...")
def command(out: Path, granule: int | None, max_bytes: int | None, argv: tuple[str, ...]) -> int:
    """Run COMMAND and trace every vLLM engine that it starts.

    The command keeps its stdin, stdout, stderr and exit code. Traces are added to the folder OUT; nothing in
    it is overwritten. For launchers that cannot be wrapped, set KVTRACE_OUT=DIR
    (and KVTRACE_GRANULE, KVTRACE_MAX_BYTES).
    """
    if max_bytes is not None and max_bytes < LEAST_BYTES:
        raise UsageError(f"--max-bytes {max_bytes}: a log needs {LEAST_BYTES:,} bytes at the least")
    made = prepare(out)
    before = set(out.glob("*.kvt"))
    try:
        code = run(argv, environment(os.environ, out, granule, max_bytes))
    except OSError as error:
        if made:
            out.rmdir()
        found = not isinstance(error, FileNotFoundError)
        reason = error.strerror if found else "command not found"
        note(f"error: {argv[0]}: {reason}")
        return NOT_EXECUTABLE if found else NOT_FOUND
    if made and not any(out.iterdir()):
        with contextlib.suppress(OSError):
            out.rmdir()
    try:
        report(sorted(set(out.glob("*.kvt")) - before), out)
    except Exception as error:  # the command is done: nothing of ours may change its exit code
        note(f"the recording could not be summed up: {type(error).__name__}: {error}")
    return code


def prepare(out: Path) -> bool:
    """Make the folder where it is missing, and say whether it was.

    Raises UsageError where it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; -o wants a folder")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # permission bits say nothing of root, quotas and read-only mounts
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the folder {out}: {error.strerror}") from error
    return made


def environment(given: Mapping[str, str], out: Path, granule: int | None, max_bytes: int | None) -> dict[str, str]:
    """The command's environment: ours, and what tells the tracer to record."""
    env = dict(given)
    env["KVTRACE_OUT"] = str(out.resolve())  # the command may change its folder
    if granule is not None:
        env["KVTRACE_GRANULE"] = str(granule)
    if max_bytes is not None:
        env["KVTRACE_MAX_BYTES"] = str(max_bytes)
    if "VLLM_PLUGINS" in env:  # an allow-list: vLLM leaves out whatever it does not name
        names = [name for name in env["VLLM_PLUGINS"].split(",") if name.strip()]
        env["VLLM_PLUGINS"] = ",".join([*names, *["kvtrace"][: "kvtrace" not in names]])
    return env


def run(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command in the foreground, pass signals on to it, and return its exit code as a shell would.

    A signal from the terminal reaches the command by itself, for it is in our process group: passing that
    on, too, would make one Ctrl-C two. Only what another process sent to us alone is passed on. Raises
    OSError where the command cannot be started.
    """
    waited = PASSED_ON | {signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where the parent ignores it, exit codes would be lost
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        child = subprocess.Popen(
            argv, env=dict(env), preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        )
        while (code := child.poll()) is None:
            got = signal.sigwaitinfo(waited)
            if got.si_signo != signal.SIGCHLD and got.si_code != SI_KERNEL:
                child.send_signal(got.si_signo)
    finally:
        while signal.sigtimedwait(waited, 0) is not None:  # a Ctrl-C meant for the command must not end us now
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return 128 - code if code < 0 else code


def report(files: Sequence[Path], out: Path) -> None:
    """Say what was recorded, one line a file, and what to do with it; or why there may be nothing."""
    if not files:
        note(LIKELY_CAUSES)
        return
    for file in files:
        with contextlib.suppress(OSError):
            trim(file)  # an engine that was killed leaves the room it had allocated ahead
        note(f"recorded {file}  {_summary(file)}")
    note(f"next: kvtrace info {files[0] if len(files) == 1 else out}")


def _summary(file: Path) -> str:
    size = file.stat().st_size
    if size <= READ_BACK_BYTES:
        import kvtrace

        try:
            trace = kvtrace.open(file)
            info, reasons = trace.info, trace.losses["reason"].unique(maintain_order=True).to_list()
            whole = f", incomplete: {', '.join(reasons)}" if reasons else ""
            if not (trace.complete or reasons):
                whole = ", no end record: its engine was killed, or is still running"
            return f"{info['requests']:,} requests, {info['steps']:,} steps, {people.size(size)}{whole}"
        except KvtraceError:  # an engine that never came up leaves a file with little in it
            pass
    return people.size(size)
