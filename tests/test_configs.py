"""Every YAML file that is shipped."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from distinit_plugin import build
from distinit_plugin.config.load import load_cfg, parse_cfg, shipped_configs
from distinit_plugin.config.yaml_files import read_yaml
from distinit_plugin.video.sampling import dense_starts

ROOT = Path(__file__).resolve().parents[1]
YAML = sorted(path for folder in ("configs", "projects") for path in (ROOT / folder).rglob("*.yaml"))
FILES = [path for path in YAML if path.parent.name != "studies"]  # those are grids of runs: tests/test_study.py
LEAVES = [path for path in FILES if "_base_" not in path.parts]
DISTINIT = [path for path in LEAVES if path.parent.name == "DistInit"]
QUO_VADIS = [path for path in LEAVES if path.parent.name == "I3D"]
MAX_LEAF_LINES = 15


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def test_there_are_files():
    assert len(LEAVES) >= 30
    assert len(DISTINIT) >= 30
    assert set(shipped_configs()) == {name_of(path) for path in LEAVES if path.is_relative_to(ROOT / "configs")}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_loads_validates_and_round_trips(path):
    is_base = "_base_" in path.parts
    cfg, warnings = load_cfg(path, check=not is_base)
    assert warnings == []
    again, _ = parse_cfg(cfg.dump(), "dump", check=False)
    assert again == cfg


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaves_are_short_and_inherit(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LEAF_LINES
    if path.is_relative_to(ROOT / "configs"):
        assert "_BASE_" in read_yaml(path)


def test_readme_lists_exactly_these_files():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(configs/[^`]+\.yaml)` \|", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {name_of(path) for path in FILES if path.is_relative_to(ROOT / "configs")}


def test_every_base_is_used():
    bases = {path.resolve() for path in FILES if "_base_" in path.parts}
    used = {(path.parent / read_yaml(path)["_BASE_"]).resolve() for path in FILES if "_BASE_" in read_yaml(path)}
    assert bases <= used


def test_results_table_names_every_distinit_file_and_no_other():
    text = (ROOT / "projects" / "distinit" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:table|figure|teacher)\d*_[\w.]+)`", text))
    assert named == {path.stem for path in DISTINIT}


@pytest.mark.parametrize("path", DISTINIT, ids=lambda path: path.stem)
def test_distinit_files_fit_together(path):
    cfg, _ = load_cfg(path)
    assert f"./runs/DistInit/{path.stem}" == cfg.OUTPUT_DIR
    if path.stem.endswith("_finetune"):
        match = re.fullmatch(
            r"\./runs/DistInit/(.+_pretrain)/checkpoints/checkpoint_epoch_\d{5}\.pyth", cfg.TRAIN.CHECKPOINT_FILE_PATH
        )
        assert match
        before, _ = load_cfg(path.with_name(f"{match[1]}.yaml"))
        assert last_checkpoint(before) == cfg.TRAIN.CHECKPOINT_FILE_PATH
        assert before.MODEL.MODEL_NAME == cfg.MODEL.MODEL_NAME
        assert before.DATA.NUM_FRAMES == cfg.DATA.NUM_FRAMES
    else:
        assert cfg.TRAIN.CHECKPOINT_FILE_PATH == ""


def recipe(name):
    return load_cfg(f"configs/DistInit/{name}.yaml")[0]


def test_pretraining_recipe():
    cfg = recipe("table1_r2plus1d18_distinit_pretrain")
    solver, teacher = cfg.SOLVER, cfg.DISTILL.TEACHERS.IMAGENET
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.MAX_EPOCH) == (0.01, 1e-4, 45)
    assert solver.STEPS == [0, 10, 20, 30, 40]
    assert pytest.approx([10.0**-stage for stage in range(5)]) == solver.LRS
    assert (cfg.RUNNER.CLIPS_PER_EPOCH, cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS) == (1_000_000, 16 * 4 * 24)
    assert cfg.TRAIN.BATCH_SIZE // cfg.NUM_GPUS // cfg.RUNNER.ACCUMULATE == 24
    assert (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE) == (8, 112)
    assert (teacher.FRAME_PICK, teacher.TEMPERATURE, teacher.MAX_ENTROPY) == ("center", 1.0, -1.0)
    assert teacher.WEIGHTS == "IMAGENET1K_V1"
    assert not any(entry.LABELED for entry in cfg.CORPUS.TRAIN.values())
    assert cfg.ACTION.LOSS_WEIGHT == 0


def test_finetuning_and_scratch_recipes():
    cfg = recipe("table1_r2plus1d18_distinit_finetune")
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.MAX_EPOCH) == (0.002, 5e-3, 8)
    assert solver.STEPS == [0, 2, 4, 6]
    assert pytest.approx([1, 0.1, 0.01, 0.001]) == solver.LRS
    assert cfg.RUNNER.CLIPS_PER_EPOCH == 40_000
    assert (cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS, cfg.CORPUS.TEST_CLIPS) == (10, 1, "uniform")
    assert cfg.CORPUS.TEST.HMDB51.SUBSET == "test"
    assert not cfg.DISTILL.TEACHERS
    scratch = recipe("table1_res3d18_scratch")
    assert (scratch.SOLVER.BASE_LR, scratch.SOLVER.MAX_EPOCH, scratch.MODEL.MODEL_NAME) == (0.01, 45, "Res3D")


def test_rows_differ_as_the_tables_say():
    reference = recipe("table1_r2plus1d18_distinit_pretrain")
    mse = recipe("table3_mse_pretrain")
    assert pytest.approx(reference.SOLVER.BASE_LR / 10) == mse.SOLVER.BASE_LR
    assert mse.DISTILL.TEACHERS.IMAGENET.LOSS == "mse"
    two = recipe("table2_two_random_pretrain").DISTILL.TEACHERS.IMAGENET
    assert (two.FRAME_PICK, two.NUM_PICKED_FRAMES) == ("random", 2)
    assert set(recipe("table4_sports1m_pretrain").CORPUS.TRAIN) == {"SPORTS1M"}
    assert set(recipe("table4_kinetics_sports1m_pretrain").CORPUS.TRAIN) == {"KINETICS", "SPORTS1M"}
    assert set(recipe("teacher_places_pretrain").DISTILL.TEACHERS) == {"PLACES"}
    assert set(recipe("teacher_imagenet_places_pretrain").DISTILL.TEACHERS) == {"IMAGENET", "PLACES"}
    assert recipe("figure6_entropy_2.7_pretrain").DISTILL.TEACHERS.IMAGENET.MAX_ENTROPY == 2.7
    supervised = recipe("table1_r2plus1d18_kinetics_pretrain")
    assert (supervised.ACTION.LOSS_WEIGHT, supervised.MODEL.NUM_CLASSES) == (1.0, 400)
    assert not supervised.DISTILL.TEACHERS
    for corpus, classes in (("hmdb51", 51), ("ucf101", 101)):
        cfg = recipe(f"table6_{corpus}_32f_finetune")
        assert (32, "dense", classes) == (cfg.DATA.NUM_FRAMES, cfg.CORPUS.TEST_CLIPS, cfg.MODEL.NUM_CLASSES)
    for place in ("imagenet", "places"):
        assert recipe(f"table1_res3d18_{place}_inflated").INIT.INFLATE_FROM == "torchvision/resnet18"


# ----------------------------------------------------------------------------------------------------------- Quo Vadis
TEN_SECONDS = 250  # frames at 25 per second
NETWORKS = {
    "lstm": "ConvLSTM",
    "c3d": "C3D",
    "two_stream_rgb": "S3DG",
    "two_stream_flow": "TwoStream",
    "two_stream": "TwoStream",
    "fused3d_rgb": "Fused3D",
    "fused3d_flow": "Fused3D",
    "fused3d": "Fused3D",
    "i3d_rgb": "I3D",
    "i3d_flow": "I3D",
}
SEE_FLOW = {"two_stream", "two_stream_flow", "fused3d", "fused3d_flow", "i3d_flow"}
SINGLE_STREAMS = {"two_stream_flow": "flow", "fused3d_rgb": "rgb", "fused3d_flow": "flow"}
SNAPSHOTS = {"two_stream_rgb", "two_stream_flow"}
INTERFACES = {  # Table 1: frames, frames between them, frames of the test clip; crop and short side
    "lstm": (25, 5, 50, 224, 256),
    "c3d": (16, 1, 0, 112, 128),
    "two_stream_rgb": (1, 1, 0, 224, 256),
    "two_stream_flow": (1, 1, 0, 224, 256),
    "two_stream": (1, 10, 25, 224, 256),
    "fused3d": (5, 10, 25, 224, 256),
    "fused3d_rgb": (5, 10, 25, 224, 256),
    "fused3d_flow": (5, 10, 25, 224, 256),
    "i3d_rgb": (64, 1, 250, 224, 256),
    "i3d_flow": (64, 1, 250, 224, 256),
}


def clips_at_a_time(cfg):
    """What batch norm averages over; all of the batch must be shared out."""
    parts = cfg.NUM_GPUS * cfg.RUNNER.ACCUMULATE
    assert cfg.TRAIN.BATCH_SIZE % parts == 0
    return cfg.TRAIN.BATCH_SIZE // parts


def last_checkpoint(cfg):
    """What a training leaves behind, whatever its schedule counts in."""
    epochs = cfg.SOLVER.MAX_EPOCH
    if cfg.RUNNER.SCHEDULE_UNIT == "step":
        epochs /= cfg.RUNNER.CLIPS_PER_EPOCH // (cfg.TRAIN.BATCH_SIZE * cfg.NUM_SHARDS)
    return f"{cfg.OUTPUT_DIR}/checkpoints/checkpoint_epoch_{math.ceil(epochs):05d}.pyth"


def parts_of(path):
    found = re.fullmatch(
        rf"({'|'.join(NETWORKS)})_(kinetics|ucf101|hmdb51)(?:_(original|fixed|fullft))?_(scratch|imagenet)",
        path.stem,
    )
    assert found
    assert (found[2] == "kinetics") == (found[3] is None)
    return found.groups()


def test_results_table_names_every_quo_vadis_file_and_no_other():
    text = (ROOT / "projects" / "i3d" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:lstm|c3d|two_stream|fused3d|i3d)_\w+)`", text))
    assert named == {path.stem for path in QUO_VADIS}


@pytest.mark.parametrize("path", QUO_VADIS, ids=lambda path: path.stem)
def test_quo_vadis_files_are_what_their_names_say(path):
    network, corpus, protocol, init = parts_of(path)
    cfg, _ = load_cfg(path)
    assert f"./runs/I3D/{path.stem}" == cfg.OUTPUT_DIR
    assert NETWORKS[network] == cfg.MODEL.MODEL_NAME
    assert {"kinetics": 400, "ucf101": 101, "hmdb51": 51}[corpus] == cfg.MODEL.NUM_CLASSES
    assert [entry.FORMAT for entry in (*cfg.CORPUS.TRAIN.values(), *cfg.CORPUS.TEST.values())] == [corpus] * 2
    assert (init == "imagenet") == cfg.NETWORK.AFFINE_NORM
    assert ("classifier" if protocol == "fixed" else "all") == cfg.INIT.TRAINABLE
    from_images = init == "imagenet" and protocol in (None, "original")
    assert ("torchvision/googlenet" if from_images else "") == cfg.INIT.INFLATE_FROM
    frames = (cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE, cfg.CORPUS.TEST_NUM_FRAMES)
    assert (*frames, cfg.DATA.TRAIN_CROP_SIZE, cfg.CORPUS.TEST_SCALE) == INTERFACES[network]
    assert [cfg.CORPUS.TEST_SCALE] * 2 == cfg.DATA.TRAIN_JITTER_SCALES
    assert cfg.DATA.TEST_CROP_SIZE == cfg.DATA.TRAIN_CROP_SIZE
    channels = 2 if network == "i3d_flow" else 3
    assert (25, [0.5] * channels, [0.5] * channels) == (cfg.CORPUS.TARGET_FPS, cfg.DATA.MEAN, cfg.DATA.STD)
    assert ("flow" if network == "i3d_flow" else "rgb") == cfg.NETWORK.MODALITY
    assert SINGLE_STREAMS.get(network, "both") == cfg.NETWORK.STREAMS
    folder = {"kinetics": "kinetics400"}.get(corpus, corpus)
    assert (f"./data/{folder}/flow" if network in SEE_FLOW else "") == cfg.FLOW.STORE
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.MODEL.DROPOUT_RATE, cfg.RUNNER.SCHEDULE_UNIT) == (1e-7, 0.5, "step")
    if network == "c3d":
        assert (cfg.CORPUS.TEST_CLIPS, cfg.CORPUS.DENSE_STRIDE) == ("dense", cfg.DATA.NUM_FRAMES)
        assert len(dense_starts(TEN_SECONDS, 16, 1, cfg.CORPUS.DENSE_STRIDE)) * 16 == 240
    else:
        assert cfg.CORPUS.TEST_CLIPS == "uniform"
        assert (25 if network in SNAPSHOTS else 1) == cfg.TEST.NUM_ENSEMBLE_VIEWS


@pytest.mark.parametrize("path", QUO_VADIS, ids=lambda path: path.stem)
def test_quo_vadis_schedules(path):
    network, corpus, protocol, init = parts_of(path)
    cfg, _ = load_cfg(path)
    gpus = 64 if corpus == "kinetics" else 16
    assert gpus * (15 if network == "c3d" else 6) == cfg.TRAIN.BATCH_SIZE
    assert clips_at_a_time(cfg) == (15 if network == "c3d" else 6)
    stages = {"kinetics": [0, 97_000, 108_000, 115_000]}.get(corpus, [0, 3_000, 4_000, 5_000])
    if (network, corpus) == ("i3d_flow", "kinetics"):
        stages = [0, 97_000, 104_500, 115_000, 140_000, 150_000, 155_000]
    assert [*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_EPOCH] == stages
    assert pytest.approx([1, 0.1, 0.01] * (len(stages) // 3)) == cfg.SOLVER.LRS
    assert pytest.approx(0.1 * gpus / 64) == cfg.SOLVER.BASE_LR
    if protocol not in ("fixed", "fullft"):
        assert cfg.TRAIN.CHECKPOINT_FILE_PATH == ""
        return
    before, _ = load_cfg(path.with_name(f"{network}_kinetics_{init}.yaml"))
    assert last_checkpoint(before) == cfg.TRAIN.CHECKPOINT_FILE_PATH
    assert before.NETWORK == cfg.NETWORK


# ----------------------------------------------------------------------------------------------- commands in the texts
READMES = [
    ROOT / name
    for name in (
        "README.md",
        "configs/README.md",
        "projects/d3d/README.md",
        "projects/distinit/README.md",
        "projects/i3d/README.md",
    )
]


def documented_jobs(text):
    """Of each block of commands: (verb, configuration) of those that name a shipped file, in order."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        jobs = []
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["distinit"] or "--cfg" not in words or words[1] not in ("run", "run-splits", "probe"):
                continue
            file, opts = (
                words[words.index("--cfg") + 1],
                words[words.index("--opts") + 1 :] if "--opts" in words else [],
            )
            if (ROOT / file).is_file():
                jobs.append((words[1], load_cfg(file, opts)[0]))
        if jobs:
            yield jobs


