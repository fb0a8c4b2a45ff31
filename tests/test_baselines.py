"""The Quo Vadis baselines: C3D, ConvLSTM, TwoStream, Fused3D, and the 2D Inception trunk that three of them share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.data.views import finish_views
from distinit_plugin.engine.precise_bn import update_bn_statistics
from distinit_plugin.errors import UserError
from distinit_plugin.losses import build_loss
from distinit_plugin.models import InputSpec, VideoNetwork, build_network
from distinit_plugin.models.conv_lstm import EPS, STEPS_WITH_STATISTICS, NormalizedLSTM, StepwiseNorm
from distinit_plugin.models.inception import END_POINTS
from distinit_plugin.models.inception2d import InceptionTrunk2D
from distinit_plugin.objectives import Objective, Term
from distinit_plugin.objectives.adapters import layer_size
from distinit_plugin.teachers.factory import build_teacher
from distinit_plugin.weights import load_weights

SIZE, CLASSES = 64, 5


def clip_of(num_frames: int, size: int = SIZE) -> InputSpec:
    return InputSpec(num_frames=num_frames, train_crop_size=size, test_crop_size=size)


def small(name: str, num_frames: int, **switches: object) -> VideoNetwork:
    torch.manual_seed(0)
    switches = {"width": 8 if name == "C3D" else 16, **switches}
    return build_network(name, num_classes=CLASSES, input=clip_of(num_frames), **switches)


def views_of(network: VideoNetwork, batch_size: int, frames: dict[str, int] | None = None, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    views = {}
    for name, spec in network.view_specs("train").items():
        count = (frames or {}).get(name, spec.num_frames)
        views[name] = torch.randn(batch_size, len(spec.mean), count, SIZE, SIZE, generator=generator)
    return views


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize(
    ("name", "num_frames", "modality", "lr"),
    [
        ("C3D", 8, "rgb", 0.05),
        ("C3D", 8, "flow", 0.05),
        ("ConvLSTM", 4, "rgb", 0.5),  # its states, and so its gradients, start small
        ("ConvLSTM", 4, "flow", 0.5),
        ("TwoStream", 1, "rgb", 0.05),
        ("Fused3D", 2, "rgb", 0.05),
    ],
)
def test_learns_labels_of_synthetic_views(name: str, num_frames: int, modality: str, lr: float) -> None:
    values = (0.5,) * (3 if modality == "rgb" else 2)
    spec = InputSpec(num_frames, train_crop_size=SIZE, test_crop_size=SIZE, mean=values, std=values, modality=modality)
    torch.manual_seed(0)
    network = build_network(name, num_classes=CLASSES, input=spec, width=8 if name == "C3D" else 16)
    objective = Objective(network, [Term("action", "logits", build_loss("cross_entropy"))], {}, {})
    views = {f"student/{view}": x for view, x in views_of(network, 4).items()}
    labels = torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(12):
        output = objective(views, {"label": labels})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[0] == pytest.approx(1.6, abs=0.3)  # ln 5
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("name", "num_frames"), [("C3D", 4), ("ConvLSTM", 2)])
def test_one_clip_cannot_be_normalised(name: str, num_frames: int) -> None:
    network = small(name, num_frames)
    with pytest.raises(UserError, match=r"TRAIN\.BATCH_SIZE"):
        network(views_of(network, 1))
    assert network.eval()(views_of(network, 1)).logits.shape == (1, CLASSES)


# ------------------------------------------------------------------------------------------------------------------ C3D
def test_c3d_is_its_layers_at_the_papers_size() -> None:
    """16 frames at 112²: the fixed map is pool5's, 1×4×4, and no pool has anything to round."""
    network = build_network("C3D", num_classes=CLASSES, input=clip_of(16, 112), width=8)
    network.train()({"rgb": torch.randn(4, 3, 16, 48, 48)})  # statistics that are not those of the initialisation
    network.eval()
    clip = torch.randn(1, 3, 16, 112, 112)
    pool = nn.MaxPool3d(2)
    with torch.no_grad():
        x = pool(network.conv1a(clip))
        x = pool(network.conv2a(x))
        x = pool(network.conv3b(network.conv3a(x)))
        x = pool(network.conv4b(network.conv4a(x)))
        x = nn.MaxPool3d((1, 2, 2), padding=(0, 1, 1))(network.conv5b(network.conv5a(x)))
        assert x.shape == (1, 64, 1, 4, 4)
        features = network.fc7(network.fc6(x.flatten(1)))
        output = network({"rgb": clip})
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.logits, network.fc(features))


