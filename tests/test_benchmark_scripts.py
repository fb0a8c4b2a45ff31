"""The scripts in benchmarks/ run, in their smallest settings; their figures are measured elsewhere."""

import argparse
import contextlib
import importlib
import importlib.util
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from videos import write_video

from distinit_plugin.models.hardware import hardware_has_bf16

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["RESNET.DEPTH", "10", "NETWORK.WIDTH", "8", "RUNNER.PRECISION", "fp32", "RUNNER.KEEP_MEMORY", "False"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and FOLDER in Path(sys.modules[name].__file__).parents:
            del sys.modules[name]


def _rows(text):
    """First cell → the other cells of all Markdown tables."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in lines if not cells[0].startswith("---")}


def test_rounds_take_turns_and_the_first_is_not_counted(script):
    common = script("common")
    calls = []
    variants = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    seconds = common.interleave(variants, 3)
    assert calls == [(name, number) for number in (-1, 0, 1, 2) for name in "ab"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_spreads_and_verdicts(script):
    common = script("common")
    assert common.spread([4, 1, 2, 3, 5]) == (2, 3, 4)
    assert common.ratio([2, 6, 20], [1, 2, 5]).median == 3
    assert common.verdict(0.96, at_least=0.95).endswith("yes")
    assert common.verdict(0.94, at_least=0.95).endswith("NO")
    assert common.verdict(1.04, at_most=1.03).endswith("NO")
    assert _rows(common.table(["x", "a"], [["y", "1"]])) == {"x": ["a"], "y": ["1"]}


def test_input_pipeline(script, monkeypatch, capsys, tmp_path):
    pipeline = script("input_pipeline")
    monkeypatch.setattr(pipeline, "keep_freed_memory", lambda: None)  # it would hold for the other tests
    monkeypatch.setattr(pipeline, "write_clip", partial(pipeline.write_clip, num_frames=70))
    shutil.copy(write_video(tmp_path / "source.mp4", 20), tmp_path / "real.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    words = ["--rounds", "1", "--clips", "1", "--gops", "12", "--rates", "8", "--videos", str(tmp_path)]
    assert pipeline.main(words) == 0
    text = capsys.readouterr().out
    row = _rows(text)["GOP 12, 8×8"]
    assert all(float(cell) > 0 for cell in row[:5])
    assert ("not installed" in row[-1]) == (importlib.util.find_spec("pytorchvideo") is None)
    if importlib.util.find_spec("decord") is None:
        assert "decord is not installed" in text
    else:
        assert "2 real videos" in text
        assert "left out: broken.mp4 (we cannot)" in text


def test_the_bare_loop_gives_our_frames(script, tmp_path):
    pipeline = script("input_pipeline")
    path = pipeline.write_clip(tmp_path / "a.mp4", num_frames=70, gop=12)
    numbers = [20, 28, 36]
    with pipeline.open_video(path) as reader:
        ours = reader.read(numbers)
    assert (ours == pipeline.np.stack(pipeline.pyav_frames(str(path), numbers))).all()
    assert not (ours == pipeline.np.stack(pipeline.pyav_frames(str(path), [21, 29, 37]))).all()


def test_training_step(script, capsys):
    step = script("training_step")
    words = ["--device", "cpu", "--rounds", "1", "--batch-size", "2", "--teacher", "resnet18", "--variants"]
    assert step.main([*words, "loop", "parts", "--options", *TINY]) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["loop"][0] == rows["parts"][0] == "fp32"
    assert {"time, loop / parts", "peak memory, loop / parts"} < set(rows)


def test_share_of_the_bf16_rate(script, capsys):
    """Only where the hardware computes in bf16 there is a rate to have a share of."""
    options = [*TINY, "RUNNER.PRECISION", "bf16"]
    words = ["--device", "cpu", "--rounds", "1", "--batch-size", "2", "--teacher", "resnet18", "--variants", "loop"]
    assert script("training_step").main([*words, "--options", *options]) == 0
    text = capsys.readouterr().out
    has_rate = hardware_has_bf16("cpu")
    assert _rows(text)["loop"][0] == "bf16"
    assert _rows(text)["loop"][-1].endswith(" %" if has_rate else "–")
    assert ("GFLOP; bf16 matrix products" in text) == has_rate
    assert "as they run (at most 0.01: yes)" in text


def test_steps_on_stored_targets(script, capsys):
    variants = script("training_variants")
    arguments = argparse.Namespace(device="cpu", batch_size=2, teacher="resnet18", options=TINY)
    for build, networks in ((variants.build_student, []), (variants.build_cached, [variants.TEACHER])):
        with contextlib.ExitStack() as stack:
            step, facts = build(arguments, stack)
            trainer = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "run_step"))
            objective = trainer.state.objective
            before = next(iter(objective.trainable.parameters())).clone()
            step()
        assert list(objective.teachers) == networks
        assert all(not list(teacher.network.parameters()) for teacher in objective.teachers.values())
        assert not (before == next(iter(objective.trainable.parameters()))).all()
        assert facts["precision"] == "fp32"
    script("training_step")._print_ratios({"student": [2.0, 2.0], "cached": [2.2, 2.0]}, {}, facts)
    assert _rows(capsys.readouterr().out)["time, cached / student"][1] == "≤ 1.03: NO"


@pytest.mark.parametrize(("gate", "seen"), [("weight", 4), ("skip", 2)])
def test_the_gated_loops_see_what_they_should(script, monkeypatch, gate, seen):
    variants = script("training_variants")
    arguments = argparse.Namespace(device="cpu", batch_size=4, teacher="resnet18", options=TINY)
    with contextlib.ExitStack() as stack:
        step, facts = variants.build_gated(arguments, stack, gate=gate)
        sizes = []
        objective_step = variants_student(step)
        handle = objective_step.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]["rgb"])))
        step()
        handle.remove()
    assert facts["precision"] == "fp32"
    assert sizes == [seen]


def variants_student(step):
    """The student in a step's closure."""
    trainer = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "run_step"))
    return trainer.state.objective.trainable.student


