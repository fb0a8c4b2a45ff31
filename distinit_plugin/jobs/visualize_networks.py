"""Pictures of networks: their first filters, and the features of labelled videos in the plane."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

from distinit_plugin import build
from distinit_plugin.analysis.embedding import (
    Embedding,
    choose_classes,
    draw_embeddings,
    embed,
    embedding_numbers,
    embedding_rows,
)
from distinit_plugin.analysis.filters import Filters, draw_filters, filter_numbers, filter_rows, first_filters
from distinit_plugin.analysis.output import check_output, write_picture
from distinit_plugin.config.load import load_network_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import checkpoint
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.probing import features_of
from distinit_plugin.jobs.session import open_session
from distinit_plugin.jobs.trained import COMPUTING_KEYS, read_trained
from distinit_plugin.types import Network, Split
from distinit_plugin.video.corpus import Corpus, Listing, Mixture

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ filters
def visualize_filters(
    sources: Sequence[str],
    output: Path,
    *,
    layer: str = "",
    names: Sequence[str] = (),
    opts: Sequence[str] = (),
    console: Console | None = None,
) -> list[Filters]:
    """Draw the first filters of networks side by side.

    Args:
        sources: Checkpoints or converted files, folders of runs (their newest checkpoint), or YAML files: a network as
            its run would start, with the weights that INIT and TRAIN.CHECKPOINT_FILE_PATH name, else random ones.
        output: The PNG.
        layer: Another convolution by the name of its module; empty: the first one of each view.
        names: Of the networks, in the picture; empty: of files and folders.
        opts: ``KEY VALUE …`` over YAML files.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A source is not usable, or has no such layer.
    """
    check_output(output)
    filters: list[Filters] = []
    for name, source in zip(distinct_names(sources, names), sources, strict=True):
        network = _network(source, opts)
        assert isinstance(network, nn.Module)
        filters += first_filters(name, network, network.view_specs("test"), layer)
    write_picture(output, draw_filters(filters), filter_numbers(filters), filter_rows(filters))
    console = console or Console()
    for found, numbers in zip(filters, filter_numbers(filters)["layers"], strict=True):
        mean = numbers["mean_share"]
        told = "no kernel reaches over time" if mean is None else f"mean share of temporal variance {mean:.4f}"
        where = found.layer if found.time_layer in ("", found.layer) else f"{found.layer}, {found.time_layer}"
        console.print(f"{found.network}, {where}: {told}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)
    return filters


def _network(source: str, opts: Sequence[str]) -> Network:
    if not source.endswith((".yaml", ".yml")):
        return read_trained(checkpoint_of(source)).network()
    cfg = load_network_cfg([source], opts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.RNG_SEED)
        network = build.build_network(cfg)
    for report in build.initialize_network(cfg, network):
        logger.info("%s", report)
    return network


def checkpoint_of(source: str) -> str:
    """The file that a word names: of a run's folder the newest checkpoint.

    Raises:
        UserError: The folder holds none.
    """
    if not os.path.isdir(source):
        return source
    newest = checkpoint.newest_checkpoint(Path(source) / checkpoint.FOLDER)
    if newest is None:
        raise UserError(f"{source} holds no checkpoint of a run. Name a file, or the OUTPUT_DIR of a finished run.")
    return str(newest)


def distinct_names(sources: Sequence[str | Path], names: Sequence[str]) -> list[str]:
    """What pictures call things that are named by files or folders.

    Args:
        sources: Files or folders.
        names: The user's own; empty: as short as they can be and still differ.

    Raises:
        UserError: There are more or fewer names than sources, or two are equal.
    """
    found = list(names) or [_short_name(Path(source)) for source in sources]
    if not names and len(set(found)) < len(found):
        found = [str(source) for source in sources]
    if len(found) != len(sources) or len(set(found)) < len(found):
        raise UserError(
            f"{len(sources)} things are named, and --names gives {', '.join(found)}. Give each a name of its own, and "
            "name nothing twice."
        )
    return found


def _short_name(path: Path) -> str:
    """Of a run's folder for a checkpoint in it, else of the file."""
    if path.parent.name == checkpoint.FOLDER and path.suffix == ".pyth":
        return path.parent.parent.name
    return path.name if path.suffix not in (".pyth", ".yaml", ".yml", ".safetensors") else path.stem


