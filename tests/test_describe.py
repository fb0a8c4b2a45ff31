"""``distinit describe``: counts, MACs, shapes, strides and receptive fields against other ways to know them."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from distinit_plugin import InputSpec, build_network, cli
from distinit_plugin.engine.describe import Description, LayerRow, describe
from distinit_plugin.engine.receptive import Extent, UntracedError, receptive_fields
from distinit_plugin.jobs.description import print_description
from distinit_plugin.models.network import VideoNetwork
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput


def on_meta(name, frames=8, crop=64, classes=10, **switches):
    spec = InputSpec(num_frames=frames, train_crop_size=crop, test_crop_size=crop)
    with torch.device("meta"):
        return build_network(name, num_classes=classes, input=spec, **switches)


def fields(network, axis):
    (found,) = receptive_fields(network, network.view_specs("test"), list(network.layers), axis).values()
    return found


def chain(*layers):
    """Receptive field of (kernel, stride) pairs, by the recurrence of the textbooks."""
    size, jump = 1, 1
    for kernel, stride in layers:
        size, jump = size + (kernel - 1) * jump, jump * stride
    return size


def test_residual_networks_against_the_recurrence():
    """Res3D-18: two 3×3×3 convolutions per block, two blocks per stage, strides in the first of stages 2 to 4."""
    network = on_meta("Res3D", frames=16)
    stage, strided = [(3, 1)] * 4, [(3, 2), *[(3, 1)] * 3]
    for axis, stem in (("time", (3, 1)), ("space", (7, 2))):
        layers, known = [stem], fields(network, axis)
        assert known["stem"].size == chain(*layers)
        for number in range(1, 5):
            layers += stage if number == 1 else strided
            assert known[f"layer{number}"].size == chain(*layers)
            assert not known[f"layer{number}"].everything


def test_inception_against_the_i3d_paper():
    """Fig. 3 of arXiv 1705.07750 up to the fourth stage (torchvision's S3D has the same windows)."""
    network = on_meta("torchvision/s3d", frames=64, crop=224)
    time, space = fields(network, "time"), fields(network, "space")
    # Conv 1a 7 × 7²; pool 3a 11 × 27²; pool 4a 23 × 75²
    for layer, expected in {"features.0": (7, 7), "features.4": (11, 27), "features.7": (23, 75)}.items():
        assert (time[layer].size, space[layer].size) == expected


ENLARGES = "PredictedFlow3D"
"""The network whose maps become larger on the way: its later units have no even distance on the input."""


@pytest.mark.parametrize("name", [*sorted({name for name, _ in MODELS} - {ENLARGES}), "torchvision/r3d_18"])
def test_strides_are_those_that_the_network_declares(name):
    network = on_meta(name)
    specs, seen = network.view_specs("test"), set()
    for axis, declared in (("time", "temporal_stride"), ("space", "spatial_stride")):
        for view, extents in receptive_fields(network, specs, list(network.layers), axis).items():
            assert list(extents) == list(network.layers)
            for layer, extent in extents.items():
                if extent is not None:  # a layer of one of two streams
                    assert extent.size is None or extent.stride == getattr(network.layers[layer], declared), layer
                    seen.add((view, layer))
    assert {layer for _, layer in seen} == set(network.layers)
    assert {view for view, _ in seen} == set(specs)


def test_maps_that_become_larger_have_no_field_that_is_known():
    network = on_meta(ENLARGES)
    with pytest.raises(UntracedError, match="index"):
        fields(network, "space")
    assert "index" in describe(ENLARGES, network).not_traced


class Sketch(VideoNetwork):
    """Two branches, a gate, odd windows."""

    def __init__(self, gate=False, dilation=1):
        super().__init__(InputSpec(num_frames=4))
        self.gate = gate
        self.wide = nn.Conv3d(3, 2, (5, 3, 3), (1, 2, 2), padding=(2, 1, 1))
        self.narrow = nn.Sequential(nn.MaxPool3d((1, 2, 2)), nn.Conv3d(3, 3, 1))
        self.last = nn.Conv3d(5, 5, 3, 1, padding=dilation, dilation=dilation)

    @property
    def layers(self):
        return {"joined": LayerInfo(5, 1, 2), "last": LayerInfo(5, 1, 2)}

    def forward(self, views, *, boxes=None, taps=()):
        x = views["rgb"]
        joined = torch.cat([self.wide(x).relu(), self.narrow(x)], dim=1)
        gated = joined * joined.mean((2, 3, 4), keepdim=True).sigmoid() if self.gate else joined
        kept = {"joined": joined, "last": self.last(gated)}
        return ModelOutput(None, kept["last"].mean((2, 3, 4)), {name: kept[name] for name in taps})


def by_gradient(network, layer, dim):
    """What the gradient of the middle unit touches: the other way to know it, in double precision."""
    network = network.double()
    for name, parameter in network.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.0) if "weight" in name else nn.init.zeros_(parameter)
    shape = [1, 3, 4, 32, 32]
    shape[dim] = 64
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tap = network({"rgb": x}, taps=[layer]).taps[layer]
    tap.select(dim, tap.shape[dim] // 2).sum().backward()
    touched = x.grad.abs().transpose(1, dim).flatten(2).sum((0, 2)).nonzero()
    return int(touched.max() - touched.min()) + 1


@pytest.mark.parametrize("dilation", [1, 2])
def test_branches_and_dilation_against_gradients(dilation):
    for axis, dim in (("time", 2), ("space", 3)):
        for layer in ("joined", "last"):
            network = Sketch(dilation=dilation)
            assert fields(network, axis)[layer].size == by_gradient(network, layer, dim)
    assert fields(Sketch(dilation=2), "space")["last"].size > fields(Sketch(), "space")["last"].size


def test_gates_are_noted_and_leave_the_windows_visible():
    plain, gated = Sketch(), Sketch(gate=True)
    for axis in ("time", "space"):
        assert not fields(gated, axis)["joined"].everything
        assert fields(gated, axis)["last"].everything
        assert fields(gated, axis)["last"].size == fields(plain, axis)["last"].size


def test_unknown_operations_are_no_guess():
    class Strange(Sketch):
        def forward(self, views, *, boxes=None, taps=()):
            x = views["rgb"].cumsum(2)
            return ModelOutput(None, None, dict.fromkeys(taps, x))

    with pytest.raises(UntracedError, match="cumsum"):
        fields(Strange(), "time")


def test_counts_and_shapes():
    network = on_meta("R2Plus1D", frames=8, crop=112, classes=51)
    made = sum(parameter.numel() for parameter in network.parameters())
    found = describe("R2Plus1D", network)
    assert (found.parameters, found.trainable, found.classifier) == (made, made, 512 * 51 + 51)
    assert found.layers[-1].shape == (512, 1, 7, 7)
    assert [row.name for row in found.layers] == list(network.layers)
    # The stem alone: (1×7×7 to 45 planes, 3×1×1 to 64) over 8 × 56² positions; all of it is much more.
    assert 8 * 56 * 56 * (3 * 49 * 45 + 45 * 3 * 64) < found.macs < 25e9
    fewer = describe("R2Plus1D", on_meta("R2Plus1D", frames=4, crop=112, classes=51))
    assert math.isclose(fewer.macs / found.macs, 0.5, rel_tol=0.2)
    assert fewer.parameters == made


def test_two_views():
    """Each view has its own field; a layer that does not see a view says nothing of it."""

    class TwoViews(Sketch):
        def view_specs(self, split):
            rgb = super().view_specs(split)["rgb"]
            spec = type(rgb)(modality="flow", num_frames=4, stack=5, mean=(0.5, 0.5), std=(0.5, 0.5))
            return {"rgb": rgb, "flow": spec}

        def __init__(self):
            super().__init__()
            self.other = nn.Conv3d(10, 5, (1, 9, 9), (1, 2, 2), padding=(0, 4, 4))

        def forward(self, views, *, boxes=None, taps=()):
            x = views["rgb"]
            joined = torch.cat([self.wide(x), self.narrow(x)], dim=1)
            kept = {"joined": joined, "last": joined + self.other(views["flow"])}
            return ModelOutput(None, kept["last"].mean((2, 3, 4)), {name: kept[name] for name in taps})

    network = TwoViews()
    found = {
        axis: receptive_fields(network, network.view_specs("test"), ["joined", "last"], axis)
        for axis in ("time", "space")
    }
    assert found["space"]["flow"]["joined"] is None
    assert (found["time"]["rgb"]["last"].size, found["space"]["rgb"]["last"].size) == (5, 3)
    assert (found["time"]["flow"]["last"].size, found["space"]["flow"]["last"].size) == (1, 9)


# ---------------------------------------------------------------------------------------------------- the command
def test_command(tmp_path, capsys):
    file = tmp_path / "network.json"
    words = ["describe", "Res3D", "--frames", "4", "--crop", "64", "--json", str(file), "--opts", "RESNET.DEPTH", "10"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "GMACs per clip" in printed
    assert "layer4" in printed
    found = json.loads(file.read_text())
    assert found["views"] == {"rgb": [3, 4, 64, 64]}
    assert f"{found['parameters']:,}" in printed
    assert found["layers"][0]["pixels"]["rgb"] == {"size": 7, "stride": 2, "everything": False}
    shipped = "configs/DistInit/table1_r2plus1d18_distinit_finetune.yaml"
    assert cli.main(["describe", "--cfg", shipped, "--crop", "32"]) == 0
    assert "R2Plus1D for rgb 3×8×32×32" in capsys.readouterr().out
    boxes = "configs/AVA/table5_d3d_resnet_rpn.yaml"  # whose RPN's weights are not there
    assert cli.main(["describe", "--cfg", boxes, "--json", str(file)]) == 0
    assert "without the head, which comes once a box" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["classifier"], found["layers"][-1]["spatial_stride"]) == (1024 * 84 + 84, 16)
    assert found["layers"][-1]["pixels"]["rgb"]["size"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "name a network"),
        (["Res3"], "Did you mean Res3D"),
        (["Res3D", "--opts", "RESNET.DEPTH", "19"], "RESNET.DEPTH"),
        (["R2Plus1D", "--opts", "NETWORK.STEM_POOL", "True"], "NETWORK.STEM_POOL"),
        (["torchvision/resnet5"], "no video network 'resnet5'"),
        (["Res3D", "--opts", "NETWORK.MODALITY", "flow"], "DATA.MEAN"),
        (["torchvision/s3d", "--frames", "1", "--crop", "8"], "cannot run on clips of 3×1×8×8"),
    ],
)
def test_mistakes(words, expected, capsys):
    assert cli.main(["describe", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize("columns", [30, 80, 120])
@pytest.mark.parametrize("name", sorted(name for name, _ in MODELS))
def test_no_name_is_broken(name, columns):
    """Each layer has its name on one line, at every width; 80 columns hold the longest shapes and fields."""
    network = on_meta(name, frames=250, crop=224)
    views = list(network.view_specs("test"))
    rows = [
        LayerRow(
            layer,
            (info.channels, 250 // info.temporal_stride, 224 // info.spatial_stride, 224 // info.spatial_stride),
            info.temporal_stride,
            info.spatial_stride,
            dict.fromkeys(views, Extent(355, 8, True)),
            dict.fromkeys(views, Extent(1163, 32, True)),
        )
        for layer, info in network.layers.items()
    ]
    description = Description(name, dict.fromkeys(views, (3, 250, 224, 224)), 1, 1, 1, 1, 1, 1, rows, "")
    file = io.StringIO()
    print_description(description, Console(file=file, width=columns))
    table = [line for line in file.getvalue().splitlines() if line[:1] in "┏┡├└┃│"]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    assert [cell[0] for cell in cells if cell[0]] == list(network.layers)
    assert [cell[1] for cell in cells if cell[1]] == ["×".join(map(str, row.shape)) for row in rows]
    assert {cell[4].removeprefix("rgb ").removeprefix("flow ") for cell in cells} == {"355 × 1163²+"}
    assert max(map(len, table)) <= max(columns, 80)
    if columns == 30:  # the control: this table does not fit, and is not cut
        assert min(map(len, table)) > columns
