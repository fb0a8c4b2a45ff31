"""The job of ``distinit compare-cost``: what networks and ensembles cost at test time, with the flow that they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from distinit_plugin import build
from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine.describe import meta_views
from distinit_plugin.engine.profile import count_macs, wait_for
from distinit_plugin.engine.timing import ROUNDS, Spread, interleave, spread
from distinit_plugin.errors import UserError, naming
from distinit_plugin.files import write_text
from distinit_plugin.jobs.session import Session, example_views, open_session
from distinit_plugin.types import ViewSpec

STEP = (1, 2)
"""Pixels, down and to the right, by which each frame of the measured clip has moved: noise would have no flow."""


@dataclass(frozen=True)
class Cost:
    """One row.

    Attributes:
        name: The configurations, joined by ``+``.
        views: What the networks see of a clip: ``rgb 3×64×224×224``.
        parameters: Of all networks.
        macs: Multiply-accumulates of all networks (convolutions and matrix products) for one clip.
        backend: What computes flow; empty: no network sees flow.
        networks: Milliseconds of the networks, one after the other.
        flow: Milliseconds of computing flow; zeros without.
        together: Milliseconds of both.
    """

    name: str
    views: str
    parameters: int
    macs: int
    backend: str
    networks: Spread
    flow: Spread
    together: Spread


@dataclass(frozen=True)
class _Network:
    """One configuration's network, ready to be timed."""

    views: str
    parameters: int
    macs: int
    flows: Mapping[str, ViewSpec]
    run: Callable[[int], None]


def compare_costs(
    rows: Sequence[Sequence[str]],
    cfgs: Mapping[str, CfgNode],
    *,
    backends: Sequence[str] = (),
    rounds: int = ROUNDS,
    device: str | None = None,
    json_file: Path | None = None,
    console: Console | None = None,
) -> list[Cost]:
    """Measure one test clip through everything, in turns, and print a table.

    Networks have random weights. Flow is computed from drawn frames, once for all networks of a row that see the same;
    whether FLOW.STORE holds it does not matter. A network or a flow that several rows have is measured once a round;
    a row is the sum of its parts, round by round.

    Args:
        rows: The names of the configurations of each row; more than one: an ensemble.
        cfgs: Name → configuration.
        backends: What computes flow, a row each; empty: FLOW.BACKEND of the configuration that sees flow.
        rounds: Counted rounds, after one that is not.
        device: ``cpu`` or ``cuda``; ``None``: a GPU where there is one.
        json_file: Also written there.
        console: Where to print; the standard output when ``None``.

    Raises:
        UserError: A network cannot be built or run on its clips, a back end is not there, or there is no GPU.
    """
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    here = {name: _on(cfg, cuda) for name, cfg in cfgs.items()}
    console = console or Console()
    with open_session(next(iter(here.values())), log_to_folder=False, console=console) as session:
        networks = {name: _ready(replace(session, cfg=cfg), name) for name, cfg in here.items()}
        plans: list[tuple[Sequence[str], str, list[str]]] = []
        flows: dict[str, Callable[[int], None]] = {}
        for names in rows:
            seen = {spec.pairs: (name, spec) for name in names for spec in networks[name].flows.values()}
            own = dict.fromkeys(here[name].FLOW.BACKEND for name, _ in seen.values())
            for backend in (backends or own) if seen else ("",):
                keys = [f"{backend} {pairs}" for pairs in seen]
                for key, (name, spec) in zip(keys, seen.values(), strict=True):
                    flows.setdefault(key, _flow_of(session.device, here[name], backend, spec))
                plans.append((names, backend, keys))
        seconds = interleave({**{name: network.run for name, network in networks.items()}, **flows}, rounds)
        place = f"{session.device.type}, {session.precision.name}, {torch.get_num_threads()} threads"
    costs = [_cost(names, backend, keys, networks, seconds) for names, backend, keys in plans]
    console.print(_table(costs, f"one test clip; {place}; medians of {rounds} rounds, quartiles below"), crop=False)
    for name, network in networks.items():
        console.print(f"{Path(name).stem}: {network.views}", highlight=False, soft_wrap=True)
    if json_file is not None:
        plain = {"device": place, "rounds": rounds, "rows": [_plain(cost) for cost in costs]}
        write_text(json_file, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    return costs


def _on(cfg: CfgNode, cuda: bool) -> CfgNode:
    """The configuration on one device of this machine."""
    own = cfg.clone()
    own.defrost()
    own.NUM_GPUS, own.NUM_SHARDS, own.SHARD_ID, own.RUNNER.CPU_RANKS = int(cuda), 1, 0, 1
    own.freeze()
    return own


def _ready(session: Session, name: str) -> _Network:
    """Build a network, count it without arithmetic, and put it and its clip on the device."""
    cfg = session.cfg
    with naming(name):
        with torch.device("meta"):
            counted = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
        assert isinstance(counted, nn.Module)
        specs = dict(counted.view_specs("test"))
        views = meta_views(specs)
        shapes = ", ".join(f"{view} {'×'.join(map(str, tensor.shape[1:]))}" for view, tensor in views.items())
        try:
            macs = count_macs(counted, views)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"the network cannot run on clips of {shapes} ({str(error).splitlines()[0][:200]})."
            ) from error
        network = build.build_network(cfg, num_classes=cfg.MODEL.NUM_CLASSES)
    session.check_convolutions(network, specs)
    module = session.place(network).eval()
    clip = example_views(specs, 1, session.device, session.memory_format)

    def run(number: int) -> None:
        with torch.inference_mode(), session.precision.autocast():
            module(clip)
        wait_for(session.device)

    return _Network(
        views=shapes,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        macs=macs,
        flows={view: spec for view, spec in specs.items() if spec.modality == "flow"},
        run=run,
    )


