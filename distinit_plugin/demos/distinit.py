"""The runs of the demonstration and their table: scratch, inflated and DistInit, over several fine-tuning seeds.

Every run is a YAML file of ``configs/quickstart`` through the real runner; this module only chooses seeds,
initialisations and learning rates, and runs as many at once as there are cores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from distinit_plugin.analysis.study_table import Study
from distinit_plugin.demos.digits import CLASS_NAMES, DigitData, make_digits
from distinit_plugin.demos.runs import RESULTS_MARKDOWN, Runs, Say, Task, by_seed, percents, storyteller
from distinit_plugin.engine.curves import plot_curves
from distinit_plugin.engine.results import Row, terminal_table
from distinit_plugin.jobs.report import REPORT_FILE

CONFIGS = "configs/quickstart"
NETWORKS = {"r2plus1d": "R(2+1)D", "res3d": "Res3D"}
"""Names in files → in the table."""

SCRATCH_LRS = (0.003, 0.006)
"""Learning rates from scratch, of which the better one is shown; the others train with the first, as in the YAML."""


@dataclass(frozen=True)
class Variant:
    """One way to start a fine-tuning.

    Attributes:
        name: In the results.
        network: Which ``finetune_*.yaml``.
        options: Overrides of the YAML.
        row: Variants of one row of the table: the best one is shown.
    """

    name: str
    network: str
    options: Mapping[str, object]
    row: str


class Quickstart:
    """All runs below one folder. A run that is finished is not trained again: only its test is repeated."""

    def __init__(
        self,
        folder: str | Path,
        *,
        say: Say,
        seeds: Sequence[int] = (0, 1, 2),
        processes: int = 0,
    ) -> None:
        """Choose where and how often.

        Args:
            folder: Everything is written below it.
            say: Told what is done, one sentence at a time.
            seeds: Of the fine-tunings.
            processes: Runs at once; 0: one per core.

        Raises:
            UserError: The folder cannot be written.
        """
        self.folder = Path(folder)
        self._say = say
        self._seeds = tuple(seeds)
        self._runs = Runs(self.folder, processes=processes)
        self._data: DigitData | None = None

    def run(self) -> list[Row]:
        """Do everything and return the rows of the table; files are written below the folder.

        Raises:
            UserError: The folder holds another program's files.
        """
        begin = time.monotonic()
        self._say("encoding videos of digits in motion (H.264) and still digits")
        self._data = make_digits(self.folder / "data")
        self._pretrain(self._train_teacher())
        variants = self._variants()
        scores = self._finetune(variants)
        rows = self._rows(variants, scores)
        self._write(rows, scores, time.monotonic() - begin)
        self._draw(variants)
        self._report(variants)
        return rows

    # ------------------------------------------------------------------------------------------------------ runs
    def _train_teacher(self) -> Path:
        data = self._known_data()
        self._say("training the image teacher on still digits")
        paths = {"CORPUS.TRAIN.STILLS.PATH": data.stills_train, "CORPUS.TEST.STILLS.PATH": data.stills_test}
        outcome = self._runs.alone(_task("teacher", "teacher", paths))
        assert outcome.top1 is not None
        self._say(f"  the teacher is right on {100 * outcome.top1:.1f} % of the test stills")
        return self._runs.newest("teacher")

    def _pretrain(self, teacher: Path) -> None:
        self._say(f"DistInit: {' and '.join(NETWORKS.values())} learn from the teacher on unlabeled videos")
        options = {
            "CORPUS.TRAIN.UNLABELED.PATH": self._known_data().unlabeled,
            "DISTILL.TEACHERS.DIGITS.WEIGHTS": teacher,
        }
        names = [f"pretrain_{network}" for network in NETWORKS]
        for name, outcome in zip(names, self._runs.all([_task(name, name, options) for name in names]), strict=True):
            self._say(f"  {name}: {outcome.steps} steps, {100 * outcome.wait_share:.0f} % of the time for decoding")

    def _variants(self) -> list[Variant]:
        """Scratch at two learning rates, DistInit, and inflation where the network has a 2D counterpart."""
        variants = []
        for network, title in NETWORKS.items():
            scratch = f"{title}, from scratch"
            for lr in SCRATCH_LRS:
                variants.append(Variant(f"{scratch}, lr {lr:g}", network, {"SOLVER.BASE_LR": lr}, scratch))
            if network == "res3d":
                inflated = {"INIT.INFLATE_FROM": "Res2D", "INIT.INFLATE_WEIGHTS": self._runs.newest("teacher")}
                variants.append(Variant(f"{title}, inflated", network, inflated, f"{title}, inflated"))
            start = {"TRAIN.CHECKPOINT_FILE_PATH": self._runs.newest(f"pretrain_{network}")}
            variants.append(Variant(f"{title}, DistInit", network, start, f"{title}, DistInit"))
        return variants

    def _finetune(self, variants: Sequence[Variant]) -> dict[str, list[float]]:
        """Video top-1 of every variant, one value a seed."""
        data = self._known_data()
        self._say(f"fine-tuning on labelled clips: {len(variants)} variants × {len(self._seeds)} seeds")
        corpora = {
            "CORPUS.TRAIN.DIGITS.PATH": data.train,
            "CORPUS.TRAIN.DIGITS.CLASSES": data.class_names,
            "CORPUS.TEST.DIGITS.PATH": data.test,
            "CORPUS.TEST.DIGITS.CLASSES": data.class_names,
        }
        tasks = [
            _task(
                f"finetune_{variant.network}",
                _folder_of(variant, seed),
                {**corpora, "RNG_SEED": seed, **variant.options},
            )
            for variant in variants
            for seed in self._seeds
        ]
        scores: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for number, outcome in enumerate(self._runs.all(tasks)):
            name = variants[number // len(self._seeds)].name
            assert outcome.top1 is not None
            scores[name].append(outcome.top1)
            if len(scores[name]) == len(self._seeds):
                self._say(f"  {name}: {percents(scores[name])}")
        return scores

    def _known_data(self) -> DigitData:
        assert self._data is not None
        return self._data

    # --------------------------------------------------------------------------------------------------- results
    def _rows(self, variants: Sequence[Variant], scores: Mapping[str, list[float]]) -> list[Row]:
        """The variant with the best mean of each row."""
        best: dict[str, str] = {}
        for variant in variants:
            if variant.row not in best or sum(scores[variant.name]) > sum(scores[best[variant.row]]):
                best[variant.row] = variant.name
        return [Row(name, {"top-1": scores[name], **by_seed(self._seeds, scores[name])}) for name in best.values()]

    def _write(self, rows: list[Row], scores: Mapping[str, list[float]], seconds: float) -> None:
        results = {"top1": dict(scores), "seeds": list(self._seeds), "seconds": round(seconds, 1)}
        self._runs.write(rows, results, first="test top-1, %")

    def _draw(self, variants: Sequence[Variant]) -> None:
        """Curves of the pre-trainings, and of the first seed of every fine-tuning."""
        pretrainings = {title: self.folder / f"pretrain_{network}" for network, title in NETWORKS.items()}
        plot_curves(pretrainings, self.folder / "curves_pretrain.png")
        for network in NETWORKS:
            runs = {
                variant.name: self.folder / _folder_of(variant, self._seeds[0])
                for variant in variants
                if variant.network == network
            }
            plot_curves(runs, self.folder / f"curves_finetune_{network}.png")

    def _report(self, variants: Sequence[Variant]) -> None:
        """One page about all runs."""
        self._say("writing the report")
        rows = {
            variant.name: {str(seed): self.folder / _folder_of(variant, seed) for seed in self._seeds}
            for variant in variants
        }
        others = [self.folder / name for name in ("teacher", *(f"pretrain_{network}" for network in NETWORKS))]
        self._runs.report(Study("fine-tuning on labelled clips", rows), others, "Quickstart: digits in motion")


def _folder_of(variant: Variant, seed: int) -> str:
    """``r2plus1d_from_scratch_lr_0.003_seed0``."""
    words = variant.name.replace(NETWORKS[variant.network], variant.network).replace(",", "").lower().split()
    return "_".join([*words, f"seed{seed}"])


def _task(config: str, name: str, options: Mapping[str, object]) -> Task:
    return Task(f"{CONFIGS}/{config}.yaml", name, options)


def run_quickstart(folder: str | Path, *, seeds: Sequence[int] = (0, 1, 2), processes: int = 0) -> list[Row]:
    """Run the demonstration and print its table.

    Args:
        folder: Everything is written below it.
        seeds: Of the fine-tunings.
        processes: Runs at once; 0: one per core.
    """
    console = Console()
    say = storyteller(console)
    rows = Quickstart(folder, say=say, seeds=seeds, processes=processes).run()
    console.print(terminal_table(rows, title="Top-1 on test videos, % (mean ± deviation)", first="initialisation"))
    say(f"guessing gives {100 / len(CLASS_NAMES):.0f} %; logs, checkpoints, curves, {RESULTS_MARKDOWN}: {folder}")
    say(f"report: {Path(folder) / REPORT_FILE}")
    return rows
