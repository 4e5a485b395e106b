"""The commands, their options, and how each kind of failure ends."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

import pullback
from pullback.lab.cli.terminal import complain


def _whole(_type: object, tokens: Sequence[Any]) -> int:
    """A whole number as written: the parser's own conversion would round 1.5 to 2 without a word."""
    text = str(tokens[0].value)
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise ValueError(f"a whole number is needed, got {text[:80]!r}.")
    return int(text)


Out = Annotated[Path, Parameter(help="Folder of the store and the report.")]
Workers = Annotated[
    int | None, Parameter(converter=_whole, help="Worker processes; every core when left out.")
]
ExecutorName = Annotated[Literal["local", "ray"], Parameter(help="Where cells run.")]
Seeds = Annotated[
    int | None, Parameter(converter=_whole, help="How many of the declared seeds; all when left out.")
]
Retry = Annotated[bool, Parameter(negative="", help="Run cells again that failed before.")]
RUNS = Path("runs")
FLAGS = ("quiet", "debug")
RUNNING = frozenset({"study", "trial", "tune"})
_flags: ContextVar[dict[str, bool]] = ContextVar("flags", default=dict.fromkeys(FLAGS, False))  # noqa: B039 (never changed in place)

app = App(
    name="pullback",
    help=(
        "Methods on the learning signal of neural networks, and trials that show whether they help.\n\n"
        "Every command takes --quiet (results only) and --debug (tracebacks)."
    ),
    version=pullback.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def dispatch(tokens: list[str]) -> int:
    """Run one command and turn every failure into one line and an exit status."""
    from pullback.lab.engine.errors import Interrupted

    tokens, given = _split_flags(tokens)
    _flags.set(given)
    try:
        result = app(tokens, exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        complain(f"{error} `pullback --help` lists the commands.")
        return 2
    except Interrupted as stop:
        complain(stop)
        return stop.exit_code
    except KeyboardInterrupt:
        complain("interrupted. What is finished is kept.")
        return 130
    except BrokenPipeError:
        return _unread(tokens)
    except SystemExit as leave:
        if isinstance(leave.__context__, BrokenPipeError):  # how rich answers a closed pipe
            return _unread(tokens)
        raise
    except Exception as error:
        if given["debug"]:
            traceback.print_exc()
            if inner := getattr(error, "traceback_text", ""):
                print(inner, file=sys.stderr)
        complain(_line(error))
        return 2 if _misuse(error) else 1


def _unread(tokens: list[str]) -> int:
    """The reader (a pager, `head`) has gone: no fault when it was to read, but runs that did not finish are one."""
    # Point stdout away, so that closing it does not complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not RUNNING.intersection(tokens[:1]) or {"--help", "-h"}.intersection(tokens):
        return 0
    complain(
        "nobody reads the output any more. What is finished is kept; the same command goes on from there."
    )
    return 1


def _split_flags(tokens: list[str]) -> tuple[list[str], dict[str, bool]]:
    """Take the flags that every command has out of the words, wherever they stand."""
    return [t for t in tokens if t.removeprefix("--") not in FLAGS or not t.startswith("--")], {
        flag: f"--{flag}" in tokens for flag in FLAGS
    }


def _line(error: Exception) -> str:
    """The error as one line; what is not one of our own messages is named by its type."""
    if isinstance(error, OSError):
        reason = str(error.strerror or error)
        if reason.endswith("."):  # one of our own messages, with its fix
            return reason
        place = f" {error.filename!r}" if error.filename else ""
        return f"cannot use{place}: {reason}. Choose another folder or free some space."
    if type(error).__module__.startswith("pullback"):
        return str(error)
    if isinstance(error, MemoryError):
        return "memory ran out. What is finished is kept; use --workers 1 or free some memory."
    reason = str(error).rstrip(".")
    return f"unexpected {type(error).__name__}: {reason}. Run it again with --debug to see where."


def _misuse(error: Exception) -> bool:
    return type(error).__name__ in {"UsageError", "UnknownRoomError"}


@app.command(name="list")
def list_() -> None:
    """List all methods by capability, with the verdict of their committed evidence."""
    from pullback.lab.cli import reading

    reading.list_rooms()


@app.command
def show(room: str) -> None:
    """Show one method: what it is, what the paper claims, what the evidence says, how to cite it."""
    from pullback.lab.cli import reading

    reading.show_room(room)


@app.command
def study(
    *rooms: str,
    size: str = "full",
    all_: Annotated[bool, Parameter(name="--all", negative="", help="Every room.")] = False,
    only: Annotated[str | None, Parameter(help="One study of the rooms, by name.")] = None,
    seeds: Seeds = None,
    executor: ExecutorName = "local",
    workers: Workers = None,
    retry_failed: Retry = False,
    out: Out = RUNS,
) -> int:
    """Run the studies of one or more methods, print the verdicts and write the report.

    Cells that are in the store are not run again, so an interrupted study goes on where it stopped.
    """
    from pullback.lab.cli import running

    plan = running.Plan(size, seeds, executor, workers, out, retry_failed, **_flags.get())
    return running.run(running.study_refs(rooms, everything=all_, only=only), plan)


@app.command
def trial(
    file: str,
    *,
    size: str = "full",
    seeds: Seeds = None,
    executor: ExecutorName = "local",
    workers: Workers = None,
    retry_failed: Retry = False,
    out: Out = RUNS,
) -> int:
    """Run a trial that you declared in FILE.py (or FILE.py:NAME) on your own training function."""
    from pullback.lab.cli import running

    plan = running.Plan(size, seeds, executor, workers, out, retry_failed, **_flags.get())
    return running.run([running.trial_ref(file)], plan)


@app.command
def tune(
    room: str,
    *,
    only: Annotated[str | None, Parameter(help="One study of the room, by name.")] = None,
    executor: ExecutorName = "local",
    workers: Workers = None,
    retry_failed: Retry = False,
    out: Out = RUNS,
) -> int:
    """Tune every arm of a method's studies with equal budgets and write the room's tuned.toml."""
    from pullback.lab.cli import running

    plan = running.Plan("full", None, executor, workers, out, retry_failed, **_flags.get())
    return running.tune(running.study_refs([room], everything=False, only=only), plan)


@app.command
def report(
    *,
    open_: Annotated[bool, Parameter(name="--open", negative="", help="Show it in the browser.")] = False,
    out: Out = RUNS,
) -> int:
    """Write the report from the store and the committed evidence."""
    from pullback.lab.cli import reading

    return reading.write(out, show=open_)


@app.command
def serve(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(converter=_whole)] = 0,
    open_: Annotated[bool, Parameter(name="--open", negative="", help="Show it in the browser.")] = False,
    out: Out = RUNS,
) -> int:
    """Serve the report folder, on this machine only."""
    from pullback.lab.cli import reading

    return reading.serve_report(out, host=host, port=port, show=open_)


@app.command
def export(
    *rooms: str,
    format_: Annotated[Literal["json", "parquet"], Parameter(name="--format")] = "json",
    to: Annotated[Path, Parameter(help="Folder to write to.")] = Path("evidence"),
    out: Out = RUNS,
) -> int:
    """Write evidence (JSON) or a table with one row per measured value (Parquet) from the store."""
    from pullback.lab.cli import exporting

    return exporting.export(rooms, form=format_, to=to, out=out)


@app.command
def cite(*rooms: str) -> None:
    """Print the BibTeX entries of methods, of all when none is named."""
    from pullback.core.citation import cite as entries
    from pullback.lab.cli.terminal import page

    page(entries(*rooms))


@app.command
def doctor(*, out: Out = RUNS) -> int:
    """Check versions, threads, memory, extras and the output folder, and say what to install."""
    from pullback.lab.doctor import diagnose

    return diagnose(out)
