"""The `deepclust` command: a file for each group of verbs in `deepclust --help`.

Every verb is a few lines on top of a function that does the work.
Imports of torch and of all that is heavy happen inside the verbs, so that `--help` is instant.
Results go to stdout, everything else to stderr. Exit codes are those of `deepclust.errors`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import traceback
from typing import Annotated

import typer

from cluster_jobs.cli import begin, common, data, going_on, results, runs, stages
from cluster_jobs.cli.common import log
from deepclust import __version__
from deepclust.errors import DeepclustError, DiskError, lack_of_memory, redact

app = typer.Typer(
    help="Pretrain image backbones by clustering.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for group in (begin, data, runs, stages, results):  # the order of the groups in the help
    app.add_typer(group.verbs)


def main() -> None:
    """Run a verb, and turn our errors into a message and an exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stderr
        # a file that is cut short while it is mapped ends with a signal, also while an image is
        # decoded, when descriptor 2 is another one (`complaints.py`)
        faulthandler.enable(os.dup(2))
    for stream in (sys.stdout, sys.stderr):  # names of runs have letters that a locale may lack
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    going_on.stop_on_term()
    try:
        app(standalone_mode=True)
    except DeepclustError as error:
        log(f"error: {redact(str(error))}{going_on.advice(error)}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        raise
    except Exception as error:
        lacks = lack_of_memory(error)
        if lacks is not None:
            sys.stderr.write(redact(f"error: {lacks}\n"))
            sys.exit(lacks.exit_code)
        if isinstance(error, OSError):  # of a file that nobody expected to be refused
            text = f"error: {error.filename or 'a file'}: {error.strerror or error}\n"
            sys.stderr.write(redact(text))
            sys.exit(DiskError.exit_code)
        sys.stderr.write(redact(traceback.format_exc()))
        sys.exit(1)
    except SystemExit as end:
        stopped = going_on.interruption(end)  # typer has caught the KeyboardInterrupt
        if stopped is None or end.code != going_on.INTERRUPTED:
            raise
        advice = going_on.advice(stopped)
        log(f"interrupted{'; finished work is kept' if advice else ''}{advice}")
        is_term = isinstance(stopped, going_on.Terminated)
        sys.exit(going_on.TERMINATED if is_term else going_on.INTERRUPTED)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"deepclust {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Pretrain image backbones by clustering."""
    context.call_on_close(common.ended)
