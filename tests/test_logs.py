"""What a run writes and shows: json_stats lines, progress, tables of results, curves."""

import io
import json
import logging
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from distinit_plugin.engine import meters, progress
from distinit_plugin.engine.curves import plot_curves, read_curves
from distinit_plugin.engine.meters import JsonLogger, MeanMeter, json_line
from distinit_plugin.engine.progress import BarProgress, NoProgress, PlainProgress, RunLog, Status, open_progress
from distinit_plugin.engine.results import Row, markdown_table, percent, terminal_table
from distinit_plugin.errors import UserError

STATUS = Status(epoch="1/2", loss=1.25, lr=0.01, clips_per_second=12.5, wait_share=0.04, seconds_left=3700.0)


# ------------------------------------------------------------------------------------------------------- meters
def test_mean_meter_weighs_and_ignores_means_over_nothing():
    meter = MeanMeter()
    meter.update({"loss": torch.tensor(2.0), "kept": torch.tensor(1.0)}, torch.tensor(3))
    meter.update({"loss": torch.tensor(6.0)}, 1.0)
    meter.update({"loss": torch.tensor(math.nan)}, torch.tensor(0))
    assert meter.read() == {"kept": 1.0, "loss": 3.0}
    assert meter.read(lambda table: 2 * table) == {"kept": 1.0, "loss": 3.0}  # two equal ranks
    copy = MeanMeter()
    copy.load_state_dict(meter.state_dict())
    meter.reset()
    assert meter.read() == {}
    assert copy.read() == {"kept": 1.0, "loss": 3.0}


def test_mean_meter_keeps_a_real_nan():
    meter = MeanMeter()
    meter.update({"loss": torch.tensor(math.nan)}, 2)
    assert math.isnan(meter.read()["loss"])


def test_mean_meter_does_not_hold_the_graph():
    value = torch.tensor(1.0, requires_grad=True) * 2
    meter = MeanMeter()
    meter.update({"loss": value})
    assert not any(tensor.requires_grad for tensor in meter._sums.values())


