"""What a step hands to a GPU does not wait for it. No GPU is needed: tensors on it are pretended, without values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linear_networks import make_views, two_teachers
from test_models import REGISTERED, build_with_views
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distinit_plugin.data.views import finish_views
from distinit_plugin.detection import anchors, matching
from distinit_plugin.engine import run_ahead
from distinit_plugin.engine.guard import FiniteGuard
from distinit_plugin.engine.meters import MeanMeter
from distinit_plugin.flow import motion
from distinit_plugin.models.maps import two_pathways
from distinit_plugin.types import ViewSpec

GPU = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Notes each operation for which PyTorch stops the host until a GPU has done all that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        places = [value.device.type for value in args if isinstance(value, Tensor)]
        indices = [index for index in args[1] if isinstance(index, Tensor)] if name in ("index", "index_put_") else []
        goes_to = torch.device(kwargs.get("device") or (places or ["cpu"])[0]).type
        copies = name == "_to_copy" and goes_to != places[0] and not kwargs.get("non_blocking")
        copies |= name == "copy_" and len(set(places)) > 1 and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2") and "cuda" in places
        picks = "cuda" in places and any(index.dtype == torch.bool or index.device.type == "cpu" for index in indices)
        if copies or reads or picks:
            self.found.append(f"{name} {places} → {goes_to}")
        return func(*args, **kwargs)


@pytest.fixture
def pretended() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def boxes(count: int) -> Tensor:
    return torch.empty(count, 4, device=GPU)


def flow(channels: int = 2) -> Tensor:
    return torch.empty(2, channels, 8, 14, 14, device=GPU)


WORK: dict[str, Callable[[], Any]] = {
    "views": lambda: finish_views(
        {spec().pixels: torch.empty(2, 3, 4, 8, 8, dtype=torch.uint8)}, {"student/rgb": spec()}, GPU
    ),
    "pathways": lambda: two_pathways(torch.empty(2, 3, 8, 4, 4, device=GPU), 4),
    "offsets of boxes": lambda: matching.decode(boxes(5), matching.encode(boxes(5), boxes(5))),
    "anchors": lambda: anchors.level_anchors([32.0, 64.0], (4, 4), (16, 16), GPU),
    "flow of a view": lambda: motion.codes_to_flow(flow(), (0.5, 0.5), (0.5, 0.5), 20.0),
    "view of a flow": lambda: motion.flow_to_view(flow(), (0.5, 0.5), (0.5, 0.5), 20.0),
    "flow on a grid": lambda: motion.polar_loss(flow(3)[:, :, :4, :7, :7], motion.flow_on_grid(flow(), (4, 7, 7))),
    "flow for each frame": lambda: motion.enlarge_flow(flow(), (16, 28, 28)),
}


def spec() -> ViewSpec:
    return ViewSpec("rgb", 4, 1, None, "clip", 1, 8, (0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


@pytest.mark.parametrize("name", WORK)
def test_nothing_in_a_step_waits(name: str, pretended: FakeTensorMode) -> None:
    with Waits() as waits:
        WORK[name]()
    assert waits.found == []


def test_losses_meters_and_the_guard_wait_only_when_they_are_read(pretended: FakeTensorMode) -> None:
    with torch.device(GPU):
        objective, views = two_teachers(), make_views(4)
    meter, guard = MeanMeter(), FiniteGuard(every_step=False)
    with Waits() as waits:
        output = objective(views, {})
        guard.watch(0, output.loss, output.terms, [])
        meter.update({"loss": output.loss, **output.terms}, output.normalizer)
        meter.update(output.report, output.report_weights)
    assert output.loss.device == GPU
    assert waits.found == []


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("training", [True, False])
def test_networks_run_on_a_gpu_without_a_wait(name: str, training: bool) -> None:
    """Tensors that a network makes or keeps elsewhere would be told here, too: operations refuse two devices."""
    network, views = build_with_views(name)
    network.train(training)
    with FakeTensorMode() as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a GPU that is not there
        kept = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        state = {key: torch.empty_like(mode.from_tensor(value), device=GPU) for key, value in kept.items()}
        clips = {view: torch.empty(clip.shape, device=GPU) for view, clip in views.items()}
        with Waits() as waits, torch.autocast("cuda", torch.bfloat16):
            output = torch.func.functional_call(network, state, (clips,), {"taps": list(network.layers)})
    assert output.logits is not None
    assert {tensor.device for tensor in (output.logits, output.features, *output.taps.values())} == {GPU}
    assert waits.found == []


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.tensor([1.0, 2.0], device=GPU),
        lambda: torch.tensor([1.0]).to(GPU),
        lambda: torch.empty(3, device=GPU).cpu(),
        lambda: torch.empty(4, device=GPU)[[0, 2]],
    ],
)
def test_waits_are_found(work: Callable[[], Any], pretended: FakeTensorMode) -> None:
    with Waits() as waits:
        work()
    assert waits.found


# ------------------------------------------------------------------------------------------------------ how far ahead
def test_the_host_is_a_few_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noted:
        count = 0

        def __init__(self, *, blocking: bool) -> None:
            assert blocking
            self.number, Noted.count = Noted.count, Noted.count + 1

        def record(self) -> None:
            order.append(f"give {self.number}")

        def synchronize(self) -> None:
            order.append(f"wait for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Noted)
    ahead = run_ahead.RunAhead(GPU)
    for _ in range(4):
        ahead.step_given()
    assert order == ["give 0", "give 1", "give 2", "wait for 0", "give 3", "wait for 1"]


def test_a_cpu_has_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "Event")
    run_ahead.RunAhead(torch.device("cpu")).step_given()
