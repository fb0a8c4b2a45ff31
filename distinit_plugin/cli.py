"""The console command ``distinit VERB …``, and the table from which ``tools/*.py`` are made.

A verb is a module of ``distinit_plugin.commands`` with ``add_arguments(parser)`` and ``run(arguments) -> int``; it is
imported only when it is called, so that ``distinit --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from distinit_plugin.errors import ConfigError, UserError, log_of
from distinit_plugin.refusals import explain_refusal, first_line
from distinit_plugin.version import __version__


class Verb(NamedTuple):
    """One row of the table of commands."""

    module: str
    help: str


VERBS = {
    "run": Verb("run_net", "train and test from a YAML file (also tools/run_net.py)"),
    "run-splits": Verb("run_splits", "run all three splits of UCF-101 or HMDB-51 and print their mean and deviation"),
    "study": Verb("study", "a grid of runs (initialisation × student × corpus × seed …), resumable, and its table"),
    "predict": Verb("predict", "print the top classes of videos by name"),
    "demo": Verb("demo", "draw on a video what a trained network says of it: classes, or boxes and actions"),
    "detect-persons": Verb("detect_persons", "boxes of persons on keyframes as AVA's csv files have them; resumable"),
    "train-rpn": Verb("train_rpn", "train a region proposal network of persons on keyframes with boxes"),
    "probe": Verb("probe", "k-NN, linear probe and softmax (Fixed) on a checkpoint's frozen features"),
    "probe-motion": Verb("probe_motion", "how much optical flow can be decoded from the layers of a network"),
    "describe": Verb("describe", "parameters, GMACs, layer shapes, strides and receptive fields of a network"),
    "compare-cost": Verb("compare_cost", "parameters, GMACs and latency of networks and ensembles, flow included"),
    "extract-features": Verb("extract_features", "features and logits of long videos by sliding windows"),
    "export": Verb("export", "the student alone as safetensors, torch.export or ONNX, checked"),
    "ensemble": Verb("ensemble", "average the saved scores of several runs and print their accuracies"),
    "check-corpus": Verb("check_corpus", "decode a whole corpus and report what is broken, short, odd, duplicated"),
    "check-ava": Verb("check_ava", "what is missing, wrong or odd in a data set of AVA's form"),
    "eval-ava": Verb("eval_ava", "frame-mAP@0.5 of detected actions, exactly as AVA's official evaluator"),
    "cache-targets": Verb(
        "cache_targets", "a teacher's outputs on a grid of clips, computed once and read in training; resumable"
    ),
    "extract-flow": Verb("extract_flow", "optical flow of a corpus, one small lossless file per video; resumable"),
    "show-flow": Verb("show_flow", "optical flow as colour beside the frames, as a PNG or a video"),
    "check-inflation": Verb("check_inflation", "how far an inflated network is from its image network on a still clip"),
    "visualize": Verb(
        "visualize", "pictures with their numbers: filters, tsne, entropy, per-class, confusion, curves, epe, flow"
    ),
    "report": Verb("report", "one HTML page about runs: results, published numbers, curves, classes, timings, a study"),
    "plot-curves": Verb("plot_curves", "draw the curves of one or several runs"),
    "convert-weights": Verb("convert_weights", "translate a public weights file, with an account of every tensor"),
    "config": Verb("show_config", "print a configuration with all its defaults, or its part that PySlowFast reads"),
    "slowfast": Verb("run_slowfast", "PySlowFast's own run_net, made to start, with everything of this package in it"),
    "doctor": Verb("doctor", "what works on this machine and what does not, and whether a job could start"),
    "quickstart": Verb("quickstart", "the demonstration: digits in motion, from videos to a table, on a laptop"),
    "demo-d3d": Verb("demo_d3d", "the demonstration of D3D: labels that only motion tells, on a laptop"),
}

# Exit codes: 0 done, 1 the user must change something, 2 wrong command line, 3 a defect of this program,
# 130 interrupted.
EXIT_USER_ERROR = 1
EXIT_DEFECT = 3
EXIT_INTERRUPTED = 130

FILE_COLUMNS = "140"
"""Width of what is printed into a file or a pipe."""


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
    """Parse the words after the verb and run it.

    What the user can put right becomes one printed sentence and exit code 1. A defect of this program becomes one
    printed sentence and exit code 3; its traceback goes to a file.
    """
    _open_standard_streams()
    if not os.isatty(1):  # a file, as a scheduler makes one, has no width: tables shall not be folded to 80 columns
        os.environ.setdefault("COLUMNS", FILE_COLUMNS)
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
        with _told_once():
            return int(module.run(parsed))
    except UserError as error:
        if _speaks():
            print(f"error: {_listed(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = explain_refusal(error)
        if sentence is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return EXIT_USER_ERROR
        _report_defect(error)
        return EXIT_DEFECT


@contextmanager
def _told_once() -> Iterator[None]:
    """What signal handlers raise in a destructor is dropped by Python, with a traceback; it comes again later."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt | SystemExit) and "DataLoader worker" not in str(error):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _listed(error: UserError) -> str:
    """The sentence, or all of them below their number."""
    if not isinstance(error, ConfigError) or len(error.problems) == 1:
        return str(error)
    return "\n".join([f"{len(error.problems)} things are wrong:", *(f"- {problem}" for problem in error.problems)])


def _report_defect(error: Exception) -> None:
    """One sentence on the terminal; the traceback is in the run's log, else in a file of its own."""
    place = log_of(error)
    if place is None:
        try:
            handle, place = tempfile.mkstemp(prefix="distinit-", suffix=".log")
            with open(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write("".join(traceback.format_exception(error)))
        except OSError:
            traceback.print_exception(error)  # nowhere else is left
            place = "above"
    print(
        f"error: this is a defect of distinit-plugin {__version__}, not of what you gave it "
        f"({type(error).__name__}: {first_line(error)}). The traceback is {'' if place == 'above' else 'in '}{place}; "
        "please report it with the command line.",
        file=sys.stderr,
    )


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr would lend its number to the next file, and prints would go into that."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names of files need not be valid in any encoding


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
