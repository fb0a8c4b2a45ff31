"""Several ranks compute what one does: gradients, parameters, accuracies."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_jobs import fill, image_entry, job, write_world
from flows import contents
from rank_jobs import CASES, evaluate_all, exact_gradients, ranks_cfg, step_gradient, train_all
from rank_processes import forked_ranks
from small_jobs import brightness_teacher, labelled, small_cfg, weights_of, write_teacher
from torch import nn
from torch.nn import functional as F

from distinit_plugin.engine import distributed
from distinit_plugin.engine.optim import build_optimizer
from distinit_plugin.engine.precise_bn import update_bn_statistics
from distinit_plugin.jobs.launching import launch
from distinit_plugin.jobs.running import run


# ------------------------------------------------------------------------------------------------------------ gradients
@pytest.fixture(scope="module")
def on_two_ranks() -> dict:
    with forked_ranks():
        return launch(ranks_cfg(2), exact_gradients)


def difference(one: dict, other: dict) -> float:
    """‖a − b‖ / ‖a‖ over all parameters together."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([tensors[name].flatten() for name in one]) for tensors in (one, other))
    return float((first - second).norm() / first.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_have_the_gradient_of_one_on_the_joined_batch(case, on_two_ranks):
    """Two teachers with a gate each, float64, frozen batch norm; the tolerance asked for is 1e-5."""
    gate, mean, _, order = case
    alone = step_gradient(gate, mean, 1, order)
    assert all(torch.isfinite(gradient).all() for gradient in alone.values())
    assert difference(alone, on_two_ranks[case]) < 1e-9


@pytest.mark.parametrize("order", ["mixed", "one rank keeps none"])
def test_the_mean_of_the_ranks_own_means_would_be_wrong(order, on_two_ranks):
    """The negative control: ranks keep different numbers of clips."""
    assert difference(step_gradient("weight", "kept", 1, order), on_two_ranks["naive", "kept", order]) > 1e-2


# ------------------------------------------------------------------------------------- whole trainings: live batch norm
def all_equal(ranks: list[dict]) -> bool:
    return all(
        one.keys() == ranks[0].keys() and all(torch.equal(one[name], ranks[0][name]) for name in one) for one in ranks
    )


@pytest.fixture(scope="module")
def trainings(videos, tmp_path_factory) -> tuple[Path, dict]:
    """Two trainings on two ranks: the folder above theirs, and what the ranks hold."""
    folder = tmp_path_factory.mktemp("trainings")
    entry = brightness_teacher(
        write_teacher(folder / "teacher.pth"), LAYER="feature_map", STUDENT_LAYER="layer2", LOSS="mse"
    )
    cfgs = {
        "labels": small_cfg(videos, folder / "labels", **labelled(videos, TRAIN="train", VAL="test")),
        "tap": small_cfg(videos, folder / "tap", DISTILL={"TEACHERS": {"IMAGENET": entry}}),
    }
    with forked_ranks():
        return folder, launch(ranks_cfg(2), partial(train_all, cfgs))


def test_live_batch_norm_leaves_all_ranks_equal(trainings):
    folder, found = trainings[0], trainings[1]["labels"]
    assert len(found["parameters"]) == len(found["buffers"]) == 2
    assert all_equal(found["parameters"])
    assert all_equal(found["buffers"])
    saved, held = weights_of(folder / "labels"), {**found["parameters"][1], **found["buffers"][1]}
    assert {f"student.{name}" for name in saved} == held.keys()
    assert all(torch.equal(saved[name], held[f"student.{name}"]) for name in saved)
    assert any(float(held[name].abs().max()) > 0 for name in held if name.endswith("running_mean"))
    assert not found["wrapped"]  # every parameter trains: nothing has to be searched for
    assert found["missed"] == ""


def test_parameters_that_no_term_reaches_stay_as_they_are(trainings):
    """A term on a tapped layer leaves all later ones without gradient; plain DDP refuses such a network."""
    found = trainings[1]["tap"]
    assert all_equal(found["parameters"])
    assert found["wrapped"]
    assert "reduction in the prior iteration" in found["missed"]


# ---------------------------------------------------------------------------------------------------- every video once
def test_three_ranks_test_every_video_once(videos, tmp_path):
    """An odd number of videos with a broken one among them; fewer videos than ranks; one alone."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    found = sorted((videos / "test").rglob("*.mp4"))
    lists = {"five": [*found[:2], broken, *found[2:5]], "two": found[2:4], "one": found[:1]}
    cfgs = []
    for name, paths in lists.items():
        rows = [f"{path} {int(path.parent.name == 'dark')}" for path in paths]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
        node = {"FORMAT": "csv", "PATH": str(tmp_path / f"{name}.csv"), "LABELED": True}
        sections = {**labelled(videos, TRAIN="train"), "TEST": {"BATCH_SIZE": 6, "NUM_ENSEMBLE_VIEWS": 2}}
        sections["CORPUS"] |= {"TEST": {"VIDEOS": node}}
        cfgs.append(small_cfg(videos, tmp_path / name, **sections))
    with forked_ranks():
        together = launch(ranks_cfg(3), partial(evaluate_all, cfgs))
    alone = evaluate_all(cfgs, cfgs[0])
    assert [int(evaluation.used.sum()) for evaluation in alone] == [5, 2, 1]
    for one, three in zip(alone, together, strict=True):
        expected, metrics = one.metrics(), three.metrics()
        assert metrics.pop("clip_loss") == pytest.approx(expected.pop("clip_loss"), rel=1e-5)
        assert metrics == expected
        assert three.paths == one.paths
        np.testing.assert_array_equal(three.clips, one.clips)
        np.testing.assert_allclose(three.scores, one.scores, rtol=1e-5)
    assert [Path(video.path).name for video in together[0].bad] == ["broken.mp4"]


# ------------------------------------------------------------------------------------------ synchronised batch norm
def test_conversion_keeps_names_parameters_and_weight_decay():
    net = nn.Sequential(nn.Conv3d(3, 4, 1), nn.Sequential(nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1)))
    before = dict(net.named_parameters())
    optimizer = build_optimizer(net, "sgd", lr=0.1, weight_decay=0.1, bn_weight_decay=0.0)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net) is net
    after = dict(net.named_parameters())
    assert isinstance(net[1][0], nn.SyncBatchNorm)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    again = build_optimizer(net, "sgd", lr=0.1, weight_decay=0.1, bn_weight_decay=0.0)
    assert [len(group["params"]) for group in again.param_groups] == [
        len(group["params"]) for group in optimizer.param_groups
    ]


class OfTwoRanks(nn.SyncBatchNorm):
    """What torch's layer does on the first of two ranks, whose other one sees ``others``."""

    others: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([x, self.others])
        return F.batch_norm(joined, self.running_mean, self.running_var, training=True, momentum=self.momentum)[
            : len(x)
        ]


def test_precise_statistics_of_a_synchronised_layer(monkeypatch):
    """Its unbiased variance is over the clips of all ranks."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    generator = torch.Generator().manual_seed(0)
    mine, others = torch.randn(2, 3, 4, 2, 5, 5, generator=generator, dtype=torch.float64).unbind()
    layer = OfTwoRanks(4, affine=False, dtype=torch.float64).train()
    layer.others = others
    update_bn_statistics(layer, [mine], 1, all_reduce_sum=lambda sums: 2 * sums)
    joined = torch.cat([mine, others]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean, joined.mean(1))
    torch.testing.assert_close(layer.running_var, joined.var(1, correction=0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="synchronised batch norm needs two GPUs")
def test_synchronised_batch_norm_on_two_gpus(videos, tmp_path):
    """Two ranks with it have the statistics of one on the joined batch."""
    sections = {**labelled(videos, TRAIN="train"), "BN": {"NORM_TYPE": "sync_batchnorm"}}
    run(small_cfg(videos, tmp_path / "two", **sections, NUM_GPUS=2))
    run(small_cfg(videos, tmp_path / "one", **sections, NUM_GPUS=1))
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ cached targets
def test_ranks_share_the_work_of_a_cache(tmp_path):
    write_world(tmp_path)
    for ranks in (1, 2):
        cfg = job(tmp_path, tmp_path / "run", image_entry(tmp_path), RUNNER={"CPU_RANKS": ranks})
        with forked_ranks():
            parts = fill(cfg, tmp_path / f"cache{ranks}")
        assert [part.made for part in parts] == [16, 2]
    assert contents(tmp_path / "cache1") == contents(tmp_path / "cache2")