def test_json_line_has_pyslowfasts_form():
    line = json_line({"loss": 0.1, "_type": "train_epoch", "epoch": "1/6", "RAM": "1.00/2.00G", "count": 3})
    assert (
        line == 'json_stats: {"RAM": "1.00/2.00G", "_type": "train_epoch", "count": 3, "epoch": "1/6", "loss": 0.10000}'
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_line_stays_valid_json(value):
    def refuse(name):
        raise AssertionError(name)

    stats = json.loads(json_line({"loss": value, "text": 'a"\n'}).removeprefix("json_stats: "), parse_constant=refuse)
    assert stats == {"loss": None, "text": 'a"\n'}


def test_small_learning_rates_are_not_zero():
    assert json_line({"lr": 1.234e-6, "loss": 1.234e-6}) == 'json_stats: {"loss": 0.00000, "lr": 0.00000123}'
    assert json_line({"lr": 0.01}) == 'json_stats: {"lr": 0.01000}'


def test_train_and_val_lines_have_pyslowfasts_keys():
    place = {"per_step": (0.5, 0.1), "eta": 3700.4, "lr": 0.01}
    values = {"loss": 2.0, "top1": 0.25, "top5": 1.0}
    step = meters.train_stats(0, 6, step=(10, 20), values=values, **place)
    assert set(step) == {
        *("_type", "epoch", "iter", "dt", "dt_data", "dt_net", "eta", "lr", "gpu_mem", "RAM"),
        *("loss", "top1_err", "top5_err"),
    }
    assert (step["_type"], step["epoch"], step["iter"], step["eta"]) == ("train_iter_", "1/6", "10/20", "1:01:40")
    assert (step["dt_net"], step["top1_err"], step["top5_err"]) == (0.4, 75.0, 0.0)
    assert re.fullmatch(r"\d+\.\d\d/\d+\.\d\dG", step["RAM"])
    assert re.fullmatch(r"\d+\.\d\dG", step["gpu_mem"])
    epoch = meters.train_stats(0, 6, values=values, **place)
    assert set(step) - set(epoch) == {"iter"}
    assert epoch["_type"] == "train_epoch"
    best = {"name": "top1", "value": 0.5, "epoch": 0, "top5": 1.0}
    val = meters.val_epoch_stats(1, 6, seconds=1.5, values=values, best=best)
    assert set(val) == {
        *("_type", "epoch", "time_diff", "gpu_mem", "RAM", "loss"),
        *("top1_err", "top5_err", "min_top1_err", "min_top5_err"),
    }
    assert (val["_type"], val["epoch"], val["min_top1_err"], val["min_top5_err"]) == ("val_epoch", "2/6", 50.0, 0.0)


def test_final_line_is_text_in_percent():
    line = json_line(meters.final_test_stats({"top1_acc": 0.2, "top5_acc": 0.66666}))
    assert line == 'json_stats: {"split": "test_final", "top1_acc": "20.00", "top5_acc": "66.67"}'


# ------------------------------------------------------------------------------------------------------ run log
def test_run_log_puts_all_lines_in_the_file_and_people_lines_on_the_console(tmp_path):
    screen = io.StringIO()
    log = RunLog(tmp_path / "run", console=Console(file=screen))
    json_logger = JsonLogger(tmp_path / "run")
    json_logger.iteration({"_type": "train_iter_", "loss": 1.0})
    json_logger.epoch({"_type": "train_epoch", "loss": 1.0})
    with open_progress(log.console, enabled=True, main=True) as view:
        assert isinstance(view, PlainProgress)
        view.advance(5, 10)
        view.show(5, 10, STATUS)
    log.close()
    logging.getLogger("distinit_plugin").info("after the end")
    everything = (tmp_path / "run" / "stdout.log").read_text()
    assert everything.count("json_stats: ") == 2
    assert "step 5/10  epoch 1/2  loss 1.2500  lr 0.01  12.5 clips/s  data wait 4 %  1:01:40 left" in everything
    assert (tmp_path / "run" / "json_stats.log").read_text().splitlines() == [
        'json_stats: {"_type": "train_epoch", "loss": 1.00000}'
    ]
    assert "json_stats" not in screen.getvalue()
    assert "12.5 clips/s" in screen.getvalue()
    assert "after the end" not in everything + screen.getvalue()


def test_a_name_that_is_no_text_does_not_lose_its_line(tmp_path, capsys):
    """Linux takes any bytes for a name."""
    log = RunLog(tmp_path / "run", console=Console(file=io.StringIO()))
    logging.getLogger("distinit_plugin").warning("bad video %s: it is empty", os.fsdecode(b"caf\xe9.mp4"))
    log.close()
    assert "bad video caf\\udce9.mp4: it is empty" in (tmp_path / "run" / "stdout.log").read_text()
    assert capsys.readouterr().err == ""


def test_a_full_disk_under_the_json_lines_is_said(tmp_path, caplog):
    (tmp_path / "json_stats.log").symlink_to("/dev/full")
    json_logger = JsonLogger(tmp_path)
    with caplog.at_level("INFO", logger="distinit_plugin"):
        for _ in range(2):
            json_logger.epoch({"loss": 1.0})
    assert caplog.text.count("cannot be written: no space left on device. The run goes on") == 2
    assert caplog.text.count("json_stats: ") == 2


def test_other_ranks_write_nothing(tmp_path):
    screen = io.StringIO()
    log = RunLog(tmp_path / "run", main=False, console=Console(file=screen))
    JsonLogger(tmp_path / "run", enabled=False).epoch({"loss": 1.0})
    logging.getLogger("distinit_plugin.x").info("hello")
    logging.getLogger("distinit_plugin.x").warning("careful")
    log.close()
    assert isinstance(open_progress(log.console, enabled=True, main=False), NoProgress)
    assert not (tmp_path / "run").exists()
    assert "hello" not in screen.getvalue()
    assert "careful" in screen.getvalue()


def test_bar_on_a_terminal_shows_the_figures():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with open_progress(console, enabled=True, main=True) as view:
        assert isinstance(view, BarProgress)
        view.advance(5, 10)
        view.show(5, 10, STATUS)
    for words in ("5/10", "loss 1.2500", "lr 0.01", "12.5 clips/s", "data wait 4 %", "1:01:40 left"):
        assert words in screen.getvalue()
    assert isinstance(open_progress(console, enabled=False, main=True), PlainProgress)


def test_other_works_have_bars_of_their_own():
    """Beside the training's, and alone; each leaves when it ends, also when it fails."""
    screen = io.StringIO()
    view = open_progress(Console(file=screen, force_terminal=True, width=160), enabled=True, main=True)

    def shown() -> str:
        view._bar.refresh()
        text = screen.getvalue()
        screen.truncate(0)
        screen.seek(0)
        return text

    with view:
        view.advance(5, 10)
        with view.work("validation", 40) as advance:
            advance(7)
            text = shown()
            assert "7/40" in text
            assert "train" in text
        assert "validation" not in shown()
    screen.truncate(0)

    def interrupted() -> None:
        with view.work("test", 30) as advance:
            advance(8)
            texts.append(shown())
            raise KeyboardInterrupt

    texts: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "8/30" in texts[0]
    assert "train" not in texts[0]
    assert not view._bar.live.is_started
    assert view._bar.tasks == []


def test_long_works_have_lines_where_there_is_no_terminal(caplog, monkeypatch):
    clock = iter([0.0, 1.0, 31.0, 31.0, 32.0, 61.5, 61.5])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", logger="distinit_plugin"), PlainProgress().work("test", 50) as advance:
        for done in (10, 20, 30, 40):
            advance(done)
    assert [record.getMessage() for record in caplog.records] == ["test 20/50", "test 40/50"]


def test_an_output_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"OUTPUT_DIR: cannot write to .*file"):
        RunLog(tmp_path / "file", console=Console(file=io.StringIO()))


