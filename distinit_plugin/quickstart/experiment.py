"""The runs of the demonstration and their table: scratch, inflated and DistInit, over several fine-tuning seeds.

Every run is a YAML file of ``configs/quickstart`` through the real runner; this module only chooses seeds,
initialisations and learning rates.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distinit_plugin.config.load import load_cfg
from distinit_plugin.engine import checkpoint
from distinit_plugin.engine.checkpoint import write_atomically
from distinit_plugin.engine.curves import plot_curves
from distinit_plugin.engine.results import Row, markdown_table, terminal_table
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import RunResult, run
from distinit_plugin.quickstart.digits import DigitData, make_digits

CONFIGS = "configs/quickstart"
NETWORKS = {"r2plus1d": "R(2+1)D", "res3d": "Res3D"}
"""Names in files → in the table."""
RESULTS_JSON = "results.json"
RESULTS_MARKDOWN = "results.md"
CURVES = {"r2plus1d": "curves_r2plus1d.png", "res3d": "curves_res3d.png", "pretrain": "curves_pretrain.png"}
CHANCE = 0.05
"""Top-1 of guessing among the twenty classes."""


@dataclass(frozen=True)
class Variant:
    """One way to start a fine-tuning.

    Attributes:
        name: In the table.
        network: ``r2plus1d`` or ``res3d``: which ``finetune_*.yaml``.
        options: Overrides of the YAML.
        group: Variants of one group are one row of the table: the better one is shown.
    """

    name: str
    network: str
    options: tuple[str, ...]
    group: str


class Quickstart:
    """All runs below one folder. A run that is finished is not run again: its test alone is repeated."""

    def __init__(
        self,
        folder: str | Path,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        workers: int | None = None,
        say: Callable[[str], None],
    ) -> None:
        """Choose where and how often.

        Args:
            folder: Everything is written below it.
            say: Told what is done, one sentence at a time.
            seeds: Of the fine-tunings.
            workers: Decoding processes; ``None``: as in the YAML files.
        """
        self.folder = Path(folder)
        self._seeds = tuple(seeds)
        self._workers = workers
        self._say = say
        self._data: DigitData | None = None

    def run(self) -> list[Row]:
        """Do everything and return the rows of the table; files are written below the folder.

        Raises:
            UserError: The folder cannot be written, or holds another program's files.
        """
        begin = time.monotonic()
        self._say("encoding videos of digits in motion (H.264) and still digits")
        self._data = make_digits(self.folder / "data")
        teacher = self._train_teacher()
        for network in NETWORKS:
            self._pretrain(network, teacher)
        scores = {variant.name: self._finetune(variant) for variant in self._variants(teacher)}
        rows = self._rows(scores)
        self._write(rows, scores, time.monotonic() - begin)
        return rows

    # ------------------------------------------------------------------------------------------------------ runs
    def _train_teacher(self) -> Path:
        data = self._known_data()
        self._say("training the image teacher on still digits")
        result = self._run(
            "teacher",
            "teacher",
            {
                "CORPUS.TRAIN.STILLS.PATH": data.stills_train,
                "CORPUS.TEST.STILLS.PATH": data.stills_test,
            },
        )
        assert result.evaluation is not None
        self._say(f"  the teacher is right on {100 * result.evaluation.top_k(1):.1f} % of the test stills")
        return self._newest("teacher")

    def _pretrain(self, network: str, teacher: Path) -> None:
        self._say(f"DistInit: {network} learns from the teacher on unlabeled videos")
        name = f"pretrain_{network}"
        options = {
            "CORPUS.TRAIN.UNLABELED.PATH": self._known_data().unlabeled,
            "DISTILL.TEACHERS.DIGITS.WEIGHTS": teacher,
        }
        result = self._run(name, name, options)
        if result.training is not None and result.training.seconds > 1:
            share = 100 * result.training.wait_share
            self._say(
                f"  {result.training.steps} steps in {result.training.seconds:.0f} s, {share:.0f} % waiting for data"
            )

    def _variants(self, teacher: Path) -> list[Variant]:
        """Scratch at two learning rates, DistInit, and inflation where the network has a 2D counterpart."""
        variants = []
        for network, title in NETWORKS.items():
            base_lr = load_cfg(f"{CONFIGS}/finetune_{network}.yaml")[0].SOLVER.BASE_LR
            for factor in (1, 3) if network == "r2plus1d" else (1,):
                lr = base_lr * factor
                scratch = f"{title}, from scratch"
                variants.append(Variant(f"{scratch}, lr {lr:g}", network, ("SOLVER.BASE_LR", str(lr)), scratch))
            if network == "res3d":
                inflated = ("INIT.INFLATE_FROM", "Res2D", "INIT.INFLATE_WEIGHTS", str(teacher))
                variants.append(Variant(f"{title}, inflated", network, inflated, f"{title}, inflated"))
            start = ("TRAIN.CHECKPOINT_FILE_PATH", str(self._newest(f"pretrain_{network}")))
            variants.append(Variant(f"{title}, DistInit", network, start, f"{title}, DistInit"))
        return variants

    def _finetune(self, variant: Variant) -> list[float]:
        """Video top-1 of every seed."""
        data = self._known_data()
        self._say(f"fine-tuning {variant.name}, {len(self._seeds)} seeds")
        scores = []
        for seed in self._seeds:
            options: dict[str, object] = {
                "CORPUS.TRAIN.DIGITS.PATH": data.train,
                "CORPUS.TRAIN.DIGITS.CLASSES": data.class_names,
                "CORPUS.TEST.DIGITS.PATH": data.test,
                "CORPUS.TEST.DIGITS.CLASSES": data.class_names,
                "RNG_SEED": seed,
            }
            options.update(zip(variant.options[::2], variant.options[1::2], strict=True))
            result = self._run(f"finetune_{variant.network}", self._folder_of(variant, seed), options)
            assert result.evaluation is not None
            scores.append(result.evaluation.top_k(1))
        return scores

    @staticmethod
    def _folder_of(variant: Variant, seed: int) -> str:
        words = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in variant.name.lower())
        return f"{'_'.join(filter(None, words.split('_')))}_seed{seed}"

    def _run(self, config: str, name: str, options: Mapping[str, object]) -> RunResult:
        pairs = [word for key, value in options.items() for word in (key, str(value))]
        pairs += ["OUTPUT_DIR", str(self.folder / name), "CORPUS.INDEX_CACHE", str(self.folder / "frame_index")]
        if self._workers is not None:
            pairs += ["DATA_LOADER.NUM_WORKERS", str(self._workers)]
        cfg, _ = load_cfg(f"{CONFIGS}/{config}.yaml", pairs)
        # The run's own lines go to its stdout.log; here they would bury the story.
        return run(cfg, console=Console(file=io.StringIO()))

    def _newest(self, name: str) -> Path:
        path = checkpoint.newest_checkpoint(self.folder / name / checkpoint.FOLDER)
        if path is None:
            raise UserError(f"{self.folder / name} holds no checkpoint: remove that folder and start again.")
        return path

    def _known_data(self) -> DigitData:
        assert self._data is not None
        return self._data

    # --------------------------------------------------------------------------------------------------- results
    def _rows(self, scores: dict[str, list[float]]) -> list[Row]:
        """One row a group: the variant with the best mean."""
        best: dict[str, tuple[str, list[float]]] = {}
        for variant in self._variants(self._newest("teacher")):
            values = scores[variant.name]
            if variant.group not in best or sum(values) > sum(best[variant.group][1]):
                best[variant.group] = variant.name, values
        return [
            Row(
                name,
                {"top-1": values, **{f"seed {seed}": value for seed, value in zip(self._seeds, values, strict=True)}},
            )
            for name, values in best.values()
        ]

    def _write(self, rows: list[Row], scores: dict[str, list[float]], seconds: float) -> None:
        results: dict[str, Any] = {"top1": scores, "seeds": list(self._seeds), "seconds": round(seconds, 1)}
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(self.folder / RESULTS_JSON, lambda file: file.write(text.encode()))
        table = markdown_table(rows, first="test top-1, %")
        write_atomically(self.folder / RESULTS_MARKDOWN, lambda file: file.write(table.encode()))
        plot_curves(
            {name: self.folder / f"pretrain_{name}" for name in ("r2plus1d", "res3d")}, self.folder / CURVES["pretrain"]
        )
        for network in ("r2plus1d", "res3d"):
            runs = {
                variant.name: self.folder / self._folder_of(variant, self._seeds[0])
                for variant in self._variants(self._newest("teacher"))
                if variant.network == network
            }
            plot_curves(runs, self.folder / CURVES[network])


def run_quickstart(folder: str | Path, *, seeds: Sequence[int] = (0, 1, 2), workers: int | None = None) -> list[Row]:
    """Run the demonstration and print its table.

    Args:
        folder: Everything is written below it.
        seeds: Of the fine-tunings.
        workers: Decoding processes; ``None``: as in the YAML files.
    """
    console = Console()
    begin = time.monotonic()

    def say(sentence: str) -> None:
        console.print(f"[{time.monotonic() - begin:5.0f} s] {sentence}", markup=False, highlight=False)

    rows = Quickstart(folder, seeds=seeds, workers=workers, say=say).run()
    console.print(terminal_table(rows, title="Top-1 on test videos, %", first="initialisation"))
    console.print(
        f"Guessing gives {100 * CHANCE:.0f} %. Logs, checkpoints, curves and {RESULTS_MARKDOWN}: {folder}", markup=False
    )
    return rows
