"""Studies: what is written in them, which runs they are, runs that are killed, fail and go on, and the table."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from small_jobs import labelled, small_settings

from distinit_plugin import files
from distinit_plugin.cli import main
from distinit_plugin.config.load import shipped_folder
from distinit_plugin.errors import ConfigError
from distinit_plugin.jobs.report import report
from distinit_plugin.jobs.resuming import NEUTRAL
from distinit_plugin.studies import execution, schedule
from distinit_plugin.studies.grid import plan_study
from distinit_plugin.studies.reading import read_study
from distinit_plugin.studies.results import Results, states_of
from distinit_plugin.studies.state import FAILED, FINISHED, STATE_FILE, RunState, read_state, write_state
from distinit_plugin.video.isolated import Crash

STEPS = 3


def write(folder: Path, values: dict, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def tiny(folder: Path, videos: Path, **changes) -> dict:
    """Scratch and pre-trained × two seeds; the pre-training is a step that both seeds share."""
    settings = small_settings(videos, folder / "unused", **labelled(videos))
    settings |= {
        "TEST": {"NUM_ENSEMBLE_VIEWS": 1},
        "RUNNER": {**settings["RUNNER"], "CLIPS_PER_EPOCH": 4 * STEPS, "NUM_THREADS": 1},
    }
    del settings["OUTPUT_DIR"]
    write(folder, settings, "run.yaml")
    values = {
        "OUTPUT_DIR": str(folder / "out"),
        "CFG": "run.yaml",
        "STEPS": {"pretrain": {"CFG": "run.yaml", "OPTS": {"TEST.ENABLE": False, "SOLVER.BASE_LR": 0.02}}},
        "AXES": {
            "start": {"scratch": {}, "pre-trained": {"TRAIN.CHECKPOINT_FILE_PATH": "$pretrain"}},
            "seed": {0: {"RNG_SEED": 0}, 1: {"RNG_SEED": 1}},
        },
        "BASELINE": {"start": "scratch"},
    }
    return {**values, **changes}


def plan_of(path: Path):
    return plan_study(read_study(path))


# ---------------------------------------------------------------------------------------------------- what is written
GOOD = {
    "CFG": "run.yaml",
    "STEPS": {"pretrain": {"CFG": "run.yaml"}},
    "AXES": {"start": {"none": {}, "pre": {"TRAIN.CHECKPOINT_FILE_PATH": "$pretrain"}}, "seed": {0: {}, 1: {}}},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"BASLINE": {"start": "none"}}, r"there is no key 'BASLINE'\. Did you mean BASELINE\?"),
        ({"AXES": {}}, "AXES: there are none"),
        ({"AXES": {"start": {}}}, "AXES.start: the axis has no values"),
        ({"AXES": {"start": ["a", "b"]}}, "AXES.start: a mapping .* is expected, not"),
        ({"AXES": {"start": {"a/b": {}}}}, "the name 'a/b' is not allowed"),
        ({"AXES": {"start": {"..": {}}}}, r"the name '\.\.' is not allowed"),
        ({"AXES": {"start": {"<b>x</b>": {}}}}, "the name '<b>x</b>' is not allowed"),
        ({"AXES": {"<i>": {"a": {}}}}, "AXES: the name '<i>' is not allowed"),
        ({"AXES": {"start": {"x" * 61: {}}}}, "1 to 60 characters"),
        ({"AXES": {"start": {None: {}}}}, "the name None is not allowed"),
        ({"AXES": {"start": {True: {}}}}, "the name True is not allowed"),
        ({"AXES": {"start": {"a": {"pretrian": {}}}}}, r"no step named 'pretrian' \(STEPS\)\. Did you mean pretrain\?"),
        ({"AXES": {"start": {"a": {"RNG_SEED": "$pretrian"}}}}, "'.pretrian' is no step. Did you mean pretrain?"),
        ({"AXES": {"start": {"a": {"OUTPUT_DIR": "x"}}}}, "'OUTPUT_DIR' cannot be set here"),
        ({"AXES": {str(n): {v: {} for v in range(30)} for n in range(4)}}, "810000 places; at most 10000"),
        ({"STEPS": {"Pre": {"CFG": "run.yaml"}}}, "STEPS: the name 'Pre' is not allowed"),
        ({"STEPS": {"pretrain": {"CFG": "run.yaml", "OPTIONS": {}}}}, r"no key 'OPTIONS'.* Known: CFG, OPTS"),
        ({"STEPS": {"pretrain": {"CFG": "run.yaml", "OPTS": {"A": "$pretrain"}}}}, "is no step written before it"),
        ({"BASELINE": {"start": "nothing"}}, "BASELINE.start: 'nothing' is not known. .*Known: none, pre"),
        ({"BASELINE": {"strat": "none"}}, r"BASELINE: 'strat' is not known\. Did you mean start\?"),
        ({"BASELINE": {"seed": 0}}, r"seed is averaged over \(AVERAGE\)"),
        ({"AVERAGE": "seeds"}, r"AVERAGE: 'seeds' is not known\. Did you mean seed\?"),
        ({"AVERAGE": ["start", "seed"]}, "all axes are averaged over"),
        ({"BEST_OF": "seed"}, "BEST_OF: seed is averaged over"),
        ({"METRIC": "top2"}, "METRIC: 'top2' is not known. Did you mean top"),
        ({"EXCLUDE": [{}]}, "an entry names no place"),
        ({"EXCLUDE": {"start": "none"}}, "a list of {axis: value} is expected"),
        ({"DATA": {"MAKER": "digit", "FOLDER": "x"}}, "DATA.MAKER: 'digit' is not known. Did you mean digits?"),
        ({"DATA": {"MAKER": "digits"}}, "DATA.FOLDER: '' is not allowed"),
        ({"CFG": None}, "CFG: the name of a YAML file"),
        ({"CFG": "rnu.yaml"}, "CFG: rnu.yaml: no such file"),
        ({"NAME": "a\u2028b"}, "NAME: the name .* is not allowed"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, change, words):
    write(tmp_path, {"RNG_SEED": 0}, "run.yaml")
    path = write(tmp_path, {**GOOD, **change})
    with pytest.raises(ConfigError, match=words) as caught:
        read_study(path)
    assert any(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    read_study(write(tmp_path, GOOD))  # the control


def test_a_file_is_never_run(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("NAME: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(ConfigError, match="Tags"):
        read_study(path)
    path.write_text("AXES: {a: {x: {}, x: {}}}\n")
    with pytest.raises(ConfigError, match="the key x is written twice"):
        read_study(path)
    path.write_text("AXES: {a: {1e0: {}, '1.0': {}}}\n")
    with pytest.raises(ConfigError, match=r"the value 1\.0 is there twice"):
        read_study(path)


def test_mistakes_in_configurations_are_told_once_with_their_run(tmp_path, videos):
    values = tiny(tmp_path, videos, BEST_OF="start", BASELINE=None)
    values["AXES"]["seed"][1] = {"SOLVER.BASE_RL": 1}
    with pytest.raises(ConfigError) as caught:
        plan_of(write(tmp_path, values))
    text = str(caught.value)
    assert text.count("Did you mean") == 1
    assert "scratch, 1: SOLVER.BASE_RL" in text
    assert text.count("start is chosen by the validation, and there is none") == 1


def test_a_step_that_nothing_uses_and_an_empty_grid(tmp_path, videos):
    values = tiny(tmp_path, videos, EXCLUDE=[{"start": "pre-trained"}])
    with pytest.raises(ConfigError, match=r"STEPS.pretrain: no run starts from it"):
        plan_of(write(tmp_path, values))
    with pytest.raises(ConfigError, match="leaves out every place"):
        plan_of(write(tmp_path, {**values, "EXCLUDE": [{"start": "scratch"}, {"start": "pre-trained"}]}))


@pytest.mark.parametrize("path", sorted((shipped_folder() / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies(path):
    plan = plan_of(path)
    assert len(plan.cells) > 1
    assert plan.warnings == []
    assert plan.study.output == Path("runs/studies") / path.stem


# ------------------------------------------------------------------------------------------------------ which runs
def test_a_shared_step_is_one_run_and_a_change_makes_others(tmp_path, videos):
    plan = plan_of(write(tmp_path, tiny(tmp_path, videos)))
    assert [run.name for run in plan.runs.values()] == [
        "scratch, 0",
        "scratch, 1",
        "pretrain",
        "pre-trained, 0",
        "pre-trained, 1",
    ]
    assert [[run.name for run in wave] for wave in plan.waves()][1] == ["pre-trained, 0", "pre-trained, 1"]

    values = tiny(tmp_path, videos)
    values["STEPS"]["pretrain"]["OPTS"]["SOLVER.BASE_LR"] = 0.03
    changed = plan_of(write(tmp_path, values))
    assert [run.name for run in changed.runs.values() if run.digest in plan.runs] == ["scratch, 0", "scratch, 1"]

    values = tiny(tmp_path, videos, OPTS={"DATA_LOADER.NUM_WORKERS": 1, "LOG_PERIOD": 7})
    assert {*plan_of(write(tmp_path, values)).runs} == {*plan.runs}  # nothing that decides a result

    values["AXES"]["start"] = {"from nothing": {}, "from it": values["AXES"]["start"]["pre-trained"]}
    renamed = plan_of(write(tmp_path, {**values, "BASELINE": None}))
    assert {*renamed.runs} == {*plan.runs}
    (plan.study.output / plan.runs[plan.cells[0].run].folder).mkdir(parents=True)
    again = plan_of(write(tmp_path, {**values, "BASELINE": None}))
    assert again.runs[plan.cells[0].run].folder == plan.runs[plan.cells[0].run].folder  # found under its old name

    values["AXES"]["seed"][0] = {"pretrain": {"RNG_SEED": 5}}  # a step of its own for that seed
    own = plan_of(write(tmp_path, {**values, "BASELINE": None}))
    assert len(own.runs) == 6


def test_what_is_tested_is_part_of_a_result():
    assert not {"TEST.", "CORPUS.TEST."} & {*NEUTRAL}  # of which weights do not depend


# ----------------------------------------------------------------------------------------------- killed, and going on
def finished(output: Path) -> list[Path]:
    """Folders of runs that are done."""
    found = []
    for path in sorted(output.glob(f"runs/*/{STATE_FILE}")):
        if json.loads(path.read_text())["state"] == FINISHED:
            found.append(path.parent)
    return found


def traces(folder: Path) -> dict[str, object]:
    """Log and checkpoints of a run: content and time."""
    files = [folder / "stdout.log", *sorted((folder / "checkpoints").iterdir())]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def steps_in(folder: Path) -> int:
    return (folder / "stdout.log").read_text().count('"_type": "train_iter_')


def test_killed_in_the_middle_it_goes_on_and_repeats_nothing(tmp_path, videos, capsys):
    """SIGKILL of the whole group while the third of five runs trains."""
    path, output = write(tmp_path, tiny(tmp_path, videos)), tmp_path / "out"
    words = ["study", str(path), "--processes", "1"]
    process = os.fork()
    if process == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            main(words)
        os._exit(0)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            done = finished(output)
            running = [path for path in output.glob("runs/*/stdout.log") if path.parent not in done]
            if len(done) >= 2 and any(steps_in(log.parent) for log in running):
                break
            time.sleep(0.005)
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    done = finished(output)
    assert 2 <= len(done) < 5
    (cut,) = [folder for folder in output.glob("runs/*") if folder not in done]
    before = {folder: traces(folder) for folder in done}

    assert main(words) == 0
    assert {folder: traces(folder) for folder in done} == before
    everything = finished(output)
    assert len(everything) == 5
    assert cut in everything
    assert all(steps_in(folder) == STEPS for folder in everything if folder != cut)
    capsys.readouterr()

    after = {folder: traces(folder) for folder in everything}
    assert main(words) == 0  # nothing is left: only the table
    assert {folder: traces(folder) for folder in everything} == after
    assert "pre-trained" in capsys.readouterr().out
    study = json.loads((output / "study.json").read_text())
    assert study["baseline"] == "scratch"
    for row, repeats in study["rows"].items():
        for repeat, folder in repeats.items():
            metrics = json.loads((output / folder / "test" / "metrics.json").read_text())
            assert study["results"][row][repeat] == metrics["top1"]
    assert (output / "results.md").read_text().count("| pre-trained |") == 1


def test_failures_are_listed_and_others_go_on(tmp_path, videos, capsys, monkeypatch):
    """A wrong file, a process that is killed, and what starts from a failed step; the next call tries again."""
    values = tiny(tmp_path, videos)
    values["STEPS"]["pretrain"]["OPTS"]["TRAIN.CHECKPOINT_FILE_PATH"] = str(tmp_path / "weights.pyth")
    path, output = write(tmp_path, values), tmp_path / "out"
    monkeypatch.setenv("COLUMNS", "400")

    def killed(order):
        if order.run.name == "scratch, 1":
            os.kill(os.getpid(), signal.SIGKILL)
        return execution.do_run(order)

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "do_run", killed)
        assert main(["study", str(path), "--processes", "2"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "FAILED pretrain: TRAIN.CHECKPOINT_FILE_PATH" in text
    assert "FAILED scratch, 1: its process crashed (SIGKILL); the system kills" in text
    assert "NOT DONE pre-trained, 0: it starts from pretrain" in text
    assert len(finished(output)) == 1
    study = json.loads((output / "study.json").read_text())
    assert len(study["failed"]) == 2
    assert list(study["results"]) == ["scratch"]

    for part in ("curve_blocks", "class_pictures", "filter_blocks"):
        monkeypatch.setattr(f"distinit_plugin.jobs.report.{part}", lambda *runs: [])
    report(  # also those that never began, or could not say that they failed
        [], tmp_path / "report.html", study=output / "study.json", console=Console(file=io.StringIO())
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    assert re.search(r"pretrain \(\w+\) failed: TRAIN.CHECKPOINT_FILE_PATH", page)
    assert "scratch, seed 1 failed: its process crashed (SIGKILL)" in page
    assert "pre-trained, seed 0 failed" not in page  # it has not started

    assert main(["study", str(path), "--list"]) == 1
    listed = capsys.readouterr().out
    assert listed.count("failed") == 2
    assert main(["study", str(path), "--dry-run"]) == 1
    assert "4 of 5 runs are to be done" in capsys.readouterr().out

    before = {folder: traces(folder) for folder in finished(output)}
    assert main(["study", str(path), "--only", "scratch, 1"]) == 0
    assert len(finished(output)) == 2
    assert {folder: traces(folder) for folder in before} == before
    capsys.readouterr()
    assert main(["study", str(path), "--only", "pre-trained, 0"]) == 1
    assert "starts from pretrain, which is not finished" in capsys.readouterr().err
    assert main(["study", str(path), "--only", "scratch, 2"]) == 1
    assert "Did you mean scratch, " in capsys.readouterr().err


def test_two_at_once_do_not_disturb_each_other(tmp_path, videos, capsys, monkeypatch):
    """While another process has the study, or one of its runs, nothing is done; afterwards it is."""
    path, output = write(tmp_path, tiny(tmp_path, videos)), tmp_path / "out"
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.0)
    output.mkdir()
    with files.writing_alone(output, "it"):
        assert main(["study", str(path)]) == 1
    assert "another process is writing the study" in capsys.readouterr().err
    plan = plan_of(path)
    first = next(iter(plan.runs.values()))
    folder = output / first.folder
    folder.mkdir(parents=True)
    with files.writing_alone(folder, "it"):
        assert main(["study", str(path), "--only", first.name]) == 1
    assert "another process is writing the run scratch, 0" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(execution, "run_job", lambda *arguments, **words: (folder / "test").mkdir())
    assert main(["study", str(path), "--only", first.name]) == 1  # the control: nobody has it
    assert "there is no result of a test" in read_state(folder, first.name, first.digest).reason


def test_what_dies_after_its_end_stays_finished(tmp_path, videos):
    """The state is on the disk before the process can say so."""
    plan = plan_of(write(tmp_path, tiny(tmp_path, videos)))
    one, other, *_ = plan.runs.values()
    finished = RunState(one.name, one.digest, FINISHED, metrics={"top1": 0.5})
    write_state(plan.study.output / one.folder, finished)
    crash = Crash("its process crashed (SIGKILL)")
    assert schedule._after_crash(execution.order_of(plan, one), crash) == finished
    assert read_state(plan.study.output / one.folder, one.name, one.digest) == finished
    assert schedule._after_crash(execution.order_of(plan, other), crash).state == FAILED


# --------------------------------------------------------------------------------------------------------- the table
def test_best_by_validation_and_paired_differences(tmp_path, videos):
    """Numbers that are written by hand: the best of the test is not what is chosen."""
    values = tiny(tmp_path, videos, BEST_OF="lr", OPTS={"CORPUS.VAL.V.PATH": str(videos), "CORPUS.VAL.V.LABELED": True})
    values["AXES"] = {
        "start": values["AXES"]["start"],
        "lr": {"low": {"SOLVER.BASE_LR": 0.01}, "high": {"SOLVER.BASE_LR": 0.1}},
        "seed": {seed: {"RNG_SEED": seed} for seed in range(3)},
    }
    plan = plan_of(write(tmp_path, values))
    tests = {
        ("scratch", "low"): ([0.2, 0.3, 0.1], 0.9),
        ("scratch", "high"): ([0.9, 0.9, 0.9], 0.1),
        ("pre-trained", "low"): ([0.8, 0.8, 0.8], 0.2),
        ("pre-trained", "high"): ([0.5, 0.4, 0.6], 0.3),
    }
    for cell in plan.cells:
        run = plan.runs[cell.run]
        scores, validation = tests[cell.place["start"], cell.place["lr"]]
        metrics = {"top1": scores[int(cell.place["seed"])]}
        state = RunState(run.name, run.digest, FINISHED, metrics=metrics, validation=validation)
        write_state(plan.study.output / run.folder, state)
        assert read_state(plan.study.output / run.folder, run.name, run.digest) == state
    results = Results(plan, states_of(plan))
    assert results.shown == ["scratch, low", "pre-trained, high"]
    assert results.baselines == {"pre-trained, high": "scratch, low"}
    found = list(results.differences("pre-trained, high").values())
    assert found == pytest.approx([0.3, 0.1, 0.5])
    error = statistics.stdev(found) / 3**0.5
    cells = {row.name: row.values for row in results.table()}
    assert cells["pre-trained, high"]["− scratch"] == f"{100 * statistics.fmean(found):+.1f} ± {100 * error:.1f}"
    assert cells["scratch, low"]["− scratch"] == ""
    assert [row.name for row in results.full_table()] == [", ".join(place) for place in tests]
    results.write()
    study = json.loads((plan.study.output / "study.json").read_text())
    assert study["differences"]["pre-trained, high"]["standard_error"] == pytest.approx(error)
    assert len((plan.study.output / "results.csv").read_text().splitlines()) == 1 + len(plan.cells)

    first = plan.runs[plan.cells[0].run]
    (plan.study.output / first.folder / STATE_FILE).unlink()
    partial = Results(plan, states_of(plan))
    assert partial.shown == ["scratch, low", "scratch, high", "pre-trained, high"]  # no choice before all are done
    assert partial.numbers()["baseline"] is None


# ---------------------------------------------------------------------------------------------- torchrun, and SLURM
def test_torchrun_gets_the_run_and_its_error_is_told(tmp_path, videos, capsys, monkeypatch):
    """A stand-in notes its words; one run fails as torchrun does."""
    path, output = write(tmp_path, tiny(tmp_path, videos)), tmp_path / "out"
    program = tmp_path / "torchrun.py"
    program.write_text("import sys\nprint(sys.argv[1:])\nprint('error: no such thing')\nsys.exit(1)\n")
    monkeypatch.setattr(execution, "TORCHRUN", (sys.executable, str(program)))
    words = ["study", str(path), "--only", "scratch, 0", "--launch", "torchrun"]
    assert main([*words, "--launch-options", "--nproc_per_node", "2"]) == 1
    assert "scratch, 0: no such thing" in capsys.readouterr().err
    (folder,) = output.glob("runs/*")
    expected = ["--nproc_per_node", "2", "-m", "distinit_plugin.cli", "run", "--cfg", str(folder / "config.yaml")]
    assert str(expected) in (folder / "output.log").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["OUTPUT_DIR"] == str(folder)
    assert main(["study", str(path), "--launch-options", "--nproc_per_node", "2"]) == 1
    assert "--launch-options" in capsys.readouterr().err


SBATCH = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
echo "4$(wc -l < "$CALLS");cluster"
"""
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$WORDS"
"""


SAVES = """#!/usr/bin/env bash
trap 'sleep 0.1; echo saves; exit {end}' USR1
echo works
for _ in {{1..400}}; do sleep 0.05; done
"""


def test_slurm_gets_an_array_for_each_wave(tmp_path, videos, capsys, monkeypatch):
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    path, output = write(tmp_path, tiny(tmp_path, videos)), tmp_path / "out"
    for name, text in (("sbatch", SBATCH), ("python", STAND_IN), ("scontrol", 'echo "$@" >> "$CALLS"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    words = ["study", str(path), "--launch", "slurm", "--processes", "2", "--launch-options", "--time", "1:00:00"]
    assert main(words) == 0
    scripts = [output / "slurm" / f"wave_{number}.sh" for number in (1, 2)]
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first == f"--parsable --time 1:00:00 {scripts[0]}"
    assert second == f"--parsable --dependency=afterany:41 --time 1:00:00 {scripts[1]}"
    assert "#SBATCH --array=0-2%2\n" in scripts[0].read_text()
    assert "#SBATCH --array=0-1%2\n" in scripts[1].read_text()

    plan = plan_of(path)
    for number, run in enumerate(plan.waves()[1]):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "WORDS": str(tmp_path / "words")}
        done = subprocess.run(["bash", scripts[1]], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = (tmp_path / "words").read_text().splitlines()
        assert said == [
            *("-m", "distinit_plugin.cli", "study", str(path), "--output", str(output)),
            *("--only", run.folder.rpartition("/")[2]),
        ]
    # Near the time limit the run saves and ends with 138, and the task queues again; one that is done does not.
    for end, requeued in ((138, "requeue 41_1\n"), (0, "")):
        (tmp_path / "python").write_text(SAVES.format(end=end))
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "41"}
        job = subprocess.Popen(["bash", scripts[1]], env=environment, stdout=subprocess.PIPE, text=True)
        assert job.stdout.readline() == "works\n"
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 0
        assert job.stdout.read() == "saves\n"
        assert (tmp_path / "calls").read_text() == requeued

    (tmp_path / "sbatch").write_text("#!/usr/bin/env bash\necho invalid account >&2\nexit 1\n")
    capsys.readouterr()
    assert main(words) == 1
    assert "invalid account" in capsys.readouterr().err
