"""The demonstration of D3D (arXiv 1812.08249) and its tables: what motion can be learned from few labelled videos?

The flow stream, the RGB S3D-G and students of D3D train on the same labelled videos for the same number of steps. Every
run is a YAML file of ``configs/demo_d3d`` through the real runner; this module only chooses seeds, paths and teachers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from distinit_plugin.analysis.study_table import Study
from distinit_plugin.config.load import load_cfg
from distinit_plugin.demos.motion_rows import PLOT, Errors, Probe, draw_errors, error_rows, run_probe
from distinit_plugin.demos.motions import (
    CLASS_NAMES,
    NUM_MORE,
    NUM_TEST,
    NUM_TRAIN,
    MotionData,
    draw_classes,
    make_motions,
)
from distinit_plugin.demos.runs import (
    RESULTS_MARKDOWN,
    Outcome,
    Runs,
    Say,
    Task,
    by_seed,
    pairs_of,
    percents,
    run_task,
    storyteller,
)
from distinit_plugin.engine.curves import plot_curves
from distinit_plugin.engine.ensemble import combine_scores, read_scores
from distinit_plugin.engine.evaluate import SCORES_FILE
from distinit_plugin.engine.motion_report import MotionCurve
from distinit_plugin.engine.results import Row, Value, differences, paired_text, terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.corpus_check import read_corpus
from distinit_plugin.jobs.flow_extraction import extract_flow, make_settings
from distinit_plugin.jobs.report import REPORT_FILE
from distinit_plugin.jobs.testing import RESULTS_FOLDER

CONFIGS = "configs/demo_d3d"
FLOW_FOLDER = "flow"
CLASSES = "classes.png"


@dataclass(frozen=True)
class Variant:
    """One row of the table, trained once a seed.

    Attributes:
        name: In the table.
        config: Its YAML file, and the beginning of its folders' names.
        sees: What the network is fed in the test.
        labeled: Whether it trains on the labelled videos; otherwise on these and more, all without labels.
        teachers: Node below DISTILL.TEACHERS → the variant that is that teacher, see ``DemoD3D._partner``.
    """

    name: str
    config: str
    sees: str = "RGB"
    labeled: bool = True
    teachers: Mapping[str, Variant] = field(default_factory=dict)


FLOW_STREAM = Variant("flow stream", "flow", "flow")
RGB_STREAM = Variant("S3D-G", "rgb")
D3D = Variant("D3D", "d3d", teachers={"FLOW": FLOW_STREAM})
STREAMS = (FLOW_STREAM, RGB_STREAM)
STUDENTS = (
    D3D,
    Variant("soft targets on more videos", "d3d_more_videos", labeled=False, teachers={"FLOW": FLOW_STREAM}),
)
CONTROLS = (
    Variant("D3D, without action loss", "d3d_no_action", teachers={"FLOW": FLOW_STREAM}),
    Variant("D3D, from the RGB stream", "d3d_spatial", teachers={"SPATIAL": RGB_STREAM}),
)
"""With them the demonstration takes longer than 20 minutes."""


@dataclass(frozen=True)
class Mixture:
    """A row of the table that averages the probabilities of two runs.

    Attributes:
        name: In the table.
        first: Of each seed.
        second: Of the same seed; when it is ``first``, of the next one.
        sees: As in ``Variant``.
    """

    name: str
    first: Variant
    second: Variant
    sees: str = "RGB"


MIXTURES = (
    Mixture("D3D + S3D-G", D3D, RGB_STREAM),
    Mixture("S3D-G + S3D-G, the next seed", RGB_STREAM, RGB_STREAM),
    Mixture("two-stream: flow stream + S3D-G", FLOW_STREAM, RGB_STREAM, "RGB + flow"),
)

Scores = dict[str, list[float]]
"""Row → test top-1 of each seed."""


class DemoD3D:
    """All runs below one folder. A run that is finished is not trained again: only its test is repeated."""

    def __init__(
        self,
        folder: str | Path,
        *,
        say: Say,
        seeds: Sequence[int] = (0, 1, 2),
        processes: int = 0,
        num_train: int = NUM_TRAIN,
        num_test: int = NUM_TEST,
        num_more: int = NUM_MORE,
        students: Sequence[Variant] = STUDENTS,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """Choose where and how often.

        Args:
            folder: Everything is written below it.
            say: Told what is done, one sentence at a time.
            seeds: Of the trainings.
            processes: Runs at once; 0: one per core.
            num_train: Labelled training videos.
            num_test: Test videos.
            num_more: Videos without labels, beside those of the training.
            students: What is trained beside the streams; the first one is D3D.
            options: Keys of all runs, over those of the YAML files.

        Raises:
            UserError: The folder cannot be written, or a seed is named twice.
        """
        if len(set(seeds)) < len(seeds):
            raise UserError(f"--seeds: {' '.join(map(str, seeds))} names a seed twice. Name each one once.")
        self.folder = Path(folder)
        self._say = say
        self._seeds = tuple(seeds)
        self._runs = Runs(self.folder, processes=processes)
        self._students = tuple(students)
        self._num_train, self._num_test, self._num_more = num_train, num_test, num_more
        self._options = dict(options or {})
        self.errors: Errors = {}

    def run(self) -> list[Row]:
        """Do everything and return the rows of the table; files are written below the folder.

        Raises:
            UserError: The folder holds another program's files.
        """
        begin = time.monotonic()
        self._say("encoding videos of digits in motion (H.264), each forwards and backwards")
        data = make_motions(
            self.folder / "data", num_train=self._num_train, num_test=self._num_test, num_more=self._num_more
        )
        self._extract(data)
        draw_classes(data, self.folder / FLOW_FOLDER, self.folder / CLASSES)
        scores: Scores = {}
        self._say(f"the two streams, {len(self._seeds)} seeds each")
        self._train(STREAMS, data, scores)
        self._say(f"students of D3D: {len(self._students)} variants × {len(self._seeds)} seeds")
        self._say("with them, decoders of flow from layers of the frozen networks of the first seed")
        d3d, *others = self._students
        curves = self._train([d3d], data, scores, self._probe(RGB_STREAM, data, FLOW_STREAM))
        curves += self._train(others, data, scores, self._probe(d3d, data))
        self._combine(scores)
        rows = self._rows(scores)
        self._draw()
        self.errors = draw_errors(curves, self.folder)
        results = {
            "top1": scores,
            "minus S3D-G": {name: differences(scores[name], scores[RGB_STREAM.name]) for name in scores},
            "end-point error": self.errors,
            "seeds": list(self._seeds),
            "seconds": round(time.monotonic() - begin, 1),
        }
        self._runs.write(rows, results, first="test top-1, %")
        self._report()
        return rows

    # ------------------------------------------------------------------------------------------------------ runs
    def _extract(self, data: MotionData) -> None:
        """The flow of all videos, made as the flow stream's YAML file says."""
        cfg, _ = load_cfg(f"{CONFIGS}/{FLOW_STREAM.config}.yaml", pairs_of(self._options), check=False)
        self._say(f"optical flow of the videos: {cfg.FLOW.BACKEND}")
        settings = make_settings(cfg.FLOW.BACKEND, {}, bound=cfg.FLOW.BOUND, rounding=cfg.FLOW.ROUNDING, size="native")
        corpus = read_corpus(str(data.folder), fmt="folder")
        result = extract_flow(
            corpus,
            self.folder / FLOW_FOLDER,
            settings,
            backend=cfg.FLOW.BACKEND,
            num_workers=self._runs.processes,
        )
        for path, reason in result.bad:
            raise UserError(f"the flow of {path} cannot be computed: {reason}.")

    def _train(
        self, variants: Sequence[Variant], data: MotionData, scores: Scores, probe: Probe | None = None
    ) -> list[MotionCurve]:
        """Train and test every variant with every seed, and a probe beside them, whose curves are returned."""
        items: list[Task | Probe] = [self.task(variant, seed, data) for variant in variants for seed in self._seeds]
        if probe is not None:
            items.append(probe)
        curves: list[MotionCurve] = []
        for number, outcome in enumerate(self._runs.spread(_work, items)):
            if not isinstance(outcome, Outcome):
                curves += outcome
                continue
            name = variants[number // len(self._seeds)].name
            assert outcome.top1 is not None
            found = scores.setdefault(name, [])
            found.append(outcome.top1)
            if len(found) == len(self._seeds):
                self._say(f"  {name}: {percents(found)}")
        return curves

    def task(self, variant: Variant, seed: int, data: MotionData) -> Task:
        """One run; its teachers must be finished."""
        weights = {
            f"DISTILL.TEACHERS.{node}.WEIGHTS": self._runs.newest(
                folder_of(teacher, self._partner(variant, teacher, seed))
            )
            for node, teacher in variant.teachers.items()
        }
        options = {**self._paths(data, variant.labeled), **weights, "RNG_SEED": seed}
        return Task(f"{CONFIGS}/{variant.config}.yaml", folder_of(variant, seed), options)

    def _partner(self, one: Variant, other: Variant, seed: int) -> int:
        """The seed of another run that serves a run: the next one where both see the same, or they would be one."""
        if one.sees != other.sees:
            return seed
        return self._seeds[(self._seeds.index(seed) + 1) % len(self._seeds)]

    def _paths(self, data: MotionData, labeled: bool = True) -> dict[str, object]:
        names = {"CORPUS.TRAIN.MOTIONS.CLASSES": data.class_names} if labeled else {}
        return {
            "CORPUS.TRAIN.MOTIONS.PATH": data.train if labeled else data.unlabeled,
            **names,
            "CORPUS.TEST.MOTIONS.PATH": data.test,
            "CORPUS.TEST.MOTIONS.CLASSES": data.class_names,
            "FLOW.STORE": self.folder / FLOW_FOLDER,
            **self._options,
        }

    def _probe(self, variant: Variant, data: MotionData, flow: Variant | None = None) -> Probe:
        """What probes the first seed's network of a variant, and a flow stream beside it; both must be finished."""
        seed = self._seeds[0]
        weights = self._runs.newest(folder_of(variant, seed))
        stream = None if flow is None else self._runs.newest(folder_of(flow, seed))
        options = {**self._paths(data), "RNG_SEED": seed}
        return Probe(variant.name, f"probe_{variant.config}", weights, options, stream)

    # --------------------------------------------------------------------------------------------------- results
    def _combine(self, scores: Scores) -> None:
        """Rows of averaged probabilities."""
        for mixture in MIXTURES:
            found = []
            for seed in self._seeds:
                same = mixture.second is mixture.first
                other = self._partner(mixture.first, mixture.second, seed) if same else seed
                folders = (folder_of(mixture.first, seed), folder_of(mixture.second, other))
                if folders[0] == folders[1]:  # one seed has no next one
                    continue
                files = [self.folder / name / RESULTS_FOLDER / SCORES_FILE for name in folders]
                runs = [read_scores(file, "probs") for file in files]
                found.append(combine_scores(runs, [1.0, 1.0]).together[0])
            if found:
                scores[mixture.name] = found
                self._say(f"  {mixture.name}: {percents(found)}")

    def _rows(self, scores: Scores) -> list[Row]:
        first, *others = self._students
        order: list[Variant | Mixture] = [RGB_STREAM, FLOW_STREAM, first, *MIXTURES, *others]
        base = scores[RGB_STREAM.name]
        rows = []
        for entry in order:
            if entry.name in scores:
                found = scores[entry.name]
                gain = "" if entry is RGB_STREAM else paired_text(differences(found, base))
                values: dict[str, Value] = {
                    "sees": entry.sees,
                    "top-1": found,
                    "− S3D-G": gain,
                    **by_seed(self._seeds, found),
                }
                rows.append(Row(entry.name, values))
        return rows

    def _draw(self) -> None:
        """Curves of the first seed."""
        variants = (*STREAMS, *self._students)
        runs = {variant.name: self.folder / folder_of(variant, self._seeds[0]) for variant in variants}
        plot_curves(runs, self.folder / "curves.png")

    def _report(self) -> None:
        """One page about all runs."""
        self._say("writing the report")
        rows = {
            variant.name: {str(seed): self.folder / folder_of(variant, seed) for seed in self._seeds}
            for variant in (RGB_STREAM, FLOW_STREAM, *self._students)
        }
        study = Study("networks that see RGB or flow", rows, baseline=RGB_STREAM.name)
        pictures = {
            "Frames of a test video of each class, and their flow": self.folder / CLASSES,
            "End-point error of flow decoded from layers of the networks of the first seed": self.folder / PLOT,
        }
        self._runs.report(study, [], "D3D: labels that only motion tells", pictures)


def _work(item: Task | Probe, folder: Path, options: Mapping[str, object]) -> Outcome | list[MotionCurve]:
    """One training or one probe in this process."""
    return run_probe(item, folder, options) if isinstance(item, Probe) else run_task(item, folder, options)


def folder_of(variant: Variant, seed: int) -> str:
    """``d3d_no_action_seed0``."""
    return f"{variant.config}_seed{seed}"


def run_demo_d3d(
    folder: str | Path, *, seeds: Sequence[int] = (0, 1, 2), processes: int = 0, controls: bool = False
) -> list[Row]:
    """Run the demonstration and print its tables.

    Args:
        folder: Everything is written below it.
        seeds: Of the trainings.
        processes: Runs at once; 0: one per core.
        controls: Also train ``CONTROLS``.
    """
    console = Console()
    say = storyteller(console)
    students = (*STUDENTS, *CONTROLS) if controls else STUDENTS
    demo = DemoD3D(folder, say=say, seeds=seeds, processes=processes, students=students)
    rows = demo.run()
    title = "Top-1 on test videos, % (mean ± deviation; differences: mean ± standard error over seeds)"
    console.print(terminal_table(rows, title=title, first="network"))
    console.print(
        terminal_table(
            error_rows(demo.errors), title="End-point error of flow decoded from layers, pixels", first="features"
        )
    )
    say(f"guessing gives {100 / len(CLASS_NAMES):.1f} %; logs, checkpoints, pictures, {RESULTS_MARKDOWN}: {folder}")
    say(f"report: {Path(folder) / REPORT_FILE}")
    return rows
