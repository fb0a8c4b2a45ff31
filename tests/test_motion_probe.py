"""The motion probe: end-point errors and controls on clips whose motion is known, and the whole job."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from motions import FLOW_TEACHER, motion_job, write_motions
from small_jobs import differing, weights_of
from torch import Tensor, nn

from distinit_plugin.cli import main
from distinit_plugin.engine.checkpoint import load_checkpoint
from distinit_plugin.engine.motion import CONTROLS, Changes, LayerMotion, frame_order, measure_motion, reorder
from distinit_plugin.engine.motion_report import MotionCurve, read_curve, write_report
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.jobs.motion_probe import probe_motion
from distinit_plugin.jobs.running import run
from distinit_plugin.losses import build_loss
from distinit_plugin.models import InputSpec, build_network
from distinit_plugin.objectives import Objective, Term, on_students_grid
from distinit_plugin.teachers import FlowView
from distinit_plugin.types import LayerInfo, ModelOutput, SampleKey

CPU = torch.device("cpu")
FRAMES, BOUND = 6, 20.0
SPEC = InputSpec(num_frames=FRAMES, train_crop_size=2, test_crop_size=2, mean=(0.0,) * 3, std=(1 / 255,) * 3)


# -------------------------------------------------------------------------------- clips whose grey value is a position
def positions_to_flow(positions: Tensor) -> Tensor:
    """(B,T) → (B,2,T,2,2): to the right by the difference to the next frame, the last one twice."""
    steps = positions.diff(dim=1)
    u = torch.cat([steps, steps[:, -1:]], dim=1)
    return torch.stack([u, torch.zeros_like(u)], dim=1)[..., None, None].expand(-1, -1, -1, 2, 2)


class Reader(nn.Module):
    """A student whose layer is the decoded flow itself: it compares the frames of the clip."""

    layers = {"flow": LayerInfo(3, 1, 1)}  # noqa: RUF012
    feature_dim = num_classes = 3

    def polar(self, positions: Tensor) -> Tensor:
        flow = positions_to_flow(positions)
        return torch.stack([flow[:, 0], torch.zeros_like(flow[:, 0]), torch.ones_like(flow[:, 0])], dim=1)

    def forward(self, views: dict[str, Tensor], *, boxes: Tensor | None = None, taps: Any = ()) -> ModelOutput:
        return ModelOutput(None, None, dict.fromkeys(taps, self.polar(views["rgb"][:, 0, :, 0, 0])))


class Guesser(Reader):
    """Knows that everything in these videos moves to the right by 3 pixels, and looks at nothing."""

    def polar(self, positions: Tensor) -> Tensor:
        return super().polar(3.0 * torch.arange(positions.shape[1]).expand(len(positions), -1))


def measured(student: Reader, own_flow: bool = True) -> LayerMotion:
    """Errors on two clips that move to the right by 3 pixels a frame."""
    teacher = FlowView(SPEC)
    term = Term(
        "FLOW",
        "flow",
        build_loss("flow_decoding"),
        teacher="FLOW",
        teacher_layer="flow",
        match=on_students_grid("center"),
    )
    objective = Objective(student, [term], {"FLOW": teacher}, {"FLOW": nn.Flatten(0, 0)})
    positions = torch.tensor([[0.0], [50.0]]) + 3.0 * torch.arange(FRAMES)
    frames = positions.to(torch.uint8)[:, None, :, None, None].expand(-1, 3, -1, 2, 2)
    flow = positions_to_flow(positions) / BOUND
    batch = {"views": {"frames": frames}, "keys": [SampleKey(0, n, n) for n in range(2)], "paths": [], "targets": {}}
    read = (lambda changed: positions_to_flow(changed[:, 0, :, 0, 0].float())) if own_flow else None
    rows, samples = measure_motion(
        objective,
        [batch, {"views": {}, "keys": []}],  # type: ignore[list-item]
        finish=lambda batch: {"student/rgb": batch["views"]["frames"].float(), "FLOW/flow": flow},
        device=CPU,
        pixels="frames",
        changes=Changes(read, seed=1),
        num_samples=1,
    )
    assert len(samples) == 1
    torch.testing.assert_close(samples[0].flow, torch.tensor([3.0, 0.0])[:, None, None].expand(2, 2, 2))
    return rows[0]


def test_a_reader_of_motion_passes_all_controls() -> None:
    row = measured(Reader())
    assert row.grid == (FRAMES, 2, 2)
    assert (row.epe, row.zeros, row.magnitude) == pytest.approx((0, 3, 3), abs=1e-5)
    assert row.controls["still"] == pytest.approx((0, 0, 3), abs=1e-5)
    assert row.controls["reversed"] == pytest.approx((0, 3, 6), abs=1e-5)
    shuffled = row.controls["shuffled"]
    assert shuffled.own == pytest.approx(0, abs=1e-5)
    assert shuffled.own_magnitude > 3
    assert shuffled.original > 3


def test_a_guesser_is_found_out_by_the_controls() -> None:
    """The negative control of the test above: as good on the clips, and wrong on every changed one."""
    row = measured(Guesser())
    assert row.epe == pytest.approx(0, abs=1e-5)
    assert row.controls["still"] == pytest.approx((3, 0, 0), abs=1e-5)
    assert row.controls["reversed"] == pytest.approx((6, 3, 0), abs=1e-5)
    assert row.controls["shuffled"].own > 3
    assert row.controls["shuffled"].original == pytest.approx(0, abs=1e-5)


def test_flow_of_changed_clips_may_be_unknown() -> None:
    controls = measured(Reader(), own_flow=False).controls
    assert controls["still"] == pytest.approx((0, 0, 3), abs=1e-5)
    assert np.isnan(controls["reversed"].own)
    assert controls["reversed"].original == pytest.approx(6, abs=1e-5)


def test_orders_of_frames() -> None:
    keys = [SampleKey(0, 7, 1), SampleKey(3, 0, 1), SampleKey(0, 7, 2)]
    orders = {name: frame_order(name, keys, 9, seed=4) for name in CONTROLS}
    assert orders["still"].unique().tolist() == [0]
    assert orders["reversed"][1].tolist() == list(range(8, -1, -1))
    shuffled = orders["shuffled"]
    assert shuffled.sort(dim=1).values.tolist() == [list(range(9))] * 3
    assert shuffled[0].tolist() == shuffled[1].tolist()  # of the video and the clip alone
    assert shuffled[0].tolist() != shuffled[2].tolist()
    assert shuffled[0].tolist() != frame_order("shuffled", keys, 9, seed=5)[0].tolist()
    clip = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(3, 2, 9, 4, 4)
    assert torch.equal(reorder(clip, shuffled)[:, 1, :, 2, 3], shuffled.float())


def test_no_readable_video_is_said() -> None:
    term = Term("FLOW", "flow", build_loss("flow_decoding"), teacher="FLOW", teacher_layer="flow")
    objective = Objective(Reader(), [term], {"FLOW": FlowView(SPEC)}, {"FLOW": nn.Flatten(0, 0)})
    with pytest.raises(UserError, match="none of the test videos"):
        measure_motion(objective, [], finish=dict, device=CPU)


# ------------------------------------------------------------------------------------------------------- the whole job
@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_motions(tmp_path_factory.mktemp("motions"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a Res3D as ``motion_job`` has it, with a classifier."""
    torch.manual_seed(3)
    network = build_network("Res3D", num_classes=7, input=InputSpec(), depth=10, width=8)
    path = tmp_path_factory.mktemp("backbone") / "s3dg.pth"
    torch.save(network.bare_state_dict(), path)
    return path


