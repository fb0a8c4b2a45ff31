"""The YAML files of D3D fit together and differ as the paper's tables say."""

import re

import pytest
import torch
import yaml
from test_configs import LEAVES, QUO_VADIS, ROOT, TEN_SECONDS, clips_at_a_time, last_checkpoint

from distinit_plugin import build
from distinit_plugin.config.load import load_cfg

D3D = [
    path
    for path in LEAVES
    if path.parent.name == "D3D" and not path.stem.startswith(("flow_", "probe_"))  # tests/test_configs_motion.py
]

UNTRAINED = {"WEIGHTS": "random", "CACHE": ""}
"""Of teachers whose checkpoints and caches are not here."""


def d3d(name, *words):
    return load_cfg(ROOT / "configs" / "D3D" / f"{name}.yaml", words)[0]


def plain(cfg, *without):
    """Everything in a configuration but some nodes."""
    return {key: value for key, value in yaml.safe_load(cfg.dump()).items() if key not in without}


def test_results_table_names_every_d3d_file_and_no_other():
    text = (ROOT / "projects" / "d3d" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:kinetics\d00|table6|ucf101|hmdb51|any_pair)_\w+)`", text))
    assert named == {path.stem for path in D3D}
    elsewhere = re.findall(r"`(I3D/\w+)`", text)
    assert elsewhere
    assert all((ROOT / "configs" / f"{name}.yaml").is_file() for name in elsewhere)


def test_runs_that_the_d3d_table_joins_are_written_by_its_files():
    text = (ROOT / "projects" / "d3d" / "README.md").read_text(encoding="utf-8")
    ensembles = " ".join(re.findall(r"distinit ensemble [^`|]*", text))
    joined = set(re.findall(r"runs/((?:D3D|I3D)/[a-z]\w+)", ensembles))
    written = {f"{path.parent.name}/{path.stem}" for path in (*D3D, *QUO_VADIS)}
    assert {"D3D/kinetics400_flow", "D3D/ucf101_d3d_k600"} < joined <= written


@pytest.mark.parametrize("path", D3D, ids=lambda path: path.stem)
def test_d3d_files_fit_together(path):
    """Whatever a file reads is the last checkpoint of the file that makes it, of the same network."""
    cfg, _ = load_cfg(path)
    assert f"./runs/D3D/{path.stem}" == cfg.OUTPUT_DIR
    read = [(file, cfg.NETWORK, cfg.MODEL) for file in (cfg.TRAIN.CHECKPOINT_FILE_PATH, cfg.TEST.CHECKPOINT_FILE_PATH)]
    for entry in cfg.DISTILL.TEACHERS.values():
        read.append((entry.WEIGHTS, entry.NETWORK, None))
        assert entry.NUM_CLASSES == cfg.MODEL.NUM_CLASSES
        assert (entry.CLASS_REDUCTION, entry.NORMALIZE, entry.WARMUP) == ("mean", "none", 0)
        assert {"flow": "./data/kinetics400/flow", "rgb": ""}[entry.NETWORK.MODALITY] == cfg.FLOW.STORE.replace(
            "600", "400"
        )
    found = 0
    for file, network, model in read:
        if not file:
            continue
        match = re.fullmatch(r"\./runs/((?:D3D|I3D)/\w+)/checkpoints/checkpoint_epoch_\d{5}\.pyth", file)
        assert match
        before, _ = load_cfg(ROOT / "configs" / f"{match[1]}.yaml")
        assert last_checkpoint(before) == file
        assert network == before.NETWORK
        assert model is None or model.MODEL_NAME == before.MODEL.MODEL_NAME
        found += 1
    assert found == (0 if re.fullmatch(r"kinetics\d00_(flow|rgb)", path.stem) else 1)


