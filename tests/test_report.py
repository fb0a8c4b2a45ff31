"""``distinit report``: what its page says of runs of all kinds, what it refuses, and that nothing in them is markup."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from small_jobs import labelled, small_cfg
from small_reports import settings, write_metrics, write_run

from distinit_plugin.analysis.page import Picture
from distinit_plugin.analysis.published import rows_of
from distinit_plugin.analysis.run_facts import RunFacts
from distinit_plugin.analysis.study_table import Study
from distinit_plugin.cli import main
from distinit_plugin.config.load import load_cfg
from distinit_plugin.config.yaml_files import parse_yaml
from distinit_plugin.engine.figures import COLOURS, new_figure
from distinit_plugin.engine.results import paired_text
from distinit_plugin.engine.run_record import RECORD_FILE, read_record
from distinit_plugin.errors import UserError
from distinit_plugin.jobs import report, report_figures, running
from distinit_plugin.jobs.running import run

EVIL = '<img src=x onerror="alert(1)">&amp;<script>alert(2)</script>'
PNG = b"\x89PNG"
HUGE = (
    '{"format": 1, "files": [], "config": "", "parts": [{"environment": {}, "state": "done", "started": "", '
    '"ended": "", "error": "", "steps": 1, "wait_share": 0, "trained_seconds": %s}]}'
)


class Reader(HTMLParser):
    """Tags with their attributes, tables by their caption, and the text that a person sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "wbr"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data
        if "caption" in self._open:
            self._caption += data
        elif self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data

    def table(self, title: str) -> list[dict[str, str]]:
        """Rows below the heads."""
        heads, *rows = self.tables[title]
        return [dict(zip(heads, row, strict=True)) for row in rows]


def page_of(*words: object, folder: Path) -> Reader:
    """The page about runs, which is whole: every tag is closed."""
    output = folder / "report.html"
    assert main(["report", *map(str, words), "--output", str(output)]) == 0
    reader = Reader(output.read_text("utf-8"))
    assert reader._open == []
    assert not any(
        name == "href" and not value.startswith(("#", "data:,"))
        for _, own in reader.tags
        for name, value in own.items()
    )
    return reader


def refused(capsys, *words: object) -> str:
    assert main(["report", *map(str, words)]) == 1
    return capsys.readouterr().err


@pytest.fixture
def pictures(monkeypatch):
    """Runs are drawn, but of their pictures only the curves become pixels."""
    draw = report_figures.picture

    def picture(name, figure, alt, caption):
        return draw(name, figure, alt, caption) if "curves" in name else Picture(name, PNG, 9, 9, alt, caption)

    monkeypatch.setattr(report_figures, "picture", picture)


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """They take longer than all of the rest: what does not ask for ``pictures`` has none."""
    if "pictures" not in request.fixturenames:
        for part in ("curve_blocks", "class_pictures", "filter_blocks"):
            monkeypatch.setattr(report, part, lambda *runs: [])


