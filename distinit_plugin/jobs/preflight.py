"""Everything that a job was given is looked at before its first step, and all that is wrong is told at once.

Lists are read (and kept for the job), a few videos opened, networks built without memory (on torch's ``meta`` device),
weights compared with them. Steps that need a key which is wrong already are left out, so that one mistake is one
sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from distinit_plugin import build
from distinit_plugin.config.defaults import get_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.config.paths import path_problems
from distinit_plugin.config.validate import problems_of, touches
from distinit_plugin.config.validate_keyframes import KEYFRAME_KEYS
from distinit_plugin.detection.keyframes import Keyframes
from distinit_plugin.errors import ConfigError, Problems, UserError, VideoError
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.jobs.session import choose_device
from distinit_plugin.jobs.tensorboard import import_tensorboard
from distinit_plugin.jobs.testing import check_same_classes, saved_class_names, weights_to_test
from distinit_plugin.types import Network, Split
from distinit_plugin.video.corpus import Corpus, Mixture
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.source import FrameSource
from distinit_plugin.weights import load_weights

SAMPLED_VIDEOS = 20
"""Videos of a corpus of which at least one must open."""

CLIP_KEYS = (
    "DATA.NUM_FRAMES",
    "DATA.SAMPLING_RATE",
    "DATA.MEAN",
    "DATA.STD",
    "DATA.TRAIN_CROP_SIZE",
    "DATA.TEST_CROP_SIZE",
    "CORPUS.TARGET_FPS",
    "CORPUS.TEST_NUM_FRAMES",
)
STUDENT_KEYS = ("MODEL.", "RESNET.", "NETWORK.", "ACTION.", "DETECTION.", "ROI.", *CLIP_KEYS)
LABEL_KEYS = ("MODEL.NUM_CLASSES", "ACTION.")


def check_job(cfg: CfgNode, corpora: Corpora) -> None:
    """Look at all that a job was given.

    Args:
        cfg: The configuration.
        corpora: Of this configuration; keeps the lists that are read here.

    Raises:
        ConfigError: Everything that is wrong, one sentence each.
    """
    problems = problems_of(cfg)
    problems += job_problems(cfg, corpora, {problem.partition(":")[0] for problem in problems})
    if problems:
        raise ConfigError(problems)


def job_problems(cfg: CfgNode, corpora: Corpora, wrong: Collection[str] = ()) -> list[str]:
    """What is wrong with the machine, files, videos and weights that a configuration names.

    Args:
        cfg: The configuration.
        corpora: Of this configuration; keeps the lists that are read here.
        wrong: (Starts of) keys that are known to be wrong already; nothing that depends on them is looked at.
    """
    paths = list(path_problems(cfg))
    check = _Check(cfg, corpora, {*wrong, *(path.partition(":")[0] for path in paths)})
    with _quiet_and_single_threaded():
        check.machine()
        check.videos()
        check.networks()
        check.test()
    return [*paths, *check.problems]


class _Check:
    """The steps; ``problems`` fills up."""

    def __init__(self, cfg: CfgNode, corpora: Corpora, wrong: set[str]) -> None:
        self.problems = Problems()
        self._cfg = cfg
        self._corpora = corpora
        self._wrong = wrong
        self._videos: dict[Split, Mixture] = {}
        self._tests = cfg.TEST.ENABLE and build.needs_own_logits(cfg) and build.has_corpus(cfg, "test")

    def _are_right(self, *needs: str) -> bool:
        return not touches(self._wrong, needs)

    # -------------------------------------------------------------------------------------------------- machine
    def machine(self) -> None:
        """The devices and packages that are asked for."""
        if self._are_right("NUM_GPUS", "NUM_SHARDS", "SHARD_ID"):
            with self.problems.collect():
                choose_device(self._cfg)
        if self._are_right("TENSORBOARD.") and self._cfg.TENSORBOARD.ENABLE:
            with self.problems.collect():
                import_tensorboard()

    # --------------------------------------------------------------------------------------------------- videos
    def videos(self) -> None:
        """The lists of all uses, their labels and classes, and whether there is any video behind them."""
        cfg = self._cfg
        if cfg.DETECTION.ENABLE:
            self._keyframes()
            return
        known: list[str] = []
        if cfg.TRAIN.ENABLE:
            videos = self._read("train", labels=None if cfg.ACTION.LOSS_WEIGHT > 0 else False)
            known = (videos.class_names or []) if videos is not None else []
            if videos is not None and self._are_right("RUNNER.CLIPS_PER_EPOCH", "TRAIN.BATCH_SIZE", "NUM_SHARDS"):
                with self.problems.collect():
                    build.build_train_sampler(cfg, videos)
            if build.has_corpus(cfg, "val"):
                active = any(entry.LOSS_WEIGHT > 0 for entry in cfg.DISTILL.TEACHERS.values())
                scores = build.needs_own_logits(cfg) and not active
                self._read("val", labels=True if scores else None if cfg.ACTION.LOSS_WEIGHT > 0 else False, known=known)
        if self._tests:
            trained = cfg.TRAIN.ENABLE and not cfg.TEST.CHECKPOINT_FILE_PATH
            self._read("test", labels=True, known=known if trained else self._classes_of_checkpoint())

    def _read(self, split: Split, *, labels: bool | None, known: Collection[str] = ()) -> Mixture | None:
        """One use. ``labels``: True: taken whatever LABELED says; None: as it says; False: not looked at."""
        use = f"CORPUS.{build.CORPUS_KEYS[split]}"
        if not self._are_right(use, "CORPUS.SPLIT", "DATA.PATH_"):
            return None
        videos: Mixture | None = None
        with self.problems.collect(f"{use}: "):
            found = self._corpora.peek(split, labeled=labels or None)
            assert isinstance(found, Mixture)
            videos = found
        if videos is None:
            return None
        if split != "test":
            self._videos[split] = videos
        with self.problems.collect(f"{use}: "):
            for corpus in videos.corpora:
                _open_one(
                    f"Corpus '{corpus.name}': none of {{}} videos spread over its {{}}",
                    len(corpus),
                    partial(self._open_video, corpus),
                    "Correct the paths (PATH, ROOT, or DATA.PATH_PREFIX), or see what is wrong with the files: "
                    "distinit check-corpus.",
                )
        if labels is not False and self._are_right(*LABEL_KEYS):
            with self.problems.collect(f"{use}: "):
                videos.check_labels(self._cfg.MODEL.NUM_CLASSES)
            with self.problems.collect():
                check_same_classes(list(known), videos.class_names or [], split)
        return videos

    def _keyframes(self) -> None:
        """Annotations and boxes of all uses, whether actions fit, and whether there are pictures."""
        cfg = self._cfg
        if not self._are_right(*KEYFRAME_KEYS, "ROI.PROPOSALS", "MODEL.NUM_CLASSES"):
            return
        wanted: dict[Split, bool] = {"train": cfg.TRAIN.ENABLE, "val": cfg.TRAIN.ENABLE, "test": cfg.TEST.ENABLE}
        found = Problems()
        for use in (use for use, asked in wanted.items() if asked):
            with found.collect():
                keyframes = self._corpora.peek(use)
                assert isinstance(keyframes, Keyframes)
                keyframes.check_labels(cfg.MODEL.NUM_CLASSES)
                if use == "train":
                    build.build_train_sampler(cfg, keyframes)
                _open_one(
                    f"{keyframes.name}: none of the videos of {{}} keyframes spread over its {{}}",
                    len(keyframes),
                    partial(self._open_keyframe, keyframes),
                    "Correct KEYFRAMES.VIDEO_DIR (or AVA.FRAME_DIR and AVA.FRAME_LIST_DIR), or see what is wrong: "
                    "distinit check-ava.",
                )
        self.problems += dict.fromkeys(found)  # validation and test read the same files

    def _open_video(self, corpus: Corpus, place: int) -> FrameSource:
        return open_video(corpus[place].path, timeout=self._cfg.CORPUS.DECODE_TIMEOUT)

    def _open_keyframe(self, keyframes: Keyframes, place: int) -> FrameSource:
        moment = keyframes.moment(place)
        timeout = self._cfg.CORPUS.DECODE_TIMEOUT
        return keyframes.sources.open(moment.video, moment.second, cache=None, timeout=timeout)

    def _classes_of_checkpoint(self) -> list[str]:
        if not self._are_right("TEST.CHECKPOINT_FILE_PATH", "TRAIN.CHECKPOINT_FILE_PATH", "OUTPUT_DIR"):
            return []
        try:
            return saved_class_names(weights_to_test(self._cfg))
        except UserError:  # told by ``test``
            return []

    # ------------------------------------------------------------------------------------------------- networks
    def networks(self) -> None:
        """Student, weights to start from, teachers, and whether they fit together."""
        cfg = self._cfg
        if not cfg.TRAIN.ENABLE:
            return
        student = self._build(lambda: build.build_network(cfg)) if self._are_right(*STUDENT_KEYS) else None
        if student is not None and self._are_right("INIT.", "TRAIN.CHECKPOINT_FILE_PATH"):
            with self.problems.collect():
                build.initialize_network(cfg, student)
        teachers: dict[str, Network] = {}
        active = {name: entry for name, entry in sorted(cfg.DISTILL.TEACHERS.items()) if entry.LOSS_WEIGHT > 0}
        clip = build.input_spec(cfg if self._are_right(*CLIP_KEYS) else get_cfg())  # no teacher depends on it
        for name in active:
            if self._are_right(f"DISTILL.TEACHERS.{name}."):
                teacher = self._build(partial(build.build_teacher, cfg, name, clip))
                if teacher is not None:
                    teachers[name] = teacher
        if student is None or not self._are_right("DISTILL.") or (active and not teachers):
            return
        # Each teacher is asked alone, so that its name stands before what is wrong and all of them are told.
        for name, teacher in teachers.items() or [("", None)]:
            with torch.device("meta"), self.problems.collect(f"DISTILL.TEACHERS.{name}: " if name else ""):
                build.build_objective(cfg, student, {} if teacher is None else {name: teacher})
        if teachers.keys() == active.keys() and self._are_right("DATA.", "FLOW.", "CORPUS."):
            self._targets(student)

    def _targets(self, student: Network) -> None:
        """Cached targets: those of this job's teachers and videos."""
        for split, videos in self._videos.items():
            clip = next(iter(student.view_specs(split).values()))
            for name in (name for name, entry in self._cfg.DISTILL.TEACHERS.items() if entry.CACHE):
                with self.problems.collect():
                    build.build_targets(self._cfg, videos, split, clip, only=name)

    def _build(self, build_one: Callable[[], Network]) -> Network | None:
        """A network without memory; ``None`` when something is wrong with it, or when it cannot be had so."""
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), self.problems.collect():
                return build_one()
        except (NotImplementedError, RuntimeError):
            # A registered network whose constructor computes with values: the job itself will say what is wrong.
            return None
        return None

    # ----------------------------------------------------------------------------------------------------- test
    def test(self) -> None:
        """The weights that will be tested, where they exist already."""
        cfg = self._cfg
        needs = (*STUDENT_KEYS, "TEST.CHECKPOINT_FILE_PATH", "TRAIN.CHECKPOINT_FILE_PATH", "OUTPUT_DIR")
        if not self._tests or not self._are_right(*needs) or (cfg.TRAIN.ENABLE and not cfg.TEST.CHECKPOINT_FILE_PATH):
            return
        network = self._build(lambda: build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES))
        if network is not None:
            with self.problems.collect("TEST.CHECKPOINT_FILE_PATH: " if cfg.TEST.CHECKPOINT_FILE_PATH else ""):
                load_weights(network, weights_to_test(cfg), strict=True)


def _open_one(what: str, count: int, open_place: Callable[[int], FrameSource], fix: str) -> None:
    """Open some of ``count`` videos, spread over all, until one opens: lists with a wrong root are common.

    Raises:
        UserError: None of them opens; ``what`` they are and the ``fix`` stand in the text.
    """
    places = np.unique(np.linspace(0, count - 1, SAMPLED_VIDEOS).round().astype(int))
    reasons = []
    for place in map(int, places):
        try:
            open_place(place).close()
            return
        except VideoError as error:
            reasons.append(f"{error}")
    raise UserError(
        f"{what.format(len(reasons), count)} can be opened "
        f"({'; '.join(reasons[:2])}{'; …' if len(reasons) > 2 else ''}). {fix}"
    )


@contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    """No log lines, which the job itself will write; and no threads that would miss how the job sets denormals up."""
    package = logging.getLogger("distinit_plugin")
    level, threads = package.level, torch.get_num_threads()
    package.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        package.setLevel(level)
        torch.set_num_threads(threads)