def test_trained_decoder_reads_the_motion(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = motion_job(
        videos,
        tmp_path / "run",
        MODEL={"MODEL_NAME": "S3DG"},
        RESNET={"DEPTH": 18},
        NETWORK={"WIDTH": 16, "LAST_LAYER": "2C", "GATING_FROM": "none"},
        SOLVER={"BASE_LR": 0.005},
        RUNNER={"CLIPS_PER_EPOCH": 8 * 50},
        BN={"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 4},
    )
    result = probe_motion(cfg, "random", ["2C"], finetune=True, controls=True, name="tuned")
    (row,) = result.curve.layers
    assert row.grid == (2, 8, 8)
    assert row.zeros == pytest.approx(row.magnitude, rel=1e-6)
    assert row.zeros == pytest.approx(3, abs=0.1)
    assert row.epe < 0.6 * row.zeros
    still, backwards, shuffled = (row.controls[name] for name in CONTROLS)
    assert still.own < 0.7 * row.zeros
    assert still.original > 0.8 * row.zeros
    assert backwards.own < 0.6 * row.zeros
    assert backwards.original > 1.5 * row.zeros
    assert shuffled.original > 0.8 * row.zeros
    said = capsys.readouterr().out
    assert "all zeros" in said
    assert "reversed: as good as the clip itself" in said

    folder = tmp_path / "run" / "motion"
    assert result.folder == folder
    contents = json.loads((folder / "motion.json").read_text())
    assert contents["curves"][0]["layers"][0]["epe"] == row.epe
    assert contents["settings"] == {
        "weights": "random",
        "mode": "fine-tuned",
        "unit_direction": False,
        "decoder": "spatial",
    }
    with open(folder / "motion.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["reversed_original"]) == pytest.approx(backwards.original, rel=1e-4)
    for name in ("motion.png", "motion_flow.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_frozen_backbone_stays_as_it_is(videos: Path, backbone: Path, tmp_path: Path) -> None:
    cfg = motion_job(videos, tmp_path / "run", BN={"USE_PRECISE_STATS": True, "NUM_BATCHES_PRECISE": 1})
    result = probe_motion(cfg, backbone, ["stem", "layer2"], decoder="spatial")
    assert [row.layer for row in result.curve.layers] == ["stem", "layer2"]
    assert [row.grid for row in result.curve.layers] == [(4, 16, 16), (2, 8, 8)]
    assert all(row.controls == {} for row in result.curve.layers)
    frozen = weights_of(tmp_path / "run" / "motion" / "frozen")
    before = {key: value for key, value in torch.load(backbone, weights_only=True).items() if not key.startswith("fc.")}
    assert differing(frozen, before) == []
    heads = load_checkpoint(next((tmp_path / "run/motion/frozen/checkpoints").glob("*00001.pyth")))["distinit"][
        "adapters"
    ]
    assert {key.split(".")[0] for key in heads} == {"MOTION_stem", "MOTION_layer2"}
    # Once more: there is nothing left to train, and the same is found.
    again = probe_motion(cfg, backbone, ["stem", "layer2"], decoder="spatial", beside=[result.folder])
    assert again.curve == result.curve
    # Fine-tuned it does move: the control.
    tuned = probe_motion(cfg, backbone, ["stem"], finetune=True)
    assert differing(weights_of(tuned.folder / "finetuned_stem"), before) != []


def test_probe_from_the_command_line_beside_a_flow_stream(videos: Path, backbone: Path, tmp_path: Path) -> None:
    """Layers from the YAML file, and the same of a network that sees flow, from the file of its run."""
    sees_flow = {
        "NETWORK": {"MODALITY": "flow"},
        "DATA": {"MEAN": [0.5, 0.5], "STD": [0.5, 0.5]},
        "DISTILL": {"TEACHERS": {"FLOW": FLOW_TEACHER}},
    }
    run(motion_job(videos, tmp_path / "stream", **sees_flow))
    stream = tmp_path / "stream" / "checkpoints" / "checkpoint_epoch_00001.pyth"
    motion_job(
        videos,
        tmp_path / "probe",
        TRAIN={"CHECKPOINT_FILE_PATH": str(backbone)},
        INIT={"TRAINABLE": "heads"},
    )
    words = ["probe-motion", "--flow-network", str(stream), "--cfg", str(tmp_path / "probe.yaml")]
    assert main(words) == 0
    curves = json.loads((tmp_path / "probe" / "motion" / "motion.json").read_text())["curves"]
    assert [(curve["name"], curve["layers"][0]["layer"]) for curve in curves] == [
        ("probe, frozen", "stem"),
        ("flow stream", "stem"),
    ]
    assert read_curve(tmp_path / "probe" / "motion").name == "probe, frozen"


def refusal(videos: Path, folder: Path, change: Callable[[dict[str, Any]], None], **arguments: Any) -> str:
    sections: dict[str, Any] = {}
    change(sections)
    with pytest.raises(UserError) as caught:
        probe_motion(motion_job(videos, folder, **sections), "random", **{"layers": ["stem"], **arguments})
    return str(caught.value)


def test_what_a_probe_cannot_do_is_said_before_it_trains(videos: Path, backbone: Path, tmp_path: Path) -> None:
    def nothing(sections: dict[str, Any]) -> None:
        return None

    def labels(sections: dict[str, Any]) -> None:
        corpora = {use: {"VIDEOS": {"LABELED": True}} for use in ("TRAIN", "TEST")}
        sections |= {"ACTION": {"LOSS_WEIGHT": 1.0}, "CORPUS": corpora}

    def of_flow(sections: dict[str, Any]) -> None:
        sections |= {"NETWORK": {"MODALITY": "flow"}, "DATA": {"MEAN": [0.5] * 2, "STD": [0.5] * 2}}

    assert "no layer is named" in refusal(videos, tmp_path / "a", labels, layers=[])
    assert "no layer named 'layer9'" in refusal(videos, tmp_path / "b", nothing, layers=["layer9"])
    assert "Allowed with ARCH flow: simple" in refusal(videos, tmp_path / "c", nothing, decoder="linear")
    assert "sees flow" in refusal(videos, tmp_path / "d", of_flow, controls=True)
    assert "is not a checkpoint" in refusal(videos, tmp_path / "e", nothing, flow_network=backbone)
    assert "motion.json cannot be read" in refusal(videos, tmp_path / "f", nothing, beside=[tmp_path])
    with pytest.raises(UserError, match="There is no checkpoint"):
        probe_motion(motion_job(videos, tmp_path / "g"), "", ["stem"])
    assert not (tmp_path / "d" / "motion" / "frozen" / "checkpoints").exists()


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    curve = MotionCurve("a", [LayerMotion("3A", (1, 2, 3), 0.5, 2.0, 2.0)])
    write_report(tmp_path, [curve], {})
    assert read_curve(tmp_path) == curve
    (tmp_path / "motion.json").write_text('{"curves": [{"name": "a", "layers": [{"layer": "3A", "grid": [1]}]}]}')
    with pytest.raises(UserError, match="is no result of a probe"):
        read_curve(tmp_path)


# --------------------------------------------------------------------------------------------------- the configuration
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LAYER": "logits"}, "LAYER: logits, but ARCH flow"),
        ({"HEAD": "linear"}, "HEAD: linear decodes no flow"),
        ({"LOSS": "mse"}, "LOSS: mse is not for flow"),
        ({"STUDENT_LAYER": ""}, "STUDENT_LAYER: empty, but flow is decoded from a map"),
        ({"CROP_SIZE": 112}, "CROP_SIZE: 112, but ARCH flow is the flow of the student's own clip"),
        ({"NETWORK": {"WIDTH": 8}}, "NETWORK: other switches"),
        ({"HEAD": "simple", "DECODER_NORM": True}, "DECODER_NORM: True, but HEAD simple"),
        ({"ALIGNMENT": "middle"}, "Allowed: center, mean"),
        ({"ARCH": "S3DG", "WEIGHTS": "random"}, "HEAD: spatial is for ARCH flow"),
    ],
)
def test_entries_of_flow_that_do_not_fit(changes: dict[str, Any], message: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        motion_job(videos, tmp_path / "run", DISTILL={"TEACHERS": {"FLOW": {**FLOW_TEACHER, **changes}}})


@pytest.mark.parametrize(
    "sections",
    [
        {"DISTILL": {"TEACHERS": {}}},
        {"ACTION": {"LOSS_WEIGHT": 1.0}, "DISTILL": {"TEACHERS": {"FLOW": FLOW_TEACHER}}},
        {"DISTILL": {"TEACHERS": {"FLOW": {"ARCH": "S3DG", "WEIGHTS": "random", "HEAD": "own", "LOSS": "mse"}}}},
    ],
)
def test_heads_alone_need_new_heads(sections: dict[str, Any], videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heads trains new heads"):
        motion_job(videos, tmp_path / "run", INIT={"TRAINABLE": "heads"}, **sections)
