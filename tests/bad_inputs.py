"""What the tables of bad inputs share: a small world of videos and weights, and one case end to end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from small_jobs import (
    brightness_teacher,
    checkpoint,
    labelled,
    merged,
    small_cfg,
    small_settings,
    write_teacher,
    write_videos,
)

from distinit_plugin import cli
from distinit_plugin.jobs.running import run


class World:
    """Good videos, a teacher, a fine-tuned run: what each case spoils in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.videos = write_videos(folder / "videos")
        self.teacher = write_teacher(folder / "teacher.pth")
        self.run = folder / "trained"
        run(small_cfg(self.videos, self.run, **labelled(self.videos, TRAIN="train")))
        self.trained = checkpoint(self.run)


class Place:
    """One case's own folder, with the files that it makes."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.output = folder / "run"

    def file(self, name: str, contents: str | bytes) -> Path:
        """Write a file below the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return path

    def yaml(self, contents: str | bytes) -> list[str]:
        """Run a YAML file of these characters."""
        return ["run", "--cfg", str(self.file("job.yaml", contents))]

    def job(self, *opts: object, verb: str = "run", **sections: Any) -> list[str]:
        """A job that distils and would be good, with ``sections`` over its YAML and ``opts`` after it."""
        teachers = {"DISTILL": {"TEACHERS": {"LIGHT": brightness_teacher(self.world.teacher)}}}
        return self._write(verb, merged(teachers, sections), opts)

    def labels(self, *opts: object, verb: str = "run", **sections: Any) -> list[str]:
        """A job that trains and tests on labels and would be good."""
        base = {**labelled(self.world.videos), "TEST": {"ENABLE": True}}
        return self._write(verb, merged(base, sections), opts)

    def listed(self, rows: str | bytes, use: str = "TRAIN", **keys: Any) -> list[str]:
        """As ``labels``, with a csv of these rows for one use."""
        path = self.file("list.csv", rows)
        entry = {"FORMAT": "csv", "PATH": str(path), "ROOT": str(self.world.videos), "LABELED": True, **keys}
        return self.labels(CORPUS={use: {"VIDEOS": entry}})

    def copy(self, name: str = "videos") -> Path:
        """The world's videos, to be spoilt."""
        return Path(shutil.copytree(self.world.videos, self.folder / name))

    def _write(self, verb: str, sections: dict[str, Any], opts: tuple[object, ...]) -> list[str]:
        settings = small_settings(self.world.videos, self.output, **sections)
        words = [verb, "--cfg", str(self.file("job.yaml", yaml.safe_dump(settings)))]
        return [*words, *(["--opts", *map(str, opts)] if opts else [])]


class Case(NamedTuple):
    """One mistake.

    Attributes:
        name: Of the test.
        words: Makes the mistake; returns the words of the command line.
        expected: All of them stand in the message.
        status: Of the program: 1, or 2 for a wrong command line.
        starts: The run may have made its folder (what is wrong cannot be known before).
    """

    name: str
    words: Callable[[Place], list[str]]
    expected: tuple[str, ...]
    status: int = 1
    starts: bool = False


def message_of(case: Case, world: World, folder: Path, capsys: Any) -> str:
    """Run a case through the real command line; what the user reads, after the checks that hold for every case."""
    place = Place(world, folder)
    words = case.words(place)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert status == case.status, printed.err
    lines = [line for line in printed.err.splitlines() if not line.startswith(("warning: ", "usage: ", " "))]
    assert lines, printed.out
    assert "error: " in lines[0]
    assert "defect" not in lines[0]
    if not case.starts:
        assert sorted(folder.rglob("*")) == before, "something was written although the job was refused"
    return "\n".join(lines)


def ids(cases: list[Case]) -> list[str]:
    """Names of the tests, each once."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return names


def billion_laughs() -> str:
    """Nine levels of nine: a value of 10⁹ entries in a file of 400 characters, and the same by merged mappings."""
    lists = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    maps = ["m0: &m0 {k: 1}"]
    for level in range(1, 10):
        lists.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
        maps.append(f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}")
    return "\n".join([*lists, *maps, "DATA: {MEAN: *a9, STD: [*a9, 1, 1]}", "SOLVER: *m9", ""])
