"""The classes of single videos, from a checkpoint that knows how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distinit_plugin import build
from distinit_plugin.engine.evaluate import evaluate
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.session import open_session
from distinit_plugin.jobs.testing import class_names_of
from distinit_plugin.jobs.trained import COMPUTING_KEYS, read_trained
from distinit_plugin.video.corpus import Corpus, Listing, Mixture

TEST_KEYS = ("TEST.BATCH_SIZE", "TEST.NUM_SPATIAL_CROPS")
"""Keys of the test that a user may set; the number of clips is an argument."""


@dataclass(frozen=True)
class Prediction:
    """The best classes of one video, most probable first.

    Attributes:
        path: The video.
        classes: (name, probability).
        reason: Why there is no prediction; ``None`` when there is one.
    """

    path: str
    classes: list[tuple[str, float]]
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.path}\n  cannot be read: {self.reason}"
        return "\n".join([self.path, *(f"  {100 * probability:5.1f} %  {name}" for name, probability in self.classes)])


def predict(
    paths: Sequence[str],
    *,
    checkpoint: str,
    class_file: str = "",
    top: int = 5,
    num_clips: int = 10,
    opts: Sequence[str] = (),
) -> list[Prediction]:
    """Classify videos with a fine-tuned checkpoint of this program, or a converted file.

    Args:
        paths: Video files.
        checkpoint: Holds weights, configuration and class names.
        class_file: Other class names, one per line.
        top: Classes of each answer.
        num_clips: Uniform clips of each video; their softmaxes are averaged.
        opts: ``KEY VALUE …`` of the keys in :mod:`.trained` or :data:`TEST_KEYS` instead of what the checkpoint says.

    Raises:
        UserError: The checkpoint has no classifier or configuration, or no video could be read.
    """
    trained = read_trained(checkpoint, opts, more_keys=(*TEST_KEYS, *COMPUTING_KEYS))
    if not trained.has_classifier:
        raise UserError(
            f"{checkpoint} has no classifier (a pre-training, or converted without one): fine-tune it on labelled "
            "videos first (TRAIN.CHECKPOINT_FILE_PATH)."
        )
    cfg = trained.cfg
    cfg.defrost()
    cfg.TEST.NUM_ENSEMBLE_VIEWS = num_clips
    cfg.CORPUS.TEST_CLIPS = "uniform"
    cfg.freeze()
    names = read_class_names(class_file, cfg.MODEL.NUM_CLASSES) if class_file else trained.class_names
    with open_session(cfg, log_to_folder=False) as session:
        network = trained.network()
        specs = dict(network.view_specs("test"))
        session.check_convolutions(network, specs)
        listing = Listing(root="", labeled=False)
        for path in paths:
            listing.add(path)
        videos = Mixture([Corpus("videos", listing)])
        named = build.view_specs(network, {}, "test")
        dataset = build.build_dataset(cfg, videos, named, "test", keep_index=False)
        loader = build.build_test_loader(cfg, dataset, num_crops=cfg.TEST.NUM_SPATIAL_CROPS)
        with session.read(loader, "test") as batches:
            evaluation = evaluate(
                session.place(network),
                batches,
                finish=session.finisher(specs),
                paths=list(paths),
                labels=[0] * len(paths),  # not read: only the scores are
                num_classes=cfg.MODEL.NUM_CLASSES,
                class_names=class_names_of(names, cfg.MODEL.NUM_CLASSES),
                autocast=session.precision.autocast,
            )
    reasons = dict(evaluation.bad)
    predictions = []
    for path, scores, clips in zip(evaluation.paths, evaluation.scores, evaluation.clips, strict=True):
        best = scores.argsort()[::-1][:top]
        classes = [(evaluation.class_names[number], float(scores[number])) for number in best] if clips else []
        predictions.append(Prediction(path, classes, None if clips else reasons.get(path, "no clip could be read")))
    return predictions


def read_class_names(class_file: str, num_classes: int) -> list[str]:
    """The names in a file, one per line.

    Raises:
        UserError: It cannot be read, or has not one name for each of a network's ``num_classes`` classes (ImageNet has
            two kinds of crane: a name may be there twice).
    """
    try:
        lines = Path(class_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes: {class_file} cannot be read ({error}); it must hold one class name per line."
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != num_classes:
        raise UserError(
            f"--classes: {class_file} has {len(names)} names, and the network {num_classes} classes; it must hold one "
            "class name per line, in the order of the outputs."
        )
    return names