def test_million_paths(script, tmp_path):
    paths = script("million_paths")
    for number in range(paths.FILES):
        paths.write_clip(tmp_path / f"clip{number}.mp4", num_frames=10, height=64, width=80, seed=number)
    paths.write_list(tmp_path / "many.txt", 200)
    assert len(set((tmp_path / "many.txt").read_text().splitlines())) == 200
    found = paths.start(str(tmp_path / "many.txt"))
    assert found["seconds"] > found["list"] > 0
    assert found["peak"] > 0 < found["workers"]


def test_flow(script, capsys, tmp_path):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV lacks the contributed modules")
    flow, measures = script("flow"), importlib.import_module("distinit_plugin.flow.measures")
    (tmp_path / "still").mkdir()
    for number in (10, 11):
        cv2.imwrite(str(tmp_path / "still" / f"frame{number}.png"), flow.np.full((24, 30, 3), 9, flow.np.uint8))
    measures.write_flo(tmp_path / "still" / "flow10.flo", flow.torch.ones(2, 24, 30))
    video = str(write_video(tmp_path / "a.mp4", 12))
    words = ["--pairs", str(tmp_path), "--videos", video, "--sizes", "24", "--rounds", "1", "--batch", "2"]
    assert flow.main([*words, "--threads", "1", "--device", "cpu"]) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["still"][3:] == ["1.4142, 1.4142", "1.000 ≤ 1.02: yes"]
    assert rows["a.mp4, 24²"][0].endswith("yes")
    assert float(rows["24², 1 threads, 2 pairs, dis_fast"][0].split()[0]) > 0


def test_flow_extraction(script, capsys, tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV has no optflow module (opencv-contrib-python-headless has)")
    words = ["--video", str(write_video(tmp_path / "v.mp4", num_frames=4)), "--size", "32", "--workers", "1"]
    words += ["--rounds", "1", "--seconds", "0.05", "--backends", "dis_medium"]
    extraction = script("flow_extraction")
    monkeypatch.setattr(  # in a process of its own it would import everything again
        extraction, "loop_elsewhere", lambda chosen: extraction.bare_loop(chosen.video, chosen.size, chosen.seconds)
    )
    assert extraction.main(words) == 0
    rows = _rows(capsys.readouterr().out)
    assert set(rows) == {"short side 32", "one thread of OpenCV, bare", "extract-flow, 1 workers, dis_medium"}
    assert "≥ 0.9: " in rows["extract-flow, 1 workers, dis_medium"][1]


def test_data_wait(script, capsys):
    wait = script("data_wait")
    assert wait.main(["--steps", "11", "--videos", "8"]) == 0
    text = capsys.readouterr().out
    assert f", precision {'bf16' if hardware_has_bf16('cpu') else 'fp32'}, training threads 1" in text
    share = float(_rows(text)["waiting, % of the time"][0])
    assert 0 <= share < 100


def test_frame_map(script, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("AVA_OFFICIAL", raising=False)
    benchmark = script("frame_map")
    assert benchmark.main(["--videos", "1", "--rows", "2000", "--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert "AVA_OFFICIAL is not set: the official code is left out." in text
    rows = _rows(text)
    assert float(rows["ours, s"][0].split()[0]) > 0
    assert float(rows["ours, peak MiB"][0].split()[0]) > 20
    assert "official, s" not in rows
    (tmp_path / "ours.json").write_text('{"official": {"map": 0.25, "ap": {"sit (down)": 0.25, "nan": null}}}')
    printed = (
        "log\n{ 'PascalBoxes_Precision/mAP@0.5IOU': np.float64(0.25),\n"
        "  'PascalBoxes_PerformanceByCategory/AP@0.5IOU/sit (down)': np.float64(0.26),\n"
        "  'PascalBoxes_PerformanceByCategory/AP@0.5IOU/nan': np.float64(nan)}\n"
    )
    assert benchmark.difference(tmp_path / "ours.json", printed) == pytest.approx(0.01)
    assert benchmark.difference(tmp_path / "ours.json", printed.replace("np.float64(nan)", "\n  nan")) > 0
    with pytest.raises(SystemExit, match="in one of both only"):
        benchmark.difference(tmp_path / "ours.json", printed.replace("np.float64(nan)", "0.5"))