def missing_checkpoints(text):
    """Checkpoints that a command reads and that no earlier one of its block has written."""
    for jobs in documented_jobs(text):
        written = set()
        for verb, cfg in jobs:
            teachers = [entry.WEIGHTS for entry in cfg.DISTILL.TEACHERS.values() if cfg.TRAIN.ENABLE]
            reads = [cfg.TRAIN.CHECKPOINT_FILE_PATH, *(file for file in teachers if file.endswith(".pyth"))]
            reads += [] if cfg.TRAIN.ENABLE else [cfg.TEST.CHECKPOINT_FILE_PATH]
            yield from (read for read in reads if read and Path(read) not in written)
            if verb == "run" and cfg.TRAIN.ENABLE:
                written.add(Path(last_checkpoint(cfg)))


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_documented_sequences_find_their_checkpoints(path):
    assert list(missing_checkpoints(path.read_text(encoding="utf-8"))) == []


def test_sequences_are_found_and_a_wrong_one_is_seen():
    texts = [path.read_text(encoding="utf-8") for path in READMES]
    jobs = [job for text in texts for block in documented_jobs(text) for job in block]
    assert sum(bool(cfg.TRAIN.CHECKPOINT_FILE_PATH) for _, cfg in jobs) >= 7
    quo_vadis = texts[-1]
    d3d = texts[2]
    assert list(missing_checkpoints(d3d.replace("epoch_00001", "epoch_00140"))) == [
        "./runs/D3D/kinetics400_flow/checkpoints/checkpoint_epoch_00140.pyth"
    ]
    without_step_2 = re.sub(r"^distinit run .*# step 2.*\n", "", d3d, flags=re.MULTILINE)
    assert len(list(missing_checkpoints(without_step_2))) == 2
    for wrong in (quo_vadis.replace("epoch_00002", "epoch_00115"), quo_vadis.replace("MAX_EPOCH 20", "MAX_EPOCH 200")):
        assert wrong != quo_vadis
        assert len(list(missing_checkpoints(wrong))) == 2