def _flow_of(device: torch.device, cfg: CfgNode, backend: str, spec: ViewSpec) -> Callable[[int], None]:
    """The computation of one view of flow of one clip."""
    own = cfg.clone()
    own.defrost()
    own.FLOW.BACKEND = backend
    live = build.build_live_flow(own)
    count = (spec.num_frames or 1) * spec.stack
    frames = moving_frames(count + 1, spec.crop_size).to(device)
    pairs = torch.cat([frames[:, :-1], frames[:, 1:]])[None]

    def run(number: int) -> None:
        live(pairs, spec.stack)
        wait_for(device)

    return run


def moving_frames(count: int, size: int) -> Tensor:
    """A texture that moves by :data:`STEP` from frame to frame: uint8 (3,count,size,size)."""
    generator = torch.Generator().manual_seed(0)
    texture = torch.zeros(1, 3, size, size)
    for cells in (4, 12, 36):
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        texture += F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    texture = ((texture - texture.min()) / (texture.max() - texture.min()) * 255)[0].to(torch.uint8)
    down, right = STEP
    return torch.stack([texture.roll((down * number, right * number), dims=(1, 2)) for number in range(count)], dim=1)


def _cost(
    names: Sequence[str],
    backend: str,
    flows: Sequence[str],
    networks: Mapping[str, _Network],
    seconds: Mapping[str, Sequence[float]],
) -> Cost:
    rounds = range(len(seconds[names[0]]))
    of_networks = [1000 * sum(seconds[name][number] for name in names) for number in rounds]
    of_flow = [1000 * sum(seconds[key][number] for key in flows) for number in rounds]
    return Cost(
        name=" + ".join(Path(name).stem for name in names),
        views="; ".join(dict.fromkeys(networks[name].views for name in names)),
        parameters=sum(networks[name].parameters for name in names),
        macs=sum(networks[name].macs for name in names),
        backend=backend,
        networks=spread(of_networks),
        flow=spread(of_flow),
        together=spread(sum(parts) for parts in zip(of_networks, of_flow, strict=True)),
    )


def _table(costs: Sequence[Cost], title: str) -> Table:
    """A row each; 80 columns hold it."""
    table = Table(title=title, title_justify="left")
    table.add_column("configurations", overflow="fold")
    for column in ("M para-\nmeters", "GMACs", "networks", "flow", "together"):
        table.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        flow = f"{_time(cost.flow)}\n{cost.backend}" if cost.backend else "–"
        size = (f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.2f}")
        table.add_row(cost.name.replace(" + ", "\n+ "), *size, _time(cost.networks), flow, _time(cost.together))
    return table


def _time(value: Spread) -> str:
    """``13.4 s`` with the quartiles below, three digits each."""
    factor, unit = (1000, "s") if value.high >= 999.5 else (1, "ms")
    low, median, high = (part / factor for part in value)
    return f"{median:.3g} {unit}\n{low:.3g}…{high:.3g}"


def _plain(cost: Cost) -> dict[str, object]:
    plain = asdict(cost)
    for key in ("networks", "flow", "together"):
        plain[key] = getattr(cost, key)._asdict()
    return plain