# ------------------------------------------------------------------------------------------------------ real runs
def test_a_real_run_and_its_pictures(videos, tmp_path, pictures):
    """All that a report shows of a run is in its folder."""
    folder = tmp_path / "tested"
    uses = labelled(videos, TRAIN="train", VAL="test", TEST="test")
    run(small_cfg(videos, folder, TEST={"ENABLE": True}, **uses))
    record = read_record(folder)
    assert record.files == [str(tmp_path / "tested.yaml")]
    (part,) = record.parts
    assert part.state == "done"
    assert part.steps == 3
    assert part.trained_seconds > 0
    assert "torch" in part.environment
    page = page_of(folder, "--markdown", folder=tmp_path)
    (row,) = page.table("Test results")
    metrics = json.loads((folder / "test" / "metrics.json").read_text())
    assert row["top-1, %"] == f"{100 * metrics['top1']:.1f}"
    assert row["tested on"] == "6 videos"
    (row,) = page.table("Time of trainings")
    assert row["steps"] == "3"
    # Steps of 30 ms have five decimals of a second in the log; the page rounds to one of a percent.
    assert float(row["data wait, %"]) == pytest.approx(100 * part.wait_share, abs=0.15)
    captions = [own["aria-label"] for tag, own in page.tags if own.get("role") == "region"]
    for start in ("Curves of 1 run", "Confusions of tested", "First filters of R2Plus1D", "Versions and machine"):
        assert any(caption.startswith(start) for caption in captions)
    sources = [own["src"] for tag, own in page.tags if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(len(source) < 150_000 for source in sources)
    assert all(own["alt"] for tag, own in page.tags if tag == "img")
    text = (tmp_path / "report.md").read_text("utf-8")
    pictures = re.findall(r"\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "| run | top-1, % |" in text


def test_thin_lines_keep_their_colours():
    """A picture has few colours, and a legend needs each of them, also where most of it is something else."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)) / 255
    figure = new_figure(2.0, 2.0)
    axis = figure.subplots()
    axis.imshow(noise)
    figure.text(0, 0, "letters")
    for place, colour in enumerate(COLOURS):
        axis.add_patch(Rectangle((place * 5, 10), 3, 3, color=colour))
    found = report_figures.picture("x", figure, "", "")
    colours = {colour for _, colour in Image.open(io.BytesIO(found.png)).convert("RGB").getcolors(maxcolors=1 << 16)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in (*COLOURS, "#ffffff")} <= colours
    assert len(colours) <= 256
    (corner,) = Image.open(io.BytesIO(found.png)).convert("RGB").crop((1, 1, 2, 2)).getcolors()
    assert corner == (1, (255, 255, 255))


def test_what_becomes_of_a_run_is_recorded(videos, tmp_path, monkeypatch):
    """A failure is, a refusal in another run's folder leaves that run as it was, going on adds to it."""
    folder = tmp_path / "run"
    cfg = small_cfg(videos, folder, **labelled(videos))

    def fail(session, stop):
        raise UserError("the disk burns.")

    with monkeypatch.context() as patch:
        patch.setattr(running, "train_in_session", fail)
        with pytest.raises(UserError, match="burns"):
            run(cfg)
    (part,) = read_record(folder).parts
    assert (part.state, part.error) == ("failed", "the disk burns.")
    assert part.ended >= part.started
    run(cfg)
    assert [part.state for part in read_record(folder).parts] == ["failed", "done"]
    before = (folder / RECORD_FILE).read_bytes()
    with pytest.raises(UserError, match="another run"):
        run(small_cfg(videos, folder, **labelled(videos), RNG_SEED=5))
    assert (folder / RECORD_FILE).read_bytes() == before
    page = page_of(folder, folder=tmp_path)
    assert "failed" not in page.text
    (folder / RECORD_FILE).unlink()  # as an older version would have left it: the checkpoint knows its configuration
    (row,) = page_of(folder, folder=tmp_path).table("Runs")
    assert (row["network"], row["seed"], row["learns from"]) == ("R2Plus1D", "0", "labels")


# --------------------------------------------------------------------------------------------- runs of other kinds
def test_differences_and_configurations(tmp_path):
    one = write_run(tmp_path / "one", top1=0.25)
    inflated = settings(1, INIT={"INFLATE_FROM": "Res2D"})
    other = write_run(tmp_path / "other", top1=0.75, config=inflated)
    page = page_of(one, other, folder=tmp_path)
    assert [row["top-1, %"] for row in page.table("Test results")] == ["25.0", "75.0"]
    assert [row["start"] for row in page.table("Test results")] == ["random weights", "inflated Res2D"]
    assert page.table("What differs between the configurations") == [
        {"key": "INIT.INFLATE_FROM", "one": "–", "other": "Res2D"}
    ]
    assert page.text.count("INFLATE_FROM: Res2D") == 1  # the whole configuration
    assert [row["one"] for row in page.table("Accuracy of each class, %")] == ["25.0", "25.0"]
    assert page.table("Versions and machine")[1] == {"what": "commit", "value": "0123456789ab"}
    # The same but for the seed: nothing to tell.
    same = write_run(tmp_path / "same", config=settings(7))
    page = page_of(one, same, folder=tmp_path)
    assert "What differs between the configurations" not in page.tables
    assert "All configurations are the same" in page.text


def test_runs_that_are_not_done(tmp_path):
    unfinished = write_run(tmp_path / "unfinished", state="running", top1=None, epochs=1)
    failed = write_run(tmp_path / "failed", state="failed", error="there is no memory left.", top1=None, epochs=0)
    page = page_of(unfinished, failed, write_run(tmp_path / "good", epochs=2), folder=tmp_path)
    rows = page.table("Test results")
    assert [row["state"] for row in rows] == ["unfinished, epoch 1/2", "failed", "done"]
    assert [row["top-1, %"] for row in rows] == ["–", "–", "50.0"]
    assert "failed failed: there is no memory left." in page.text
    assert [row["run"] for row in page.table("Time of trainings")] == ["unfinished", "good"]
    assert page.table("Time of trainings")[0]["clips per s"] == "16.0"  # 8 clips in half a second
    assert page.table("Time of trainings")[0]["data wait, %"] == "25.0"


def test_keyframes_and_bad_videos(tmp_path):
    run_folder = write_run(tmp_path / "ava", top1=None)
    write_metrics(
        run_folder,
        map=0.23,
        num_keyframes=9,
        per_class={"sit": 0.1, "fly": None},
        bad=[{"path": "a.mp4", "reason": "cut"}],
    )
    (run_folder / "bad_videos.csv").write_text("path,reason\nb.mp4,no frames\na.mp4,cut\n")
    page = page_of(run_folder, folder=tmp_path)
    assert page.table("Test results")[0]["frame-mAP, %"] == "23.0"
    assert page.table("Average precision of each class, %") == [
        {"class": "sit", "ava": "10.0"},
        {"class": "fly", "ava": "–"},
    ]
    assert [row["video"] for row in page.table("Videos that could not be used")] == ["a.mp4", "b.mp4"]


def shipped(name, *words):
    cfg, _ = load_cfg(f"configs/{name}.yaml", words, check=False)
    return parse_yaml(cfg.dump(), name)


def test_published_numbers_stand_beside_ours(tmp_path):
    """Of the file's own name and keys; what is changed in the file is named."""
    name = "DistInit/table2_random_finetune"
    (published,) = rows_of(name)
    folder = tmp_path / "run"
    write_run(
        folder,
        top1=0.5,
        config=shipped(name, "DATA.NUM_FRAMES", "4", "RNG_SEED", "3"),
        files=(f"/somewhere/configs/{name}.yaml",),
    )
    rows = {row["measure"]: row for row in page_of(folder, folder=tmp_path).table("Against published numbers")}
    assert rows["top-1"]["published, %"] == f"{published.values['top1']:.1f}"
    assert rows["top-1"]["here, %"] == "50.0"
    assert rows["top-1"]["difference"] == f"{50 - published.values['top1']:+.1f}"
    assert "DATA.NUM_FRAMES 4 (is 8)" in rows["top-1"]["changed in the file"]
    assert "RNG_SEED" not in rows["top-1"]["changed in the file"]
    again = write_run(tmp_path / "again", config=shipped(name), files=(f"configs/{name}.yaml",))
    rows = page_of(again, folder=tmp_path).table("Against published numbers")
    assert {row["changed in the file"] for row in rows} == {"nothing"}


def test_a_study(tmp_path, capsys):
    scores = {"scratch": (0.5, 0.25, 0.375), "DistInit": (0.625, 0.5, None)}
    rows = {row: {str(seed): f"{row}_{seed}" for seed in range(3)} for row in scores}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            write_run(tmp_path / "runs" / f"{row}_{seed}", top1=value, config=settings(seed))
    rows["inflated"] = {"0": "never_started"}
    file = tmp_path / "runs" / "study.json"
    study = {"name": "Does it help?", "baseline": "scratch", "rows": rows, "metric": "top1"}
    file.write_text(json.dumps(study))
    page = page_of("--study", file, folder=tmp_path)
    table = {row["row"]: row for row in page.table("Study: Does it help?")}
    assert table["scratch"]["top-1, %"] == "37.5 ± 12.5"
    assert table["scratch"]["difference, points"] == "–"
    assert table["DistInit"]["difference, points"] == paired_text([0.125, 0.25]) == "+18.8 ± 6.2"
    assert table["DistInit"]["seeds ahead"] == "2 of 2"
    assert table["DistInit"]["seed 2"] == "–"
    assert "DistInit: no result for seed 2." in page.text
    states = {row["run"]: row["state"] for row in page.table("Test results")}
    assert len(states) == 7
    assert (states["inflated, seed 0"], states["scratch, seed 0"]) == ("not started", "done")
    assert page.text.count("scratch, seed 0") > 1
    own = {"baseline": None, "baselines": {"DistInit": "scratch", "scratch": "inflated"}}
    file.write_text(json.dumps(study | own))
    table = {row["row"]: row for row in page_of("--study", file, folder=tmp_path).table("Study: Does it help?")}
    assert [table[row]["compared with"] for row in table] == ["inflated", "scratch", "–"]
    assert table["DistInit"]["difference, points"] == "+18.8 ± 6.2"
    assert table["scratch"]["difference, points"] == "–"  # its baseline has no result
    assert "chosen" not in table["scratch"]
    shown = {"shown": ["DistInit", "scratch"], "average": ["split", "seed"]}
    file.write_text(json.dumps(study | shown))
    page = page_of("--study", file, folder=tmp_path)
    table = {row["row"]: row for row in page.table("Study: Does it help?")}
    assert [table[row]["chosen"] for row in rows] == ["yes", "yes", "–"]
    assert table["DistInit"]["split, seed 1"] == "50.0"
    assert [*page.table("Accuracy of each class, %")[0]] == [
        "class",
        "scratch, split, seed 0",
        "DistInit, split, seed 0",
    ]
    file.write_text(
        json.dumps(study | {"average": [], "rows": {row: {"only": found["0"]} for row, found in rows.items()}})
    )
    page = page_of("--study", file, folder=tmp_path)
    assert [row["run"] for row in page.table("Runs")] == [*rows]
    assert page.table("Study: Does it help?")[1]["difference, points"] == "+12.5"
    assert "inflated: no result." in page.text
    for change, message in (
        ({"baseline": "gone"}, "its baseline is none of its rows"),
        ({"shown": ["gone"]}, "what it shows is none of its rows"),
        ({"average": "seed"}, "is no list"),
        ({"rows": {}}, "it has no runs"),
        ({"baselines": {"scratch": "gone"}}, "its baselines are none of its rows"),
        ({"rows": {"a": ["b"]}}, "no objects"),
        ({"rows": {"a": {"0": 7}}}, "a folder is no text"),
        ({"metric": "beauty"}, "its metric is none of"),
    ):
        file.write_text(json.dumps(study | change))
        assert message in refused(capsys, "--study", file)
    file.write_text("[")
    assert "cannot be read as a study" in refused(capsys, "--study", file)


def test_folders_that_hold_no_run(tmp_path, capsys):
    assert "holds no run" in refused(capsys, tmp_path)
    assert "no such file or directory" in refused(capsys, tmp_path / "gone")
    assert "nothing to report" in refused(capsys)
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "data").mkdir()
    assert "HTML file" in refused(capsys, tmp_path / "runs", "--output", tmp_path / "report.pdf")
    assert [row["run"] for row in page_of(tmp_path / "runs", folder=tmp_path).table("Runs")] == ["a", "b"]
    write_run(tmp_path / "others" / "a")
    (tmp_path / "again").symlink_to(tmp_path / "runs" / "a")
    page = page_of(tmp_path / "runs" / "a", tmp_path / "others", tmp_path / "again", folder=tmp_path)
    assert [row["run"] for row in page.table("Runs")] == ["runs/a", "others/a"]


def test_of_a_study_the_chosen_rows_are_drawn(tmp_path):
    """As many of them as there is room for, and not the values that validation did not choose."""
    facts = [RunFacts(name, tmp_path / name, settings={"SOLVER.BASE_LR": name}) for name in "abcde"]
    rows = {name: {"0": tmp_path / name} for name in "abcd"}
    drawn = report_figures.representatives(facts, Study("s", rows, shown=["b", "d"]))
    assert [found.name for found in drawn] == ["b", "d", "e"]  # e is of no study
    drawn = report_figures.representatives(facts, Study("s", rows))
    assert [found.name for found in drawn] == ["a", "b", "c", "d", "e"]


def test_no_two_pictures_have_one_caption(tmp_path, monkeypatch):
    """They name boxes, by which people who see none find their way."""
    monkeypatch.setattr(report_figures, "CURVES", 2)
    monkeypatch.setattr(report_figures, "picture", lambda name, *rest: Picture(name, PNG, 9, 9, *rest[1:]))
    facts = [report.read_run(name, write_run(tmp_path / name, epochs=1)) for name in "abcde"]
    captions = [block.caption for block in report_figures.curve_blocks(facts)]
    assert len(captions) == len(set(captions)) == 3


def test_markdown_finds_its_pictures_whatever_it_is_called(tmp_path, monkeypatch):
    """Blanks and brackets of a name would end the address of a picture."""
    monkeypatch.setattr(report, "curve_blocks", lambda runs: [Picture("curves_1", PNG, 9, 9, "a", "b")])
    output = tmp_path / "my (best) report.html"
    assert main(["report", str(write_run(tmp_path / "run")), "--markdown", "--output", str(output)]) == 0
    (address,) = re.findall(r"\]\((\S+)\)\n", output.with_suffix(".md").read_text("utf-8"))
    assert (tmp_path / unquote(address)).read_bytes() == PNG
    assert not set(" ()") & set(address)


# ------------------------------------------------------------------------------------------------ hostile contents
@pytest.mark.parametrize(
    "contents",
    [
        "[",
        "[1]",
        '{"top1": "<b>"}',
        '{"top1": 7}',
        '{"top1": 1e999}',
        f'{{"top1": {"9" * 400}}}',
        '{"top1": 0.5, "per_class": [1]}',
        '{"top1": 0.5, "per_class": {"a": [0]}}',
        '{"top1": 0.5, "num_videos": -1}',
        '{"top1": 0.5, "bad": [{"path": "a"}]}',
        "[" * 100_000,
    ],
)
def test_a_malformed_result_is_a_sentence(contents, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "test" / "metrics.json").write_text(contents)
    page = page_of(folder, folder=tmp_path)
    assert "cannot be read as the result of a test" in page.text
    assert "top-1, %" not in page.table("Test results")[0]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("run.json", "{", "cannot be read as the record of a run"),
        ("run.json", '{"format": 2}', "its format is not 1"),
        ("run.json", '{"format": 1, "files": [], "config": "", "parts": [3]}', "a part of it is no object"),
        ("run.json", '{"format": 1, "files": [], "config": "[}", "parts": []}', "cannot be read as YAML"),
        ("run.json", '{"format": 1, "files": [], "config": "7", "parts": []}', "no mapping"),
        ("run.json", '{"format": 1, "files": [], "config": "!!python/name:os.system x", "parts": []}', "YAML"),
        (
            "json_stats.log",
            'json_stats: {"_type": "train_epoch", "epoch": 1, "dt": "x", "iter": 3}\njson_stats: [1]\n',
            "",
        ),
        (
            "json_stats.log",
            "".join(
                f'json_stats: {{"_type": "{kind}", "epoch": "{epoch}", "iter": "1/2", "loss": {loss}}}\n'
                for kind in ("train_iter_", "train_epoch")
                for epoch, loss in (("9" * 400, 1), ("2/3", "1e308"), ("3/3", "-1e308"), ("1/-1", 1))
            ),
            "",
        ),
        ("run.json", HUGE % "1e300", "a number that is none"),
        ("run.json", HUGE % "NaN", "a number that is none"),
        ("bad_videos.csv", "path,reason\n" + "x" * 200_000 + ",y\n", "cannot be read as a list of videos"),
        ("test/scores.npz", "PK", "cannot be read as the scores of a test"),
    ],
)
def test_damaged_files_are_sentences(name, contents, message, tmp_path, pictures):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(contents)
    assert message in page_of(folder, folder=tmp_path).text


