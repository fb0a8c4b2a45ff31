"""Keyframes from configurations: keys, files, what is built, and what is told before a job begins."""

import shutil

import numpy as np
import pytest
from good_configs import problems

from distinit_plugin import build, load_cfg
from distinit_plugin.config.paths import path_problems
from distinit_plugin.config.validate import validate
from distinit_plugin.detection.files import read_truth
from distinit_plugin.errors import ConfigError, UserError
from distinit_plugin.jobs.corpora import Corpora
from distinit_plugin.jobs.preflight import check_job
from distinit_plugin.types import ACTIONS, BOXES, ViewSpec

BOXES_ON = ["DETECTION.ENABLE", "True", "ACTION.LOSS", "bce", "ACTION.LOSS_WEIGHT", "1"]
GOOD = [*BOXES_ON, "AVA.ANNOTATION_DIR", "annotations", "KEYFRAMES.VIDEO_DIR", "videos"]
SPEC = ViewSpec(num_frames=4, sampling_rate=2, target_fps=30, crop_size=48)


@pytest.mark.parametrize(
    ("key", "value", "message", "further"),
    [
        ("AVA.ANNOTATION_DIR", "", "Name the folder of the csv files", []),
        ("KEYFRAMES.VIDEO_DIR", "", "there are no pictures", []),
        ("KEYFRAMES.VIDEO_DIR", "videos", "Leave one of the two empty", ["AVA.FRAME_DIR", "frames"]),
        ("AVA.TRAIN_GT_BOX_LISTS", "[]", "nothing to learn from", []),
        ("AVA.TRAIN_GT_BOX_LISTS", "a.csv", "is not a list", []),
        ("AVA.TRAIN_PREDICT_BOX_LISTS", "[3]", "put it in quotes", []),
        ("AVA.TRAIN_PREDICT_BOX_LISTS", "['']", "each entry any text but the empty one", []),
        ("AVA.TEST_PREDICT_BOX_LISTS", "[]", "distinit detect-persons writes one", []),
        ("AVA.GROUNDTRUTH_FILE", "", "validation and test compare with it", []),
        ("AVA.DETECTION_SCORE_THRESH", "1.5", "≤ 1", []),
        ("AVA.TRAIN_LIST", "[a]", "Did you mean TRAIN_LISTS", []),
        ("KEYFRAMES.SECONDS", "[5, 4]", "[first, last]", []),
        ("KEYFRAMES.SECONDS", "[5]", "exactly 2 entries", []),
        ("KEYFRAMES.FRAMES_FPS", "0", "a number > 0", []),
        ("KEYFRAMES.TEST_BOXES", "groundtruth", "Did you mean ground_truth", []),
        ("KEYFRAMES.LABEL_IOU", "0.9", "one of the two lists is empty", []),
        ("DATA.TRAIN_PCA_EIGVAL", "[1, 2]", "exactly 3 entries", []),
        ("DATA.TRAIN_PCA_EIGVEC", "[[1, 2], [3, 4], [5, 6]]", "exactly 3 entries", []),
        ("CORPUS.TRAIN.X.PATH", "x", "Leave it empty", []),
        ("DATA.PATH_TO_DATA_DIR", "x", "Leave it empty", []),
        ("CORPUS.TEST_SCALE", "128", "has no effect with DETECTION.ENABLE", []),
        ("CORPUS.TEST_CLIPS", "dense", "one clip for each keyframe", []),
        ("TRAIN.DATASET", "ava", "Set that True", ["DETECTION.ENABLE", "False"]),
    ],
)
def test_bad_values_give_their_messages(key, value, message, further):
    found = problems([*GOOD, *further, key, value])
    assert any(problem.startswith(key.removesuffix(".X.PATH")) and message in problem for problem in found), found


