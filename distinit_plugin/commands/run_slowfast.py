"""PySlowFast's own run_net, made to start here: ``--cfg X.yaml [KEY VALUE …]``, YAML files of either program.

The checkout is the folder in PYSLOWFAST_ROOT (or that of an importable slowfast). Its files stay as they are: what
keeps it from running is cured in memory, and listed at the start.
"""

from __future__ import annotations

import argparse
import os
import sys

from distinit_plugin.commands.common import add_config_arguments, split_pairs

EXIT_WRONG_WORDS = 2
"""As argparse ends with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--num_shards", type=int, default=1, help="machines in the job")
    parser.add_argument("--shard_id", type=int, default=0, help="number of this machine")
    parser.add_argument("--init_method", help="where they meet: tcp://ADDRESS:PORT; default: a free port")
    parser.add_argument("--without", nargs="+", default=[], metavar="PATCH", help="cures that are switched off")
    parser.add_argument("--list-patches", action="store_true", help="list the cures and which of them apply, then stop")
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Start PySlowFast."""
    files, pairs = split_pairs(arguments.cfg_files)
    if not files and not arguments.list_patches:
        print("error: name a YAML file, of PySlowFast or of this package: --cfg X.yaml", file=sys.stderr)
        return EXIT_WRONG_WORDS

    from distinit_plugin.hosts.slowfast import boot, patches  # nothing else may import the adapter

    if arguments.without:
        os.environ[patches.WITHOUT_VARIABLE] = ",".join(arguments.without)
    if arguments.list_patches:
        applied = boot.boot()
        for patch in boot.PATCHES:
            print(f"{'applied' if patch in applied else 'not needed':<11} {patch.name:<18} {patch.symptom}")
        return 0
    words = ["--num_shards", str(arguments.num_shards), "--shard_id", str(arguments.shard_id)]
    if arguments.init_method:
        words += ["--init_method", arguments.init_method]
    opts = [*pairs, *arguments.opts]
    boot.run_net([*words, "--cfg", *files, *(["--opts", *opts] if opts else [])])
    return 0
