"""The console command ``distinit VERB …``, and the table from which ``tools/*.py`` are made.

A verb is a module of ``distinit_plugin.commands`` with ``add_arguments(parser)`` and ``run(arguments) -> int``; it is
imported only when it is called, so that ``distinit --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NamedTuple

from distinit_plugin.errors import UserError
from distinit_plugin.version import __version__


class Verb(NamedTuple):
    """One row of the table of commands."""

    module: str
    help: str


VERBS = {
    "run": Verb("run_net", "train and test from a YAML file (also tools/run_net.py)"),
    "run-splits": Verb("run_splits", "run all three splits of UCF-101 or HMDB-51 and print their mean and deviation"),
    "predict": Verb("predict", "print the top classes of videos by name"),
    "probe": Verb("probe", "k-NN and linear probe of a checkpoint's frozen features"),
    "check-corpus": Verb("check_corpus", "decode a whole corpus and report what is broken, short, odd, duplicated"),
    "plot-curves": Verb("plot_curves", "draw the curves of one or several runs"),
    "quickstart": Verb("quickstart", "the demonstration: digits in motion, from videos to a table, on a laptop"),
}

# Exit codes: 0 done, 1 the user must change something, 2 wrong command line, 130 interrupted.
EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the entry point of the console command."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="distinit", description="Video networks without video labels.")
    parser.add_argument("--version", action="version", version=f"distinit-plugin {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.help, add_help=False)
    known, rest = parser.parse_known_args(words[:1])
    return run_verb(known.verb, [*rest, *words[1:]])


def run_verb(name: str, words: list[str], prog: str | None = None) -> int:
    """Parse the words after the verb and run it; user errors become one printed sentence and exit code 1."""
    verb = VERBS[name]
    module = importlib.import_module(f"distinit_plugin.commands.{verb.module}")
    parser = argparse.ArgumentParser(
        prog=prog or f"distinit {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(words)
    try:
        return int(module.run(parsed))
    except UserError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _speaks() -> bool:
    """Whether this process prints its error: not where another rank of its job has already done so."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from distinit_plugin.engine.failure import speaks  # imports torch

    return speaks()


def run_tool(name: str) -> None:
    """Entry point of ``tools/*.py``: the same verb, called by its file."""
    sys.exit(run_verb(name, sys.argv[1:], prog=os.path.basename(sys.argv[0])))


if __name__ == "__main__":
    sys.exit(main())
