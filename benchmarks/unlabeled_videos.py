"""Does DistInit learn on a handful of real videos? Divergence from the teacher against the best constant answer.

    python benchmarks/unlabeled_videos.py VIDEOS SQUEEZENET.pth [KEY VALUE …]

Trains R2Plus1D-18 at 8×112² from scratch on a folder of unlabeled videos with an ImageNet SqueezeNet as teacher, then
compares, on fixed clips, the student's answer with the teacher's: KL divergence (cross-entropy minus the teacher's
entropy, nats), and how often the teacher's first class is among the student's first five. The constant answer that
minimises the same KL is the mean of the teacher's distributions. Results: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from distinit_plugin import build
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.evaluate import evaluation_mode
from distinit_plugin.errors import UserError
from distinit_plugin.jobs.running import run
from distinit_plugin.jobs.session import open_session
from distinit_plugin.jobs.training import build_trainer

TEACHER = "IMAGENET"
PROBE_CLIPS = 3  # of each video


def configuration(videos: str, teacher: str, options: list[str]) -> CfgNode:
    """The job of this benchmark; ``options`` override it."""
    pairs: dict[str, object] = {
        "OUTPUT_DIR": "runs/unlabeled_videos",
        "CORPUS.TRAIN": None,
        "CORPUS.TRAIN.VIDEOS.PATH": videos,
        "CORPUS.MAX_BAD_FRACTION": 0.2,
        f"DISTILL.TEACHERS.{TEACHER}.ARCH": "torchvision/squeezenet1_0",
        f"DISTILL.TEACHERS.{TEACHER}.WEIGHTS": teacher,
        "NUM_GPUS": 0,
        "TRAIN.BATCH_SIZE": 16,
        "RUNNER.ACCUMULATE": 1,
        "DATA_LOADER.NUM_WORKERS": 1,
        "LOG_PERIOD": 4,
        # One epoch: BN statistics are recomputed at the end of each.
        "RUNNER.CLIPS_PER_EPOCH": 576,
        "RUNNER.SCHEDULE_UNIT": "step",
        "SOLVER.MAX_EPOCH": 36,
        "SOLVER.OPTIMIZING_METHOD": "sgd",
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.LR_POLICY": "cosine",
        "SOLVER.WARMUP_EPOCHS": 4,
        "SOLVER.WARMUP_START_LR": 0.02,
        "TEST.NUM_ENSEMBLE_VIEWS": PROBE_CLIPS,
        # So few steps leave the running averages of batch norm far behind the weights.
        "BN.USE_PRECISE_STATS": True,
        "BN.NUM_BATCHES_PRECISE": 6,
    }
    base = "configs/DistInit/table1_r2plus1d18_distinit_pretrain.yaml"
    return load_cfg(base, [word for pair in pairs.items() for word in pair] + options)[0]


def probe(cfg: CfgNode, *, trained: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,K) of the student and of the teacher on the fixed clips, float64.

    Args:
        cfg: The job.
        trained: Take the weights of the run's newest checkpoint; else those it started from.
    """
    with open_session(cfg, log_to_folder=False) as session:
        objective = build_trainer(session, saves=trained).state.objective
        networks = {"student": objective.trainable.student, **objective.teachers}
        specs = build.view_specs(networks.pop("student"), networks, "test")  # type: ignore[arg-type]
        dataset = build.build_dataset(cfg, build.build_corpora(cfg, "train"), specs, "test")
        finish = session.finisher(specs)
        students, teachers = [], []
        with evaluation_mode(objective.trainable):
            for batch in build.build_test_loader(cfg, dataset):
                if not batch["keys"]:
                    continue
                views = finish(batch)
                of = {name.split("/")[0]: {"rgb": view} for name, view in views.items()}
                students.append(objective.trainable(of["student"])[1][TEACHER])
                teachers.append(objective.teachers[TEACHER](of[TEACHER]).logits)
    return (torch.cat(students).double().log_softmax(1), torch.cat(teachers).double().log_softmax(1))


def compare(answer: Tensor, teacher: Tensor) -> tuple[float, float]:
    """Mean KL(teacher ‖ answer), nats, and the fraction of clips whose teacher's class is in the answer's top five."""
    divergence = (teacher.exp() * (teacher - answer)).sum(1).mean()
    agreement = (answer.topk(5, dim=1).indices == teacher.argmax(1, keepdim=True)).any(1).double().mean()
    return float(divergence), float(agreement)


def main() -> int:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("teacher", help="torchvision squeezenet1_0 state dict")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    arguments = parser.parse_args()
    try:
        cfg = configuration(arguments.videos, arguments.teacher, arguments.options)
        before, teacher = probe(cfg, trained=False)
        begin = time.perf_counter()
        run(cfg)
        seconds = time.perf_counter() - begin
        after, teacher = probe(cfg, trained=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    constant = teacher.exp().mean(0, keepdim=True).log().expand_as(teacher)
    print(f"{len(teacher)} clips; trained in {seconds:.0f} s; torch {torch.__version__}")
    print(f"{'':24}{'KL, nats':>10}{'top-5 agreement':>18}")
    for name, answer in (("random student", before), ("best constant answer", constant), ("DistInit", after)):
        divergence, agreement = compare(answer, teacher)
        print(f"{name:24}{divergence:10.3f}{100 * agreement:16.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
