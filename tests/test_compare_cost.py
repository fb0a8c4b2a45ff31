"""``distinit compare-cost``: sums of parts, flow of its own, latency in interleaved rounds."""

import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distinit_plugin import build
from distinit_plugin.cli import main
from distinit_plugin.config.load import load_cfg
from distinit_plugin.engine import timing
from distinit_plugin.flow import build_flow_backend
from distinit_plugin.jobs import costs
from distinit_plugin.jobs.costs import STEP, compare_costs, moving_frames

TINY = "MODEL: {MODEL_NAME: S3DG, NUM_CLASSES: 5}\nDATA: {NUM_FRAMES: 8, TRAIN_CROP_SIZE: 32, TEST_CROP_SIZE: 32"


@pytest.fixture
def files(tmp_path):
    """``rgb.yaml``, ``flow.yaml``, ``two.yaml`` (Two-Stream) and ``odd+name.yaml``."""
    texts = {
        "rgb": f"{TINY}}}\nNETWORK: {{WIDTH: 8}}",
        "flow": f"{TINY}, MEAN: [0.5, 0.5], STD: [0.5, 0.5]}}\nNETWORK: {{WIDTH: 16, MODALITY: flow}}\n"
        "FLOW: {STORE: ./nowhere}",
        "two": f"{TINY}}}\nNETWORK: {{WIDTH: 8}}".replace("S3DG", "TwoStream"),
        "odd+name": f"{TINY}}}\nNETWORK: {{WIDTH: 8}}",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return {name: str(tmp_path / f"{name}.yaml") for name in texts}


@pytest.fixture
def quick_flow(monkeypatch):
    """Flow that costs two milliseconds; what was made and asked for."""
    made = []

    def build_live_flow(cfg):
        made.append((cfg.FLOW.BACKEND, cfg.FLOW.BOUND))

        def flow(pairs, stack):
            time.sleep(0.002)
            made.append((tuple(pairs.shape), stack))

        return flow

    monkeypatch.setattr(costs.build, "build_live_flow", build_live_flow)
    return made


def counted(file):
    """Parameters and multiply-accumulates of a file's network, counted here."""
    network = build.build_network(load_cfg(file, check=False)[0], num_classes=5).eval()
    with FlopCounterMode(display=False) as counter:
        network(
            {
                view: torch.zeros(1, spec.channels, spec.num_frames, 32, 32)
                for view, spec in network.view_specs("test").items()
            }
        )
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() // 2


@pytest.mark.usefixtures("quick_flow")
def test_rows_are_the_sums_of_their_parts(files, tmp_path, capsys):
    rows = [files["rgb"], f"{files['rgb']}+{files['flow']}", f"{files['rgb']}+{files['rgb']}", files["two"]]
    out = tmp_path / "costs.json"
    assert main(["compare-cost", *rows, "--rounds", "3", "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["rounds"] == 3
    single, both, twice, two_stream = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["rgb", "rgb + flow", "rgb + rgb", "two"]
    rgb, flow = counted(files["rgb"]), counted(files["flow"])
    assert (single["parameters"], single["macs"]) == rgb
    assert (both["parameters"], both["macs"]) == (rgb[0] + flow[0], rgb[1] + flow[1])
    assert (twice["parameters"], twice["macs"]) == (2 * rgb[0], 2 * rgb[1])
    assert (two_stream["parameters"], two_stream["macs"]) == counted(files["two"])
    assert [row["backend"] for row in found["rows"]] == ["", "tvl1", "", "tvl1"]
    for row in found["rows"]:
        for key in ("networks", "flow", "together"):
            assert row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert (row["flow"]["median"] >= 2) == bool(row["backend"])
        assert row["together"]["median"] >= max(row["networks"]["median"], row["flow"]["median"]) > 0
    assert twice["networks"]["median"] == pytest.approx(2 * single["networks"]["median"])
    printed = capsys.readouterr().out
    assert "+ flow" in printed
    assert "medians of 3 rounds" in printed
    assert "two: rgb 3×8×32×32, flow 20×8×32×32" in printed


def test_times_are_added_round_by_round(files, monkeypatch):
    """With a clock of our own; flow is computed once for all networks that see the same."""
    asked = {}

    def interleave(variants, rounds):
        asked.update(variants)
        assert rounds == 2
        ticks = {"rgb": [1.0, 3.0], "flow": [10.0, 20.0]}
        return {name: [100.0, 400.0] if name.startswith("tvl1") else ticks[name] for name in variants}

    monkeypatch.setattr(costs, "interleave", interleave)
    cfgs = {name: load_cfg(files[name], check=False)[0] for name in ("rgb", "flow")}
    rows = [["rgb"], ["flow"], ["flow", "rgb", "flow"]]
    single, flow, three = compare_costs(rows, cfgs, rounds=2, device="cpu")
    assert len(asked) == 3  # two networks and one flow
    assert single.together == timing.spread([1000, 3000])
    assert flow.together == timing.spread([110_000, 420_000])
    assert (three.networks, three.flow) == (timing.spread([21_000, 43_000]), timing.spread([100_000, 400_000]))
    assert three.together == timing.spread([121_000, 443_000])


def test_a_row_for_each_back_end_and_the_users_keys(files, tmp_path, quick_flow):
    out = tmp_path / "costs.json"
    words = ["--flow", "tvl1", "dis_fast", "--rounds", "1", "--device", "cpu", "--json", str(out)]
    opts = ["--opts", "CORPUS.TEST_NUM_FRAMES", "4", "FLOW.BOUND", "5"]
    assert main(["compare-cost", files["odd+name"], files["flow"], *words, *opts]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["backend"]) for row in rows] == [("odd+name", ""), ("flow", "tvl1"), ("flow", "dis_fast")]
    assert rows[0]["views"] == "rgb 3×4×32×32"
    assert rows[1]["networks"] == rows[2]["networks"]  # one measurement of one network
    assert quick_flow[:2] == [("tvl1", 5.0), ("dis_fast", 5.0)]
    assert quick_flow[2:] == [((1, 6, 4, 32, 32), 1)] * 4  # both once to warm up, once counted


def test_the_drawn_clip_has_the_flow_that_it_should():
    frames = moving_frames(3, 64).transpose(0, 1)
    flow = build_flow_backend("tvl1", "FLOW.BACKEND")(frames[:-1], frames[1:])[:, :, 16:-16, 16:-16]
    down, right = STEP
    torch.testing.assert_close(flow.mean((0, 2, 3)), torch.tensor([float(right), float(down)]), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{rgb}+absent.yaml"], "absent.yaml: no such file"),
        (["{rgb}+"], "no name beside a '+'"),
        (["{rgb}", "--flow", "tvl2"], None),
        (["{flow}", "--flow", "tvl2"], "Did you mean tvl1"),
        (["{rgb}", "--opts", "NETWORK.STEM_FRAMES", "2"], "Allowed: 1, 3, 5, 7"),
        (["{rgb}", "--opts", "DATA.NUM_FRAMES", "0"], "DATA.NUM_FRAMES"),
    ],
)
def test_what_cannot_be_compared_is_named(words, message, files, capsys):
    code = main(
        ["compare-cost", *(word.format(**files) for word in words[:1]), "--rounds", "1", "--device", "cpu", *words[1:]]
    )
    assert code == (1 if message else 0)
    if message:
        assert message in capsys.readouterr().err


def test_shipped_d3d_files_are_named_as_users_name_them():
    """The three rows of the comparison in projects/d3d/README.md load."""
    from distinit_plugin.commands.compare_cost import files_of

    names = [f"configs/D3D/kinetics400_{name}.yaml" for name in ("d3d", "rgb", "flow")]
    assert files_of(names[0]) == names[:1]
    assert files_of("+".join(names)) == names
