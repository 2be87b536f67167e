"""The command line: `main.py` holds the group and the exit codes, each other file one command."""

from kvtrace.cli.main import main as main