# --------------------------------------------------------------------------------------------------------- t-SNE
class TsneOptions(NamedTuple):
    """What a picture of features shows.

    Attributes:
        use: Videos of CORPUS.TRAIN or CORPUS.TEST.
        classes: By name; empty: chosen at random.
        num_classes: How many then.
        neighbors: k of the vote.
        seed: Of the choice and of t-SNE.
        num_workers: Processes that decode.
    """

    use: Split = "test"
    classes: Sequence[str] = ()
    num_classes: int = 10
    neighbors: int = 20
    seed: int = 0
    num_workers: int = 0


def visualize_tsne(
    sources: Sequence[str],
    output: Path,
    options: TsneOptions,
    *,
    cfg: CfgNode | None = None,
    names: Sequence[str] = (),
    opts: Sequence[str] = (),
    console: Console | None = None,
) -> list[Embedding]:
    """Draw what networks make of labelled videos.

    Args:
        sources: Checkpoints of this program, converted files, or folders of runs; each is fed as in its own test.
        output: The PNG.
        options: What is shown.
        cfg: Its CORPUS names the videos; ``None``: that of the first source.
        names: Of the networks; empty: of files and folders.
        opts: ``KEY VALUE …`` of the keys in :mod:`.trained` for all networks.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A source, the videos or their classes are not usable.
    """
    check_output(output)
    titles = distinct_names(sources, names)
    trained = [read_trained(checkpoint_of(source), opts, more_keys=COMPUTING_KEYS) for source in sources]
    corpora = trained[0].cfg if cfg is None else cfg
    if not build.has_corpus(corpora, options.use):
        raise UserError(
            f"{'the configuration' if cfg is not None else sources[0]} names no CORPUS.{build.CORPUS_KEYS[options.use]}"
            ". Give a YAML file with labelled videos by --cfg, or choose the other list by --use."
        )
    videos, chosen = _chosen_videos(build.build_corpora(corpora, options.use, labeled=True), options)
    console = console or Console()
    embeddings = []
    for title, own in zip(titles, trained, strict=True):
        job = own.cfg.clone()
        job.defrost()
        job.DATA_LOADER.NUM_WORKERS = options.num_workers
        job.freeze()
        with open_session(job, log_to_folder=False, console=console) as session:
            network = own.network()
            session.check_convolutions(network, network.view_specs("test"))
            found = features_of(session, network, videos, options.use, keep_index=False)
        assert found.labels is not None
        paths = [videos[index].path for index in found.indices.tolist()]
        embeddings.append(
            embed(title, found.features, found.labels, chosen, paths, neighbors=options.neighbors, seed=options.seed)
        )
        console.print(_embedding_line(embeddings[-1]), highlight=False, soft_wrap=True, markup=False)
    numbers = {**embedding_numbers(embeddings), "seed": options.seed}
    write_picture(output, draw_embeddings(embeddings), numbers, embedding_rows(embeddings))
    console.print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)
    return embeddings


def _embedding_line(found: Embedding) -> str:
    return (
        f"{found.network}: {len(found.paths)} videos, {found.neighbors}-NN {100 * found.knn:.1f} %, "
        f"silhouette {found.silhouette:.3f}"
    )


def _chosen_videos(videos: Mixture, options: TsneOptions) -> tuple[Mixture, list[str]]:
    """The videos of the chosen classes, whose labels are places in the list of names that comes with them."""
    records = [record for record in videos if record.label is not None]
    names = videos.class_names or [str(number) for number in range(videos.num_classes or 0)]
    present = sorted({record.label for record in records if record.label is not None})
    chosen = choose_classes([names[label] for label in present], options.classes, options.num_classes, options.seed)
    places = {names.index(name): place for place, name in enumerate(chosen)}
    listing = Listing(root="", labeled=True, class_names=chosen)
    for record in records:
        if record.label in places:
            listing.add(record.path, places[record.label])
    return Mixture([Corpus("chosen", listing)]), chosen
