"""A configuration that is right in every way, from which the tests of bad ones start."""

import pytest

from distinit_plugin.config.load import load_cfg
from distinit_plugin.errors import ConfigError

# A job that is right in every way: each test of a bad override starts from it.
GOOD = [
    *("DISTILL.TEACHERS.IMAGENET.ARCH", "torchvision/resnet50", "DISTILL.TEACHERS.IMAGENET.NUM_CLASSES", "1000"),
    *("CORPUS.TRAIN.VIDEOS.PATH", "videos", "TEST.ENABLE", "False"),
]
LABELLED = [
    *("ACTION.LOSS_WEIGHT", "1", "CORPUS.TRAIN.VIDEOS.LABELED", "True"),
    *("TEST.ENABLE", "True", "CORPUS.TEST.VIDEOS.PATH", "videos", "CORPUS.TEST.VIDEOS.LABELED", "True"),
]
TEACHER = "DISTILL.TEACHERS.IMAGENET"


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(opts, paths=()):
    with pytest.raises(ConfigError) as caught:
        load_cfg(list(paths), opts)
    return caught.value.problems
