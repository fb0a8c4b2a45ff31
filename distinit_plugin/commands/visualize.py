"""Pictures of what was learned, each with its numbers beside it as CSV and JSON.

``distinit visualize KIND --help`` says what a kind takes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from distinit_plugin.commands.common import (
    add_config_arguments,
    add_input_arguments,
    load_corpora_from_arguments,
    load_from_arguments,
    positive,
    whole,
)
from distinit_plugin.commands.show_flow import add_flow_arguments, flow_options

_RUN = "output folder of a run with a test, or its scores.npz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the kinds and their flags."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (help_text, declare, do) in _KINDS.items():
        kind = kinds.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        kind.add_argument(
            "--output", type=Path, default=Path(f"{name}.png"), metavar="FILE.png", help=f"default: {name}.png"
        )
        declare(kind)
        kind.set_defaults(do=do)


def run(arguments: argparse.Namespace) -> int:
    """Draw."""
    arguments.do(arguments)
    return 0


def _add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="in the picture; default: of the files")


# ------------------------------------------------------------------------------------------------------- networks
def _declare_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "networks",
        nargs="+",
        metavar="NETWORK",
        help="checkpoint, folder of a run, or YAML file (a network as its run would start: inflated, random)",
    )
    parser.add_argument("--layer", default="", metavar="NAME", help="another convolution; default: the first of a view")
    _add_names(parser)
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="over YAML files, last on the line"
    )


def _filters(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_networks import visualize_filters

    visualize_filters(
        arguments.networks,
        arguments.output,
        layer=arguments.layer,
        names=arguments.names,
        opts=arguments.opts,
    )


def _declare_tsne(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="checkpoint, or folder of a run")
    parser.add_argument(
        "--cfg",
        dest="cfg_files",
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML",
        help="its CORPUS names the videos; default: as the first network was trained",
    )
    parser.add_argument("--use", default="test", choices=["train", "test"], help="which list; default: test")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="by name; default: random ones")
    parser.add_argument("--num-classes", type=whole(2), default=10, help="random classes; default: 10")
    parser.add_argument("--neighbors", type=whole(1), default=20, help="k of the vote; default: 20")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the choice of classes and of t-SNE; default: 0")
    parser.add_argument("--workers", type=whole(0), default=0, help="processes that decode; default: none beside this")
    _add_names(parser)
    add_input_arguments(parser)


def _tsne(arguments: argparse.Namespace) -> None:
    cfg = load_corpora_from_arguments(arguments) if arguments.cfg_files else None

    from distinit_plugin.jobs.visualize_networks import TsneOptions, visualize_tsne

    options = TsneOptions(
        use=arguments.use,
        classes=arguments.classes,
        num_classes=arguments.num_classes,
        neighbors=arguments.neighbors,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    visualize_tsne(arguments.networks, arguments.output, options, cfg=cfg, names=arguments.names, opts=arguments.opts)


# ------------------------------------------------------------------------------------------------------- teachers
def _declare_entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", default="", metavar="NAME", help="below DISTILL.TEACHERS; default: the only one")
    parser.add_argument(
        "--clips",
        type=whole(0),
        default=0,
        metavar="N",
        help="clips of the training that are looked at; default: one a video, at most 10000; of cached targets all",
    )
    parser.add_argument(
        "--thresholds", nargs="+", type=positive, default=[], metavar="NATS", help="tell what a gate there would keep"
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        type=_gated_run,
        default=[],
        metavar="NATS=RUN",
        help=f"accuracy over thresholds: {_RUN}; none=RUN: without a gate; several of one threshold: their mean",
    )
    parser.add_argument("--classes", default="", metavar="FILE", help="names of the teacher's classes, one per line")
    parser.add_argument(
        "--examples", type=whole(0), default=6, metavar="N", help="frames of low, median, high entropy; default: 6 each"
    )
    add_config_arguments(parser)


def _gated_run(word: str) -> tuple[float, Path]:
    threshold, equals, folder = word.partition("=")
    try:
        value = math.inf if threshold == "none" else float(threshold)
    except ValueError:
        value = math.nan
    if not (equals and folder and value > 0):
        raise argparse.ArgumentTypeError(f"'{word[:60]}' is not allowed. Allowed: NATS=RUN with NATS > 0, or none=RUN")
    return value, Path(folder)


def _entropy(arguments: argparse.Namespace) -> None:
    cfg = load_from_arguments(arguments, whole_job=False)

    from distinit_plugin.jobs.visualize_entropy import EntropyOptions, visualize_entropy

    options = EntropyOptions(
        teacher=arguments.teacher,
        num_clips=arguments.clips,
        thresholds=arguments.thresholds,
        runs=arguments.runs,
        class_file=arguments.classes,
        num_examples=arguments.examples,
    )
    visualize_entropy(cfg, arguments.output, options)


# ----------------------------------------------------------------------------------------------------------- runs
def _declare_per_class(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="RUN", help=_RUN)
    parser.add_argument("second", type=Path, metavar="OTHER", help="the run whose accuracies are subtracted")
    parser.add_argument("--resamples", type=whole(100), default=10_000, help="of the bootstrap; default: 10000")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the bootstrap; default: 0")
    parser.add_argument("--most", type=whole(1), default=25, help="classes at each end that are drawn; default: 25")
    _add_names(parser)


def _per_class(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_runs import visualize_per_class

    visualize_per_class(
        arguments.first,
        arguments.second,
        arguments.output,
        names=arguments.names,
        resamples=arguments.resamples,
        seed=arguments.seed,
        most=arguments.most,
    )


def _declare_confusion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help=_RUN)
    _add_names(parser)


def _confusion(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_runs import visualize_confusion

    visualize_confusion(arguments.run_folder, arguments.output, names=arguments.names)


def _declare_curves(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    _add_names(parser)


def _curves(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_runs import visualize_curves

    visualize_curves(arguments.runs, arguments.output, names=arguments.names)


def _declare_epe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "probes", nargs="+", type=Path, metavar="PROBE", help="OUTPUT_DIR/motion of distinit probe-motion"
    )
    _add_names(parser)


def _epe(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_runs import visualize_epe

    visualize_epe(arguments.probes, arguments.output, names=arguments.names)


def _declare_flow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a video; or one or more OUTPUT_DIR/motion of distinit probe-motion, which are drawn side by side",
    )
    _add_names(parser)
    add_flow_arguments(parser)


def _flow(arguments: argparse.Namespace) -> None:
    from distinit_plugin.jobs.visualize_runs import visualize_flow

    visualize_flow(arguments.sources, arguments.output, names=arguments.names, **flow_options(arguments))


_Declare = Callable[[argparse.ArgumentParser], None]
_Do = Callable[[argparse.Namespace], None]

_KINDS: dict[str, tuple[str, _Declare, _Do]] = {
    "filters": (
        "the first filters over time, with the share of each that varies over time",
        _declare_filters,
        _filters,
    ),
    "tsne": ("features of labelled videos in the plane, with k-NN accuracy and silhouette", _declare_tsne, _tsne),
    "entropy": ("how sure a teacher is on a corpus, and what gates would keep of it", _declare_entropy, _entropy),
    "per-class": ("what a run gains over another, class by class, with intervals", _declare_per_class, _per_class),
    "confusion": ("which classes a run takes for which", _declare_confusion, _confusion),
    "curves": ("losses, accuracies and learning rates of runs", _declare_curves, _curves),
    "epe": ("end-point errors of flow decoded from layers, of several probes", _declare_epe, _epe),
    "flow": ("the flow of a video, or what was decoded from features beside it", _declare_flow, _flow),
}
"""Kind → help, flags, what it does."""