@pytest.mark.parametrize(
    "good",
    [
        [],
        ["TRAIN.DATASET", "ava", "TEST.DATASET", "ava"],
        ["KEYFRAMES.VIDEO_DIR", "", "AVA.FRAME_DIR", "frames", "AVA.FRAME_LIST_DIR", "lists"],
        ["AVA.TEST_PREDICT_BOX_LISTS", "[]", "KEYFRAMES.TEST_BOXES", "ground_truth"],
        ["AVA.TRAIN_PREDICT_BOX_LISTS", "['p.csv']", "KEYFRAMES.LABEL_IOU", "0.9"],
        ["DATA.TRAIN_PCA_EIGVAL", "[0.2175, 0.0188, 0.0045]", "AVA.TRAIN_USE_COLOR_AUGMENTATION", "True"],
    ],
)
def test_good_values(good):
    _, warnings = load_cfg([], [*GOOD, *good])
    assert warnings == []


def test_keys_of_pyslowfast_that_are_not_honoured_are_named():
    _, warnings = load_cfg([], [*GOOD, "AVA.BGR", "True", "AVA.IMG_PROC_BACKEND", "cv2"])
    assert len(warnings) == 1
    assert warnings[0].startswith("AVA.BGR is True")


def test_missing_files_are_told_with_their_keys(tmp_path):
    opts = [*BOXES_ON, "OUTPUT_DIR", str(tmp_path / "run"), "AVA.ANNOTATION_DIR", str(tmp_path)]
    cfg, _ = load_cfg([], [*opts, "KEYFRAMES.VIDEO_DIR", str(tmp_path / "videos")])
    assert [problem.partition(":")[0] for problem in path_problems(cfg)] == [
        "KEYFRAMES.VIDEO_DIR",
        *(f"AVA.{key}" for key in ("GROUNDTRUTH_FILE", "LABEL_MAP_FILE", "EXCLUSION_FILE", "TRAIN_GT_BOX_LISTS")),
        "AVA.TEST_PREDICT_BOX_LISTS",
    ]
    frames = ["AVA.FRAME_DIR", str(tmp_path / "frames"), "AVA.FRAME_LIST_DIR", str(tmp_path / "lists")]
    cfg, _ = load_cfg([], [*opts, *frames, "AVA.ANNOTATION_DIR", str(tmp_path / "no")])
    with pytest.raises(ConfigError) as caught:
        validate(cfg, check_paths=True)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        *("AVA.FRAME_DIR", "AVA.FRAME_LIST_DIR", "AVA.ANNOTATION_DIR")
    ]


# --------------------------------------------------------------------------------------------------- what is built
def config(persons, *opts, source="videos", annotations=None):
    small = ["DATA.NUM_FRAMES", "4", "DATA.TRAIN_JITTER_SCALES", "[48, 60]", "DATA.TRAIN_CROP_SIZE", "48"]
    where = ["AVA.ANNOTATION_DIR", str(annotations)] if annotations else []
    cfg, _ = load_cfg([], [*BOXES_ON, *persons.options(source), *small, *where, *map(str, opts)])
    return cfg


def samples(cfg, split):
    keyframes = build.build_records(cfg, split)
    dataset = build.build_dataset(cfg, keyframes, {"student/rgb": SPEC}, split, keep_index=False)
    if split == "train":
        loader = build.build_train_loader(cfg, dataset, build.build_train_sampler(cfg, keyframes), num_workers=0)
    else:
        loader = build.build_test_loader(cfg, dataset)
    return keyframes, list(loader)


def test_training_and_test_from_a_configuration(persons):
    opts = ["TRAIN.BATCH_SIZE", 2, "TEST.BATCH_SIZE", 2, "DATA_LOADER.NUM_WORKERS", 0]
    for source in ("videos", "frames"):
        cfg = config(persons, *opts, source=source)
        assert build.has_corpus(cfg, "train")
        keyframes, batches = samples(cfg, "train")
        assert len(batches) == len(keyframes) // 2
        assert keyframes.class_names[0] == "stand"
        assert batches[0]["targets"][ACTIONS].shape[1] == 8
        keyframes, batches = samples(cfg, "test")
        assert sum(len(batch["keys"]) for batch in batches) == len(keyframes)
        assert ACTIONS not in batches[0]["targets"]
        seconds = [keyframes.moment(key.index).second for batch in batches for key in batch["keys"]]
        assert {int(second) for second in seconds} == {902, 903, 904, 905}
    flipped = config(persons, *opts, "AVA.TEST_FORCE_FLIP", True)
    _, batches = samples(flipped, "test")
    assert all(region.flip for batch in batches for region in batch["regions"])


