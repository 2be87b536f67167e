"""The `kvtrace` group: finds a command's file when it is asked for, and turns every ending into an exit code.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but the input was damaged or lossy; 130 interrupted,
143 terminated (SIGTERM).
`record` leaves with the exit code of the command it ran.
"""

from __future__ import annotations

import difflib
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from kvtrace.cli.examples import examples

# A command is the file of its name (a trailing underscore where the name is a keyword of Python). What it does is
# repeated here, so that `--help` need not import them all; a test compares.
SECTIONS = {
    "Record": {
        "record": "Run COMMAND and trace every vLLM engine that it starts.",
    },
    "Look": {
        "info": "Show what a trace holds, and whether anything is missing.",
        "verify": "Check a trace against itself: exit code 0 only without a mismatch.",
        "report": "Write one HTML page on what a trace tells.",
        "plot": "Draw one chart of the report.",
        "stats": "Figures of a trace: hits, use of the cache, reuse, speed, latency.",
        "top": "Watch a trace that is still being written.",
        "diff": "Compare two runs of the same requests: what changed, and why.",
        "sql": "Ask a trace questions in SQL (DuckDB's dialect, read-only).",
        "advise": "Advice on a deployment: what replays of its trace say, with figures.",
    },
    "Replay": {
        "replay": "Replay a trace's lookups in caches of other sizes and policies.",
        "curve": "Hit ratios of a trace at all cache sizes, or its working sets.",
        "simulate": "Run a trace's requests again at other settings of their engine.",
        "policies": "List the eviction policies: name, rule, paper.",
        "calibrate": "Learn what an engine's steps cost, by its trace or this machine.",
    },
    "Exchange": {
        "import": "Turn another tool's trace into a .kvt file.",
        "export": "Write a trace in another tool's format.",
        "cut": "Write a part of a trace as a trace of its own.",
    },
    "Start here": {
        "demo": "Show what kvtrace does, on a bundled trace.",
    },
}
COMMANDS = [name for names in SECTIONS.values() for name in names]
_KEYWORDS = {"import"}


class Cli(click.Group):
    """A group whose commands are modules, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"kvtrace.cli.{cmd_name}_" if cmd_name in _KEYWORDS else f"kvtrace.cli.{cmd_name}"
        command: click.Command = import_module(module).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=3)
            hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "See 'kvtrace --help'."
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` has seen enough: that is no failure, though click thinks so
            _let_go_of_stdout()
            ctx.exit(0)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "kvtrace",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, and leave through SystemExit with one of the exit codes above."""
        if sys.stdout is None:  # closed by the caller (`>&-`)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
        try:
            code = self._run(args, prog_name or "kvtrace", complete_var, extra)
            sys.stdout.flush()
        except BrokenPipeError:
            _let_go_of_stdout()
            code = 0
        except OSError as error:  # of the last flush
            _let_go_of_stdout()
            _say(f"error: cannot write the output: {error.strerror or error}")
            code = 1
        sys.exit(code)

    def _run(self, args: Sequence[str] | None, prog_name: str, complete_var: str | None, extra: dict[str, Any]) -> int:
        from kvtrace_traces.errors import KvtraceError, UsageError

        try:
            done = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            return done if isinstance(done, int) else 0
        except (click.Abort, KeyboardInterrupt):
            _say("interrupted")
            return 130
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                error.show()
                return 2
            hint = f" ({context.command_path} --help tells more)" if context is not None else ""
            _say(f"error: {_one_line(error.format_message())}{hint}")
            return error.exit_code
        except KvtraceError as error:
            if _debugging():
                raise
            _say(f"error: {_one_line(str(error))}")
            return 2 if isinstance(error, UsageError) else 1
        except OSError as error:
            if _debugging() or error.errno != errno.ENOSPC:
                return _unexpected(error)
            _let_go_of_stdout()
            _say("error: cannot write the output: no space left on the device")
            return 1
        except Exception as error:
            return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """Say in one line what nobody foresaw; raise it where someone debugs."""
    if _debugging():
        raise error
    _say(f"error: {type(error).__name__}: {_one_line(str(error))} (KVTRACE_DEBUG=1 shows where)")
    return 1


def _say(text: str) -> None:
    click.echo(f"kvtrace: {text}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _debugging() -> bool:
    return os.environ.get("KVTRACE_DEBUG", "") not in ("", "0")


def _let_go_of_stdout() -> None:
    # The reader went away (`| head`). Python flushes stdout once more on its way out: let that go nowhere.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a captured stdout has no file
        return


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import kvtrace

        click.echo(f"kvtrace {kvtrace.__version__}")
        ctx.exit()


@click.group(
    cls=Cli,
    epilog=examples(
        "kvtrace demo",
        "kvtrace info traces/samples/thrash.kvt",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli() -> None:
    """See what an LLM server's KV cache did, and replay it at settings that were never run."""


def _end(number: int, _frame: object) -> NoReturn:
    """End as an exit does, so that what is temporary is removed; the code is the one that shells give."""
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """The entry point of the `kvtrace` script."""
    signal.signal(signal.SIGTERM, _end)
    # What a command imports and makes lives to its end: looking through it for garbage again and again, and at last on
    # the way out, is a fifth of what a short command takes.
    gc.set_threshold(100_000)
    try:
        cli.main()
    finally:
        if "duckdb" not in sys.modules:  # which complains on its way out of what was not looked through
            gc.freeze()
