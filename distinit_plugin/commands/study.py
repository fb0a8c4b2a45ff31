"""Do a grid of runs, each once, and compare them: pre-training and fine-tuning × initialisations × students × seeds.

A YAML file says which (README, "Studies of many runs"). Stopped by whatever, the same command goes on. Runs that failed
are listed with the reason, are tried again by the next call, and keep no others from being done (exit code 1).
"""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("study", metavar="STUDY.yaml", help="a file of yours, or a shipped one: studies/distinit.yaml")
    parser.add_argument("--output", default="", metavar="FOLDER", help="where everything is written, over OUTPUT_DIR")
    parser.add_argument("--list", action="store_true", help="say how far each run is, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every configuration, say what would be done, stop"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="RUN", help="these runs, by name or folder, one after another, here"
    )
    parser.add_argument(
        "--processes",
        type=whole(0),
        default=0,
        help="runs at once; default: one per core, one with GPUs or torchrun; slurm: as many as the cluster gives",
    )
    parser.add_argument("--launch", default="local", choices=["local", "torchrun", "slurm"], help="default: local")
    parser.add_argument(
        "--launch-options",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="WORD",
        help="for torchrun (--nproc_per_node 4) or sbatch (--gpus-per-node 1), last on the line",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; 1 when a run failed."""
    from distinit_plugin.errors import UserError
    from distinit_plugin.studies.reading import read_study

    if arguments.launch_options and arguments.launch == "local":
        raise UserError("--launch-options: they are for --launch torchrun or slurm; name one of these.")
    study = read_study(arguments.study, output=arguments.output)  # before torch is imported

    from distinit_plugin.studies.program import Wish, run_study

    wish = Wish(
        list_runs=arguments.list,
        dry_run=arguments.dry_run,
        only=arguments.only,
        launch=arguments.launch,
        processes=arguments.processes,
        words=arguments.launch_options,
    )
    return 0 if run_study(study, wish) else 1