def test_a_configuration_that_would_grow_without_bound(tmp_path):
    """Aliases of aliases: ten lines that stand for ten thousand million values."""
    lines = ["A0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"A{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    folder = write_run(tmp_path / "run")
    record = read_record(folder)
    record.config = "\n".join(lines)
    record.write(folder)
    begin = time.monotonic()
    page_of(folder, folder=tmp_path)
    assert time.monotonic() - begin < 10
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_nothing_in_a_run_is_markup(tmp_path):
    """Names of runs, classes, keys, values, errors, videos, studies: all of it is text, in HTML and in Markdown."""
    name = EVIL.replace("/", "_")
    config = settings(0, MODEL={"MODEL_NAME": EVIL}, **{EVIL: EVIL})
    folder = write_run(
        tmp_path / "runs" / name,
        config=config,
        classes=(EVIL, "right"),
        state="failed",
        error=EVIL,
        bad=((f"{EVIL}\x1b[31m\u202e.mp4", EVIL),),
        files=(EVIL,),
    )
    (folder.parent / "study.json").write_text(
        json.dumps({"name": EVIL, "rows": {EVIL: {EVIL: name}}, "metric": "top1"})
    )
    plain = write_run(tmp_path / "plain")
    clean = {tag for tag, _ in page_of(plain, folder=tmp_path).tags}
    page = page_of("--study", folder.parent / "study.json", "--markdown", folder=tmp_path)
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == 1
    assert {tag for tag, _ in page.tags} <= clean | {"p", "details", "summary", "pre"}
    assert not any(key.startswith("on") for _, own in page.tags for key in own)
    assert page.text.count(EVIL) >= 8  # a person sees what it is called
    assert page.tables["Videos that could not be used"][1][0].endswith("\ufffd[31m\ufffd.mp4")
    text = (tmp_path / "report.md").read_text("utf-8")
    outside = re.sub(r"^(`{3,})\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert "<img" not in outside
    assert html.escape(EVIL, quote=False)[:12] in outside


def test_a_hundred_runs(tmp_path):
    """Small and quick: the most that a study on one machine has."""
    for number in range(100):
        config = settings(
            number % 5,
            SOLVER={"BASE_LR": 0.1 * (number // 5)},
            NOTES={"TEXT": "x" * 5000},
        )
        write_run(tmp_path / "runs" / f"run_{number:03d}", top1=number / 100, config=config)
    begin = time.process_time()
    page = page_of(tmp_path / "runs", folder=tmp_path)
    assert time.process_time() - begin < 20
    assert (tmp_path / "report.html").stat().st_size < 20 * 1024**2
    assert len(page.table("Test results")) == 100
    differing = page.table("What differs between the configurations")
    assert list(differing[0]) == ["run", "SOLVER.BASE_LR"]
    assert len({row["SOLVER.BASE_LR"] for row in differing}) == 20


# --------------------------------------------------------------------------------------------- pictures that are given
def test_given_pictures(tmp_path):
    """On white, no larger than needed, each below its name; one that is named twice is there once."""
    run = write_run(tmp_path / "run")
    first, second = tmp_path / "tsne.png", tmp_path / f"{EVIL.replace('/', '_')}.png"
    Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(first)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(second)
    page = page_of(run, "--pictures", first, second, first, "--markdown", folder=tmp_path)
    shown = [own for tag, own in page.tags if tag == "img"][-2:]
    assert [(own["width"], own["height"]) for own in shown] == [("30", "20"), ("2400", "1200")]
    found = [Image.open(io.BytesIO(base64.b64decode(own["src"].partition(",")[2]))).convert("RGB") for own in shown]
    assert found[0].getpixel((3, 3)) == (255, 255, 255)
    assert found[1].size == (2400, 1200)
    assert page.text.count(str(first)) == page.text.count(str(second)) == 1
    assert (tmp_path / "report_files" / "figure_2.png").stat().st_size < second.stat().st_size / 2
    assert "figure_1.png" in (tmp_path / "report.md").read_text("utf-8")


@pytest.mark.parametrize("damage", ["absent", "cut", "text", "folder", "jpeg"])
def test_what_is_no_picture_is_refused_before_anything_is_written(damage, tmp_path, capsys):
    run, path = write_run(tmp_path / "run"), tmp_path / "picture.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, "JPEG" if damage == "jpeg" else "PNG")
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("no picture")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    error = refused(capsys, run, "--pictures", path, "--output", tmp_path / "report.html")
    assert f"--pictures {path} cannot be read as a PNG" in error
    assert not (tmp_path / "report.html").exists()