def test_validation_takes_every_fourth_second(persons):
    seconds = {}
    for full in (False, True):
        keyframes = build.build_keyframes(config(persons, "AVA.FULL_TEST_ON_VAL", full), "val")
        seconds[full] = set(keyframes.seconds)
    assert seconds[False] == {904.0}
    assert seconds[True] == {902.0, 903.0, 904.0, 905.0}


def test_boxes_of_a_test(persons):
    truth = build.build_keyframes(config(persons, "KEYFRAMES.TEST_BOXES", "ground_truth"), "test")
    predicted = build.build_keyframes(config(persons), "test")
    every = build.build_keyframes(config(persons, "AVA.DETECTION_SCORE_THRESH", 0), "test")
    proposed = build.build_keyframes(config(persons, "ROI.PROPOSALS", "own"), "test")
    assert truth.has_actions
    assert predicted.num_boxes == truth.num_boxes
    assert every.num_boxes > predicted.num_boxes
    assert not proposed.has_boxes
    assert len(proposed) == len(truth)
    excluded = build.build_keyframes(config(persons, "AVA.EXCLUSION_FILE", ""), "test")
    assert {excluded.moment(i) for i in range(len(excluded))} - {
        predicted.moment(i) for i in range(len(predicted))
    } == {(persons.names("val")[-1], 905.0)}


def test_predicted_boxes_of_a_training(persons):
    lists = ["AVA.TRAIN_PREDICT_BOX_LISTS", "['ava_train_predicted_boxes.csv']"]
    alone = build.build_keyframes(config(persons), "train")
    both = build.build_keyframes(config(persons, *lists), "train")
    labelled = build.build_keyframes(config(persons, *lists, "KEYFRAMES.LABEL_IOU", 0.5), "train")
    assert both.num_boxes == 2 * alone.num_boxes
    assert labelled.num_boxes == both.num_boxes  # what has no match is below the score
    without = sum(int((both.actions(i, 8).sum(axis=1) == 0).sum()) for i in range(len(both)))
    assert without == alone.num_boxes
    assert all((labelled.actions(i, 8).sum(axis=1) >= 2).all() for i in range(len(labelled)))


def test_settings_reach_the_dataset(persons):
    table = read_truth(persons.annotations / "ava_train_v2.2.csv")
    cfg = config(persons, "KEYFRAMES.SECONDS", [903, 904])
    keyframes = build.build_keyframes(cfg, "train")
    assert set(keyframes.seconds) == {903.0, 904.0} & set(table.seconds)
    sample = build.build_dataset(cfg, keyframes, {"student/rgb": SPEC}, "train")
    plain = sample[(0, 0, 0)]
    for key, value in (
        ("AVA.TRAIN_USE_COLOR_AUGMENTATION", True),
        ("RNG_SEED", 3),
        ("DATA.TRAIN_JITTER_SCALES", [70, 90]),
    ):
        other = config(persons, "KEYFRAMES.SECONDS", [903, 904], key, value)
        changed = build.build_dataset(other, keyframes, {"student/rgb": SPEC}, "train")[(0, 0, 0)]
        assert not np.array_equal(plain["views"][SPEC.pixels], changed["views"][SPEC.pixels]), key
    pca = config(persons, "AVA.TRAIN_USE_COLOR_AUGMENTATION", True, "KEYFRAMES.SECONDS", [903, 904])
    shifted = build.build_dataset(pca, keyframes, {"student/rgb": SPEC}, "train")[(0, 0, 0)]["views"][SPEC.pixels]
    difference = shifted.numpy().astype(int) - plain["views"][SPEC.pixels].numpy()
    inner = (plain["views"][SPEC.pixels].numpy() > 60) & (plain["views"][SPEC.pixels].numpy() < 190)
    for channel in range(3):  # PCA jitter alone adds one number to each colour
        assert np.ptp(difference[channel][inner[channel]]) <= 1
    assert plain["targets"][BOXES].shape[1] == 4


