"""Features of labelled videos in the plane (DistInit, arXiv 1901.09244, figure 5), with two numbers that no eye sways.

Features are brought to length 1, so that all three measures agree on what is near: t-SNE (of their first 50 principal
components), the vote of the nearest neighbours, each video among all others, and the mean silhouette.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from distinit_plugin.engine.figures import COLOURS, label, new_figure
from distinit_plugin.engine.probes import leave_one_out_accuracy
from distinit_plugin.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "^", "s", "X", "D")
MAX_CLASSES = len(COLOURS) * len(MARKERS)
"""Classes that differ in colour or form."""

FEWEST = 6
"""Videos below which there are no neighbourhoods to be kept."""

_COMPONENTS = 50
_PERPLEXITY = 30.0
_WORKING_MEMORY = 64  # MiB that scikit-learn takes for distances at a time; its default is 1024


@dataclass(frozen=True)
class Embedding:
    """V videos of one network in the plane.

    Attributes:
        network: How the picture calls it.
        points: (V,2) float32.
        labels: (V,) int64, places in ``class_names``.
        class_names: Of the chosen classes.
        paths: V files.
        neighbors: k of the vote.
        knn: Fraction of videos whose k nearest others vote for its class.
        silhouette: Mean silhouette of the classes, -1 to 1.
    """

    network: str
    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    class_names: list[str]
    paths: list[str]
    neighbors: int
    knn: float
    silhouette: float


def choose_classes(present: Sequence[str], wanted: Sequence[str], count: int, seed: int) -> list[str]:
    """The classes of a picture, in the order of ``present``.

    Args:
        present: Classes that have videos.
        wanted: By name; empty: chosen at random.
        count: How many then, at most.
        seed: Of the choice.

    Raises:
        UserError: A name is unknown, or there are too many or fewer than two.
    """
    unknown = [name for name in wanted if name not in present]
    if unknown:
        raise UserError(
            f"--classes: there are no videos of the class '{unknown[0]}'. Known: {', '.join(present[:20])}"
            f"{', …' if len(present) > 20 else ''}."
        )
    picked = np.random.default_rng(seed).permutation(len(present))[:count].tolist()
    chosen = set(wanted) or {present[place] for place in picked}
    if not 2 <= len(chosen) <= MAX_CLASSES:
        raise UserError(
            f"{len(chosen)} classes are chosen, and a picture of classes needs 2 to {MAX_CLASSES}. Choose others by "
            "--classes or --num-classes."
        )
    return [name for name in present if name in chosen]


def embed(
    network: str,
    features: Tensor,
    labels: Tensor,
    class_names: list[str],
    paths: list[str],
    *,
    neighbors: int = 20,
    seed: int = 0,
) -> Embedding:
    """Lay features out in the plane.

    Args:
        network: Name for the picture.
        features: (V,D).
        labels: (V,) int64, places in ``class_names``.
        class_names: Of the classes.
        paths: V files.
        neighbors: k of the vote; at most V - 1 are asked.
        seed: Of t-SNE.

    Raises:
        UserError: There are too few videos, or all of one class, or a feature is no number.
    """
    import sklearn
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    num_videos, num_features = features.shape
    num_classes = len(labels.unique())
    if num_videos < FEWEST or not 2 <= num_classes < num_videos:
        raise UserError(
            f"{num_videos} videos of {num_classes} classes are too few for a picture of classes: it needs {FEWEST} of "
            "two classes. Choose more classes, or another list."
        )
    if not features.isfinite().all():
        raise UserError(f"{network} gives features that are not finite. Look at its weights.")
    rows: npt.NDArray[np.float32] = nn.functional.normalize(features.float(), dim=1).numpy()
    components = min(_COMPONENTS, num_features, num_videos)
    with sklearn.config_context(working_memory=_WORKING_MEMORY), np.errstate(invalid="ignore"):
        main = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(rows)
        start = "pca" if main[:, 0].std() > 0 else "random"  # a network may have the same features for all videos
        layout = TSNE(init=start, perplexity=min(_PERPLEXITY, (num_videos - 1) / 3), random_state=seed)
        points = layout.fit_transform(main)
        silhouette = float(silhouette_score(rows, labels.numpy()))
    return Embedding(
        network=network,
        points=np.asarray(points, dtype=np.float32),
        labels=labels.numpy(),
        class_names=class_names,
        paths=paths,
        neighbors=min(neighbors, num_videos - 1),
        knn=leave_one_out_accuracy(features, labels, neighbors),
        silhouette=silhouette,
    )


def embedding_numbers(embeddings: Sequence[Embedding]) -> dict[str, Any]:
    """For JSON: what the picture's titles say, and the classes."""
    return {
        "classes": embeddings[0].class_names,
        "networks": [
            {
                "network": found.network,
                "videos": len(found.paths),
                "neighbors": found.neighbors,
                "knn_accuracy": found.knn,
                "silhouette": found.silhouette,
            }
            for found in embeddings
        ],
    }


def embedding_rows(embeddings: Sequence[Embedding]) -> list[list[Any]]:
    """For CSV: a row for each video of each network."""
    rows: list[list[Any]] = [["network", "path", "class", "x", "y"]]
    for found in embeddings:
        for path, own, (x, y) in zip(found.paths, found.labels, found.points, strict=True):
            rows.append([found.network, path, found.class_names[own], f"{x:.5g}", f"{y:.5g}"])
    return rows


def draw_embeddings(embeddings: Sequence[Embedding]) -> Figure:
    """Networks side by side, a colour and form for each class."""
    across = min(len(embeddings), 3)
    down = -(-len(embeddings) // across)
    names = embeddings[0].class_names
    width = 4.6 * across if len(names) <= 16 else max(4.6 * across, 7.0)
    columns = max(1, min(len(names), int(width / (0.068 * min(max(map(len, names)), 32) + 0.5))))
    legend = 0.19 * -(-len(names) // columns) + 0.2
    figure = new_figure(width, 4.4 * down + legend)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, found in zip(axes, embeddings, strict=False):
        for place, name in enumerate(names):
            own = found.points[found.labels == place]
            axis.scatter(
                own[:, 0],
                own[:, 1],
                s=max(8.0, min(30.0, 6000 / len(found.points))),
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
                linewidths=0,
                alpha=0.85,
                label=label(name, 32),
            )
        axis.set_title(
            f"{label(found.network)}\n{found.neighbors}-NN {100 * found.knn:.1f} %, silhouette {found.silhouette:.3f}",
            fontsize=10,
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_aspect("equal", adjustable="datalim")
    for axis in axes[len(embeddings) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, markerscale=1.3
    )
    return figure