@pytest.mark.parametrize(("frames", "size"), [(1, 16), (5, 40), (33, 100), (16, 160)])
def test_c3d_takes_any_clip(frames: int, size: int) -> None:
    network = small("C3D", 16).eval()
    with torch.no_grad():
        output = network({"rgb": torch.randn(1, 3, frames, size, size)}, taps=list(network.layers))
    assert output.logits.isfinite().all()
    for name, info in network.layers.items():
        frames_left, side = -(-frames // info.temporal_stride), -(-size // info.spatial_stride)
        assert output.taps[name].shape == (1, info.channels, frames_left, side, side)


@pytest.mark.parametrize("size", [(1, 4, 4), (1, 1, 1), (3, 2, 3), (2, 5, 7), (5, 8, 6), (15, 9, 13)])
def test_c3d_averages_are_those_of_adaptive_pooling(size: tuple[int, int, int]) -> None:
    """Value and gradient, in double precision; the control: another way to that size is something else."""
    network = small("C3D", 16).double().eval()
    x = torch.randn(2, 64, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 64 * 16, dtype=torch.float64)
    expected = functional.adaptive_avg_pool3d(x, (1, 4, 4)).flatten(1)
    found = network.fixed_map(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad((pooled * weight).sum(), x)[0] for pooled in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
    if size[1] not in (1, 4):
        resized = functional.interpolate(x, (1, 4, 4), mode="trilinear").flatten(1)
        assert (resized - expected).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------------- ConvLSTM
def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def lstm_by_loops(lstm: NormalizedLSTM, x: Tensor, training: bool) -> Tensor:
    """Cooijmans et al., equations 6 to 8, in float64, one gate and one time step after the other."""
    size = lstm.hidden
    parameters = {name: value.double() for name, value in lstm.named_parameters()}

    def normalised(values: Tensor, norm: StepwiseNorm, step: int, part: slice) -> Tensor:
        if training:
            mean = values.sum(0) / len(values)
            variance = ((values - mean) ** 2).sum(0) / len(values)
        else:
            kept = norm.steps[min(step, STEPS_WITH_STATISTICS - 1)]
            mean, variance = kept.running_mean.double()[part], kept.running_var.double()[part]
        return (values - mean) / (variance + EPS) ** 0.5

    hidden = cell = torch.zeros(len(x), size, dtype=torch.float64)
    states = []
    for step in range(x.shape[1]):
        gates = []
        for gate in range(4):
            part = slice(gate * size, (gate + 1) * size)
            recurrent = hidden @ parameters["hidden_weight"][part].T
            inputs = x[:, step].double() @ parameters["input_weight"][part].T
            gates.append(
                parameters["hidden_norm.factor"][part] * normalised(recurrent, lstm.hidden_norm, step, part)
                + parameters["input_norm.factor"][part] * normalised(inputs, lstm.input_norm, step, part)
                + parameters["bias"][part]
            )
        cell = sigmoid(gates[1]) * cell + sigmoid(gates[0]) * torch.tanh(gates[2])
        shown = normalised(cell, lstm.cell_norm, step, slice(0, size)) * parameters["cell_norm.factor"]
        hidden = sigmoid(gates[3]) * torch.tanh(shown + parameters["cell_norm.summand"])
        states.append(hidden)
    return torch.stack(states, 1)


def random_lstm() -> NormalizedLSTM:
    torch.manual_seed(0)
    lstm = NormalizedLSTM(6, 5)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if "norm" in name or name == "bias":
                parameter.copy_(0.5 + 0.5 * torch.randn(parameter.shape))
    return lstm


def test_lstm_equals_the_equations() -> None:
    lstm = random_lstm()
    x = torch.randn(7, 4, 6, requires_grad=True)
    weight = torch.randn(7, 4, 5)
    parameters = [x, *lstm.parameters()]
    found = lstm(x)
    gradients = torch.autograd.grad((found * weight).sum(), parameters)
    expected = lstm_by_loops(lstm, x, training=True)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=2e-4, rtol=1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_lstm_in_evaluation_has_statistics_of_each_step() -> None:
    """Trained on clips of 4 frames: the steps after the fourth, in longer clips, share the fourth's."""
    lstm = random_lstm()
    for _ in range(5):
        lstm(torch.randn(9, 4, 6) * torch.arange(1, 5).view(1, 4, 1))
    lstm.eval()
    x = torch.randn(2, STEPS_WITH_STATISTICS + 3, 6)
    with torch.no_grad():
        found = lstm(x)
    expected = lstm_by_loops(lstm, x, training=False).detach()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for norm in (lstm.input_norm, lstm.hidden_norm, lstm.cell_norm):
        fourth = norm.steps[3]
        assert all(torch.equal(later.running_var, fourth.running_var) for later in norm.steps[4:])
        assert all(torch.equal(later.running_mean, fourth.running_mean) for later in norm.steps[4:])
        assert (norm.steps[0].running_var - fourth.running_var).abs().max() > 1e-3
    with torch.no_grad():
        first = lstm.input_norm.steps[0]
        for norm in lstm.input_norm.steps[1:]:
            norm.load_state_dict(first.state_dict())
        assert (lstm(x) - found).abs().max() > 1e-2  # the control: statistics shared by all steps


def test_lstm_keeps_its_precision_under_autocast() -> None:
    lstm = random_lstm()
    x = 1 + 0.05 * torch.randn(7, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, lstm.input_weight).dtype == torch.bfloat16
        found = lstm(x)
    torch.testing.assert_close(found, lstm(x))


def test_precise_statistics_reach_the_steps_that_training_clips_do_not_have() -> None:
    network = small("ConvLSTM", 3).train()
    batches = [views_of(network, 3, seed=seed) for seed in range(3)]
    assert update_bn_statistics(network, batches, 3) == 3
    norm = network.lstm.input_norm
    torch.testing.assert_close(norm.steps[20].running_mean, norm.steps[2].running_mean)
    assert (norm.steps[1].running_mean - norm.steps[2].running_mean).abs().max() > 0


def test_conv_lstm_answers_at_every_step_in_training_and_with_the_last_in_evaluation() -> None:
    network = small("ConvLSTM", 4)
    views = views_of(network, 3)
    output = network(views)
    assert output.logits_over_time.shape == (3, CLASSES, 4)
    assert torch.equal(output.logits_over_time[:, :, -1], output.logits)
    network.eval()
    with torch.no_grad():
        whole = network(views)
        shorter = network({"rgb": views["rgb"][:, :, :3]})
        torch.testing.assert_close(whole.logits, network.fc(whole.features))
    assert whole.logits_over_time is None
    assert (whole.logits - shorter.logits).abs().max() > 1e-6
    first = network.train()(views).logits_over_time[:, :, 0]
    loss = first.square().sum()  # it alone reaches the trunk
    (gradient,) = torch.autograd.grad(loss, [network.trunk.Conv2d_1a_7x7.conv.weight])
    assert gradient.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- Inception
def test_norm_without_a_factor_is_one_with_a_factor_of_one() -> None:
    torch.manual_seed(0)
    plain = InceptionTrunk2D(20, width=16)
    affine = InceptionTrunk2D(20, width=16, affine_norm=True)
    affine.load_state_dict(plain.state_dict(), strict=False)
    assert {key for key in affine.state_dict() if key not in plain.state_dict()} == {
        key for key in affine.state_dict() if key.endswith("bn.weight")
    }
    images = torch.randn(2, 20, 40, 40)
    outputs = [trunk(images) for trunk in (plain, affine)]
    torch.testing.assert_close(*outputs)
    betas = [
        torch.autograd.grad(output.square().sum(), [trunk.Mixed_4c.b1b.bn.bias])[0]
        for output, trunk in zip(outputs, (plain, affine), strict=True)
    ]
    assert betas[0].abs().sum() > 0
    torch.testing.assert_close(*betas, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [32, 63, 65, 100])
def test_same_padding_keeps_every_fraction_of_the_size(size: int) -> None:
    trunk = InceptionTrunk2D(3, width=4)
    with torch.no_grad():
        _, taps = trunk.run_frames(torch.randn(1, 3, 2, size, size), END_POINTS)
    assert list(taps) == list(END_POINTS) == list(trunk.layers)
    for name, info in trunk.layers.items():
        side = -(-size // info.spatial_stride)
        assert taps[name].shape == (1, info.channels, 2, side, side), name


@pytest.mark.parametrize(
    ("name", "prefix"), [("ConvLSTM", ""), ("TwoStream", "rgb."), ("TwoStream", "flow."), ("Fused3D", "flow.")]
)
def test_taps_by_the_papers_names(name: str, prefix: str) -> None:
    network = small(name, 2).eval()
    short, slim = f"{prefix}4F", f"{prefix}Mixed_4f"
    assert next(iter(network.layers)) == f"{'rgb.' if prefix else ''}Conv2d_1a_7x7"
    assert network.layers[short] == network.layers[slim]
    assert short not in list(network.layers)
    with torch.no_grad():
        taps = network(views_of(network, 1), taps=[short, slim, f"{prefix}5C", f"{prefix}3A"]).taps
    assert list(taps) == [short, slim, f"{prefix}5C", f"{prefix}3A"]
    assert torch.equal(taps[short], taps[slim])
    for tap, value in taps.items():
        assert value.shape[1] == network.layers[tap].channels
    assert taps[f"{prefix}5C"].shape[1] != taps[short].shape[1]
    for wrong in (f"{prefix}4G", f"{prefix}Mixed_4g", "4F" if prefix else "rgb.4F", f"{prefix}fusion"):
        with pytest.raises(UserError, match=f"no layer named '{wrong}'"):
            network(views_of(network, 1), taps=[wrong])


def test_a_term_and_a_teacher_take_the_papers_names() -> None:
    student = small("ConvLSTM", 2)
    teacher = build_teacher("I3D", "random", num_classes=3, num_frames=8, crop_size=SIZE, width=16, layer="4F")
    assert layer_size(teacher, "4F", "the teacher") == layer_size(student, "4F", "the student") == 208
    views = {name: torch.randn(2, 3, 8, SIZE, SIZE) for name in teacher.view_specs("test")}
    taps = teacher(views, taps=["4F", "feature_map"]).taps
    assert taps["4F"].shape[1] == 208
    assert taps["feature_map"].shape[1] == 256
    with pytest.raises(UserError, match="LAYER is '4G'"):
        build_teacher("I3D", "random", num_classes=3, num_frames=8, crop_size=SIZE, width=16, layer="4G")


# ---------------------------------------------------------------------------------------------------------- two streams
def test_two_stream_is_the_average_of_averages() -> None:
    network = small("TwoStream", 1).eval()
    views = views_of(network, 2, {"rgb": 3, "flow": 5})
    with torch.no_grad():
        nn.init.normal_(network.fc.bias)
        output = network(views)
        means = []
        for number, (stream, trunk) in enumerate((("rgb", network.rgb), ("flow", network.flow))):
            logits = []
            for frame in range(views[stream].shape[2]):
                pooled = trunk(views[stream][:, :, frame]).mean((2, 3))
                logits.append(pooled @ network.fc.weight[:, number].T + network.fc.bias[:, number])
            means.append(torch.stack(logits).mean(0))
    torch.testing.assert_close(output.logits, (means[0] + means[1]) / 2)
    assert (means[0] - means[1]).abs().max() > 1e-3
    assert output.features.shape == (2, network.feature_dim) == (2, 512)


@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_a_stream_alone_is_that_half(stream: str) -> None:
    both, alone = small("TwoStream", 2).eval(), small("TwoStream", 2, streams=stream).eval()
    number = ["rgb", "flow"].index(stream)
    with torch.no_grad():
        nn.init.normal_(both.fc.bias)
        weights = {key: value for key, value in both.state_dict().items() if key.startswith(f"{stream}.")}
        weights |= {f"fc.{key}": value[:, number : number + 1] for key, value in both.fc.state_dict().items()}
        alone.load_state_dict(weights)
        assert list(alone.view_specs("train")) == [stream]
        views = views_of(both, 2)
        found, whole = alone({stream: views[stream]}, taps=[f"{stream}.4F"]), both(views)
        streams = torch.stack([both.fc(whole.features.view(2, 2, -1)[:, part], part) for part in range(2)])
    torch.testing.assert_close(found.features, whole.features.view(2, 2, -1)[:, number])
    torch.testing.assert_close(found.logits, streams[number])
    torch.testing.assert_close(whole.logits, streams.mean(0))
    assert (streams[0] - streams[1]).abs().max() > 1e-3
    assert all(layer.startswith(f"{stream}.") for layer in alone.layers)


@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_fused_of_one_stream_fuses_its_channels_alone(stream: str) -> None:
    network = small("Fused3D", 5, streams=stream)
    views = views_of(network, 1)
    assert list(views) == [stream]
    network(views).logits.sum().backward()
    assert network.fusion[0].in_channels == 256
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(UserError, match=r"NETWORK.STREAMS is 'depth'. Allowed: both, rgb, flow"):
        small("Fused3D", 5, streams="depth")


def test_fused_runs_on_other_lengths_and_refuses_unequal_ones() -> None:
    network = small("Fused3D", 5).eval()
    with torch.no_grad():
        longer = network(views_of(network, 1, {"rgb": 7, "flow": 7}), taps=["fusion"])
    assert longer.taps["fusion"].shape == (1, 128, 7, 2, 2)
    assert longer.features.shape == (1, 128)
    with pytest.raises(UserError, match="rgb has 5 frames and flow 4 stacks"):
        network(views_of(network, 1, {"rgb": 5, "flow": 4}))


@pytest.mark.parametrize("name", ["TwoStream", "Fused3D"])
def test_views_of_two_streams(name: str) -> None:
    spec = InputSpec(num_frames=5, sampling_rate=10, target_fps=25.0, train_crop_size=SIZE, test_crop_size=96)
    with torch.device("meta"):
        network = build_network(name, num_classes=2, input=spec)
    train, test = network.view_specs("train"), network.view_specs("test")
    assert list(train) == ["rgb", "flow"]  # the clip is that of the first
    assert (train["flow"].modality, train["flow"].stack, train["rgb"].stack) == ("flow", 10, 1)
    for views, size in ((train, SIZE), (test, 96)):
        for view in views.values():
            assert (view.num_frames, view.sampling_rate, view.target_fps, view.crop_size) == (5, 10, 25.0, size)
    codes = torch.tensor([0, 255], dtype=torch.uint8).repeat(10).view(1, 20, 1, 1, 1).expand(1, 20, 5, SIZE, SIZE)
    finished = finish_views({train["flow"].pixels: codes}, {"flow": train["flow"]}, "cpu")["flow"]
    assert (finished[:, 0::2] == -1).all()
    assert (finished[:, 1::2] == 1).all()


def test_another_number_of_classes_concerns_the_classifier_alone(tmp_path: Path) -> None:
    network = small("TwoStream", 1)
    other = build_network("TwoStream", num_classes=CLASSES + 2, input=clip_of(1), width=16)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    report = load_weights(network, tmp_path / "other.pth")
    assert [mismatch.name for mismatch in report.mismatched] == ["fc.weight", "fc.bias"]
    assert torch.equal(network.flow.Mixed_5c.b0.conv.weight, other.flow.Mixed_5c.b0.conv.weight)


def test_two_streams_are_no_teachers() -> None:
    with pytest.raises(UserError, match="sees rgb and flow"):
        build_teacher("TwoStream", "random", num_classes=3, num_frames=1, crop_size=SIZE, width=4)
