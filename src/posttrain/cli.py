"""The command line: which commands there are, and how an error ends one.

What a command does, its options and its help are in `posttrain.commands`. Only what is quick to
import is imported there at once, so that `posttrain --help` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer
from rich.text import Text

from posttrain.commands import (
    chat,
    compare,
    evaluate,
    export,
    inspect,
    push,
    report,
    run,
    store,
    sweep,
    watch,
)
from posttrain.commands.io import SafeConsole
from posttrain.engine.errors import PosttrainError, Terminated, Waiting

app = typer.Typer(
    name="posttrain",
    help="Whole LLM post-training recipes: traced, resumable, from a laptop CPU upwards.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 done, 1 work failed, 2 a mistake in what was asked, 3 a file is to be filled in, 130 stopped
    by the user, 143 stopped by SIGTERM.
    """
    command = typer.main.get_command(app)
    _take_any_character()
    try:
        with _heeding_sigterm():
            result = command.main(
                args=None if arguments is None else list(arguments),
                prog_name="posttrain",
                standalone_mode=False,
            )
        if sys.stdout is not None:
            # What is in its buffer is written now, where it can be told that it cannot be.
            sys.stdout.flush()
    except Waiting as error:
        _complain(str(error), label="waiting: ", style="bold yellow")
        return error.exit_code
    except PosttrainError as error:
        _complain(str(error), *getattr(error, "__notes__", ()))
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "posttrain"
        _complain(error.format_message(), f"`{path} --help` lists what it takes")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort) as error:
        result = getattr(error, "exit_code", 130)
    except BrokenPipeError:
        # Who read our output has gone; there is nobody to tell.
        _drop_output()
        return 1
    except OSError as error:
        # Whatever the system refuses, be it a file or the output itself.
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        said = f"{where}{error.strerror or error}"
        _complain(said if where else f"output could not be written or read: {said}")
        return 1
    if result in (130, Terminated.exit_code):
        _complain("stopped; to go on, run the same command again")
    return result if isinstance(result, int) else 0


def _take_any_character() -> None:
    """Have characters that the terminal's encoding lacks written out, in place of an error."""
    for stream, how in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "replace"),
    ):
        # Of a program that replaced them, with what has no encoding.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=how)


def _drop_output() -> None:
    """Send the rest of the output nowhere: at its end Python tries again to write it."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Let SIGTERM, which batch systems and containers send, stop what Ctrl-C stops."""

    def stop(number: int, frame: FrameType | None) -> None:
        # A second one must not disturb the end that the first one has begun.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(message: str, *notes: str, label: str = "error: ", style: str = "bold red") -> None:
    console = SafeConsole(stderr=True)
    # Where not even that can be written, the exit code has to do.
    with suppress(OSError):
        console.print(Text.assemble((label, style), message), soft_wrap=True)
        for note in notes:
            console.print(Text(note, style="dim"), soft_wrap=True)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from posttrain import __version__

        print(f"posttrain {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS = {
    "Make": (run.run, run.plan, sweep.sweep, evaluate.eval, report.recipes),
    "Look": (
        *(inspect.ls, inspect.show, inspect.lineage, inspect.diff),
        *(compare.compare, store.verify, watch.watch, report.report, chat.chat),
    ),
    "Keep": (store.adopt, export.export, push.push, store.gc),
}
"""Heading in the help -> commands, each named after its function."""
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