def test_recipes_of_the_quo_vadis_table_are_those_of_the_files():
    """Each way to share a batch out gives the file's batch, parts and last checkpoint."""
    text = (ROOT / "projects" / "i3d" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (Kinetics|UCF-101, HMDB-51) \| (\d+) \([^|\n]*?(\d+)\) \| "
        r"(\d+) GPUs, (\d+) parts of 6 \(15\) \| (.*) \|$",
        text,
        flags=re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["Kinetics", "UCF-101, HMDB-51"]
    for corpora, batch, batch_c3d, gpus, parts, ways in rows:
        names = ("kinetics",) if corpora == "Kinetics" else ("ucf101", "hmdb51")
        recipes = re.findall(r"`([^`]*)`(?: \((\d+)\))?", ways)
        assert len(recipes) == 2
        for path in QUO_VADIS:
            network, corpus, *_ = parts_of(path)
            if corpus not in names:
                continue
            cfg, _ = load_cfg(path)
            assert (int(gpus), int(parts)) == (cfg.NUM_GPUS, cfg.RUNNER.ACCUMULATE)
            assert int(batch_c3d if network == "c3d" else batch) == cfg.TRAIN.BATCH_SIZE
            for recipe, per_machine in recipes:
                words = recipe.replace("SHARD_ID i", "SHARD_ID 0").split()
                if network == "c3d" and per_machine:
                    words[words.index("TRAIN.BATCH_SIZE") + 1] = per_machine
                other, _ = load_cfg(path, words)
                assert other.TRAIN.BATCH_SIZE * other.NUM_SHARDS == cfg.TRAIN.BATCH_SIZE
                assert clips_at_a_time(other) == clips_at_a_time(cfg)
                assert last_checkpoint(other) == last_checkpoint(cfg)


@pytest.mark.parametrize("path", [path for path in QUO_VADIS if "kinetics" in path.stem], ids=lambda path: path.stem)
def test_quo_vadis_networks_build_with_the_papers_parameters(path):
    network, _, _, init = parts_of(path)
    with torch.device("meta"):
        student = build.build_network(load_cfg(path)[0])
    count = sum(parameter.numel() for parameter in student.parameters())
    # Of the BN of each Inception-v1, which has 5,592,624 parameters without them.
    factors = {"two_stream": 2 * 7_280, "fused3d": 2 * 7_280 + 512}.get(network, 7_280) if init == "imagenet" else 0
    published = {
        "lstm": 5_592_624 + 3_147_776 + 513 * 400,
        "c3d": 79_645_520,
        "two_stream_rgb": 5_592_624 + 1025 * 400,
        "two_stream_flow": 5_592_624 + 64 * 17 * 7**2 + 1025 * 400,
        "two_stream": 12_073_120 - 2 * 7_280,  # the paper's count has the factors
        "fused3d": 39_770_896 - 2 * 7_280 - 512,
        "i3d_rgb": 12_689_984,
        "i3d_flow": 12_689_984 - 64 * 7**3,
    }
    recurrent_norm = 2 * 2048 + 2 * 512 if network == "lstm" else 0
    assert count == published[network] + factors + recurrent_norm
    assert (init == "imagenet") == any(name.endswith("1a_7x7.bn.weight") for name in student.state_dict())