@pytest.mark.parametrize("path", D3D, ids=lambda path: path.stem)
def test_d3d_schedules(path):
    cfg, _ = load_cfg(path)
    target = path.stem.startswith(("ucf101", "hmdb51"))
    gpus, steps = (10, 10_000) if target else (64, 140_000)
    assert (gpus * 6, 6) == (cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS, clips_at_a_time(cfg))
    assert [*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_EPOCH] == [0, 60 * steps // 80, 70 * steps // 80, steps]
    assert pytest.approx([1, 0.1, 0.01]) == cfg.SOLVER.LRS
    assert pytest.approx(0.1 * gpus / 64) == cfg.SOLVER.BASE_LR
    assert (cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.RUNNER.SCHEDULE_UNIT) == (0.9, 1e-7, "step")
    assert (cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE, cfg.CORPUS.TARGET_FPS) == (64, 1, 25)
    assert (cfg.CORPUS.TEST_NUM_FRAMES, cfg.TEST.NUM_ENSEMBLE_VIEWS) == (TEN_SECONDS, 1)
    assert all(corpus.LABELED for use in ("TRAIN", "TEST") for corpus in cfg.CORPUS[use].values())
    assert (path.stem == "table6_without_action") == (cfg.ACTION.LOSS_WEIGHT == 0)
    assert not (target and cfg.DISTILL.TEACHERS)


def test_rows_of_d3d_differ_as_table_6_says():
    reference = d3d("kinetics400_d3d")
    teacher = reference.DISTILL.TEACHERS.FLOW
    assert (teacher.HEAD, teacher.LOSS, teacher.LAYER, teacher.LOSS_WEIGHT) == ("own", "mse", "logits", 1)
    assert teacher.NETWORK.MODALITY == "flow"
    for layer, weight in (("2C", 1), ("4C", 1), ("4F", 100)):
        cfg = d3d(f"table6_{layer.lower()}")
        assert plain(cfg, "OUTPUT_DIR", "DISTILL") == plain(reference, "OUTPUT_DIR", "DISTILL")
        entry = cfg.DISTILL.TEACHERS.FLOW
        assert {key: value for key, value in entry.items() if value != teacher[key]} == (
            {"LAYER": layer, "LOSS_WEIGHT": weight} if weight > 1 else {"LAYER": layer}
        )
    silent = d3d("table6_without_action")
    assert plain(silent, "OUTPUT_DIR", "ACTION") == plain(reference, "OUTPUT_DIR", "ACTION")
    spatial, rgb = d3d("table6_from_rgb"), d3d("kinetics400_rgb")
    assert spatial.DISTILL.TEACHERS.RGB.NETWORK == rgb.NETWORK
    assert set(spatial.DISTILL.TEACHERS) == {"RGB"}
    assert plain(spatial, "OUTPUT_DIR", "DISTILL") == plain(rgb, "OUTPUT_DIR", "DISTILL")
    without = d3d("table6_without_distillation")
    assert plain(without, "OUTPUT_DIR", "DISTILL", "FLOW") == plain(rgb, "OUTPUT_DIR", "DISTILL", "FLOW")
    assert build.build_teachers(without) == {}
    for name in ("flow", "rgb", "d3d", "d3d_test"):
        one, other = (d3d(f"kinetics{classes}_{name}") for classes in (400, 600))
        assert one.RUNNER == other.RUNNER
        texts = [yaml.safe_dump(plain(cfg, "RUNNER")) for cfg in (one, other)]
        assert texts[0] != texts[1]
        assert re.sub(r"(kinetics|NUM_CLASSES: )400", r"\g<1>600", texts[0]) == texts[1]


@pytest.mark.parametrize("path", D3D, ids=lambda path: path.stem)
def test_d3d_networks_build_and_fit(path):
    """Student, teachers and terms, without memory; the objective checks sizes and layers."""
    names = load_cfg(path)[0].DISTILL.TEACHERS
    untrained = {f"DISTILL.TEACHERS.{name}.{key}": value for name in names for key, value in UNTRAINED.items()}
    cfg, _ = load_cfg(path, [word for pair in untrained.items() for word in pair])
    with torch.device("meta"):
        student, teachers = build.build_network(cfg), build.build_teachers(cfg)
        objective = build.build_objective(cfg, student, teachers)
    expected = {"action"} if cfg.ACTION.LOSS_WEIGHT else set()
    assert {term.name for term in objective.terms} == expected | {n for n, e in names.items() if e.LOSS_WEIGHT}
    specs = build.view_specs(student, teachers, "train")
    assert {spec.num_frames for spec in specs.values()} == {64}
    assert {name.partition("/")[0] for name in specs} == {"student", *teachers}
