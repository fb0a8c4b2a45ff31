"""Folders of frames, and single images."""

import numpy as np
import pytest
from PIL import Image
from videos import frame_numbers, number_frame

from distinit_plugin.errors import VideoError
from distinit_plugin.video.decode import open_video
from distinit_plugin.video.images import natural_key


def test_folders_of_frames_are_read_in_natural_order(tmp_path):
    for number in range(12):
        Image.fromarray(number_frame(number, 40, 60)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    with open_video(tmp_path) as reader:
        assert (reader.index.num_frames, reader.index.height, reader.index.width) == (12, 40, 60)
        assert frame_numbers(reader.read([10, 2, 2, 11])) == [10, 2, 2, 11]
        assert np.array_equal(reader.read([3])[0], number_frame(3, 40, 60))
        with pytest.raises(VideoError, match="frame 12 was asked for, but it has 12 frames"):
            reader.read([12])


def test_natural_order():
    names = ["img10.jpg", "img2.jpg", "img1.jpg", "1.jpg", "b.jpg"]
    assert sorted(names, key=natural_key) == ["1.jpg", "b.jpg", "img1.jpg", "img2.jpg", "img10.jpg"]


def test_an_image_is_a_video_of_one_frame(tmp_path):
    image = number_frame(77, 40, 60)
    Image.fromarray(image).save(tmp_path / "a.png")
    with open_video(tmp_path / "a.png") as reader:
        assert reader.index.num_frames == 1
        assert np.array_equal(reader.read([0, 0]), np.stack([image, image]))


def test_folders_without_frames_or_with_mixed_sizes_are_refused(tmp_path):
    with pytest.raises(VideoError, match="is a folder without images"):
        open_video(tmp_path)
    Image.fromarray(number_frame(0, 40, 60)).save(tmp_path / "0.png")
    Image.fromarray(number_frame(1, 30, 60)).save(tmp_path / "1.png")
    with (
        open_video(tmp_path) as reader,
        pytest.raises(VideoError, match=r"frame 1 \(1.png\) is 60×30, the first frame is 60×40"),
    ):
        reader.read([0, 1])
