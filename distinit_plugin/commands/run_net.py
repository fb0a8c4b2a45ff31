"""Train and test from a YAML file: ``--cfg configs/DistInit/X.yaml --opts KEY VALUE …``, flags as in PySlowFast."""

from __future__ import annotations

import argparse

from distinit_plugin.commands.common import add_config_arguments, add_dry_run, dry_run_words, load_from_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_dry_run(parser)
    parser.add_argument("--num_shards", type=int, help="machines in the job (NUM_SHARDS)")
    parser.add_argument("--shard_id", type=int, help="number of this machine (SHARD_ID)")
    parser.add_argument("--init_method", help="where they meet: tcp://ADDRESS:PORT of machine 0 (RUNNER.INIT_METHOD)")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the job of the YAML file."""
    extra = dry_run_words(arguments)
    flags = {"NUM_SHARDS": "num_shards", "SHARD_ID": "shard_id", "RUNNER.INIT_METHOD": "init_method"}
    for key, flag in flags.items():
        if getattr(arguments, flag) is not None:
            extra += [key, str(getattr(arguments, flag))]
    cfg = load_from_arguments(arguments, extra)

    from distinit_plugin.jobs.running import run as run_job  # imports torch: only once the configuration is right

    run_job(cfg)
    return 0