# ------------------------------------------------------------------------------------------------------- tables
def test_percent():
    assert percent(0.5) == "50.0"
    assert percent([0.5]) == "50.0"
    assert percent([0.4, 0.5, 0.6]) == "50.0 ± 10.0"  # sample standard deviation
    assert percent([0.4, math.nan]) == percent([]) == "–"
    assert percent("54.8") == "54.8"


def test_tables_have_every_column_and_empty_cells():
    rows = [Row("scratch", {"top-1": [0.2, 0.3, 0.4]}), Row("Dist|Init", {"top-1": 0.6, "published": "40.3"})]
    assert markdown_table(rows, first="run") == (
        "| run | top-1 | published |\n| --- | ---: | ---: |\n"
        "| scratch | 30.0 ± 10.0 |  |\n| Dist\\|Init | 60.0 | 40.3 |\n"
    )
    screen = io.StringIO()
    Console(file=screen, width=100).print(terminal_table(rows, title="UCF-101", first="run"))
    for words in ("UCF-101", "scratch", "30.0 ± 10.0", "40.3", "published"):
        assert words in screen.getvalue()


# ------------------------------------------------------------------------------------------------------- curves
def write_run(folder, *, epochs=3, steps=4, val=True, shift=0.0):
    folder.mkdir()
    log = RunLog(folder, console=Console(file=io.StringIO()))
    writer = JsonLogger(folder)
    place = {"per_step": (0.5, 0.1), "eta": 1.0}
    for epoch in range(epochs):
        lr = 0.01 * 0.1**epoch
        for step in range(2, steps + 1, 2):
            loss = 3 - epoch - step / steps + shift
            stats = meters.train_stats(epoch, epochs, step=(step, steps), lr=lr, values={"loss": loss}, **place)
            writer.iteration(stats)
        writer.epoch(meters.train_stats(epoch, epochs, lr=lr, values={"loss": 2.6 - epoch}, **place))
        if val:
            values = {"loss": 2.0, "top1": 0.2 * epoch}
            writer.epoch(meters.val_epoch_stats(epoch, epochs, seconds=1.0, values=values, best={}))
    log.close()


def test_curves_are_read_back(tmp_path):
    write_run(tmp_path / "run")
    with open(tmp_path / "run" / "stdout.log", "a") as file:
        file.write(
            'json_stats: {"_type": "train_iter_", "epoch": "4/3", "iter": "1/\njson_stats: [1]\njson_stats: {}\n'
        )
        file.write('json_stats: {"_type": "train_iter_", "epoch": "3/3", "iter": "4/4", "loss": null, "lr": 0.5}\n')
    curves = read_curves(tmp_path / "run")
    assert curves.train_loss == {0.5: 2.5, 1.0: 2.0, 1.5: 1.5, 2.0: 1.0, 2.5: 0.5, 3.0: 0.0}
    assert curves.val_top1 == {1.0: 0.0, 2.0: 20.0, 3.0: 40.0}
    assert curves.lr[3.0] == 0.5  # the later line counts
    assert curves.lr[2.0] == pytest.approx(0.001)


def test_curves_of_epochs_alone(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "stdout.log").unlink()
    assert read_curves(tmp_path / "run").train_loss == {1.0: 2.6, 2.0: 1.6, 3.0: 0.6}


def test_curves_become_a_png(tmp_path):
    write_run(tmp_path / "scratch")
    write_run(tmp_path / "distinit", shift=-0.3, val=False)
    plot_curves({"scratch": tmp_path / "scratch", "DistInit": tmp_path / "distinit"}, tmp_path / "out" / "curves.png")
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_folder_without_curves_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name} has no curves"):
        plot_curves({"nothing": tmp_path}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