# ----------------------------------------------------------------------------------------------- before the job begins
@pytest.fixture
def annotations(persons, tmp_path):
    return shutil.copytree(persons.annotations, tmp_path / "annotations")


def told(cfg):
    with pytest.raises(ConfigError) as caught:
        check_job(cfg, Corpora(cfg))
    return caught.value.problems


def test_wrong_actions_are_told_before_the_job(persons, annotations, tmp_path):
    opts = ["OUTPUT_DIR", tmp_path / "run"]
    check_job(config(persons, *opts), Corpora(config(persons, *opts)))
    with open(annotations / "ava_train_v2.2.csv", "a") as file:
        file.write("train_0000,0902,0.1,0.1,0.2,0.2,9,0\n")
    (problem,) = told(config(persons, *opts, annotations=annotations))
    assert "1 actions do not fit MODEL.NUM_CLASSES 8" in problem
    assert "train_0000 at 902 s has 9" in problem


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ava_val_predicted_boxes.csv", "", "no keyframe is left. Of it: 0 rows"),
        ("ava_val_predicted_boxes.csv", "val_0000,0904,0.1,0.1,0.2,0.2,,0.5\n", "0 with a score of at least 0.9"),
        ("ava_train_v2.2.csv", "train_0000,12,0.1,0.1,0.2,0.2,1,0\n", "902 to 1798 (KEYFRAMES.SECONDS)"),
        ("ava_train_v2.2.csv", "train_0000,902,0.1,0.1,0.2\n", "AVA.TRAIN_GT_BOX_LISTS"),
        ("ava_train_v2.2.csv", "other,902,0.1,0.1,0.2,0.2,1,0\n", "no pictures of any of its 1 videos"),
        ("ava_action_list_v2.2_for_activitynet_2019.pbtxt", "x", "AVA.LABEL_MAP_FILE"),
        ("ava_val_excluded_timestamps_v2.2.csv", "x", "AVA.EXCLUSION_FILE"),
    ],
)
def test_wrong_files_are_told_before_the_job(persons, annotations, tmp_path, name, text, message):
    (annotations / name).write_text(text)
    found = told(config(persons, "OUTPUT_DIR", tmp_path / "run", annotations=annotations))
    assert any(message in problem for problem in found), found
    assert len(found) <= 2  # validation and test have names of their own


def test_videos_that_do_not_open_are_told_before_the_job(persons, tmp_path):
    for name in (*persons.names("train"), *persons.names("val")):
        (tmp_path / f"{name}.mp4").write_bytes(b"no video")
    found = told(config(persons, "KEYFRAMES.VIDEO_DIR", tmp_path, "OUTPUT_DIR", tmp_path / "run"))
    assert any("none of the videos of" in problem and "distinit check-ava" in problem for problem in found), found


def test_jobs_of_clips_refuse_keyframes(persons):
    with pytest.raises(UserError, match=r"DETECTION.ENABLE: True, but this job works on clips"):
        Corpora(config(persons)).clips("train")


def test_a_video_in_two_lists_of_frames_is_refused(persons):
    cfg = config(persons, "AVA.TRAIN_LISTS", ["train.csv", "train.csv"], source="frames")
    with pytest.raises(
        UserError, match=r"AVA.TRAIN_LISTS: the frames of train_0000 stand in train.csv and in a list before"
    ):
        build.build_keyframes(cfg, "train")


def test_notes_are_said_once(persons, annotations, caplog):
    with open(annotations / "ava_train_v2.2.csv", "a") as file:
        file.write("gone,0902,0.1,0.1,0.2,0.2,1,0\n")
    cfg = config(persons, annotations=annotations)
    corpora = Corpora(cfg)
    corpora.peek("train")
    caplog.clear()
    corpora.of("train")
    corpora.of("train")
    assert [record.message for record in caplog.records] == [
        "ava_train_v2.2.csv: 1 of 4 videos are annotated but have no pictures: gone. Their keyframes count as bad."
    ]
