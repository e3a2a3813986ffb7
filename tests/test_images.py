"""Crop and resize: the pixels that come out are those that went in, averaged over their areas."""

import numpy as np
import pytest

from so101.errors import DataError
from so101.images import preprocess
from so101.schema import Preprocess


def box_weights(size: int, wanted: int) -> np.ndarray:
    """(wanted, size): the share of each input pixel in each output pixel; rows sum to 1."""
    edges = np.linspace(0, size, wanted + 1)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(high, np.arange(1, size + 1)) - np.maximum(low, np.arange(size))
    return np.clip(overlap, 0, None) / (size / wanted)


@pytest.mark.parametrize(("side", "wanted"), [(480, 128), (256, 128), (480, 96), (128, 128)])
def test_resize_is_the_average_over_each_pixels_area(side, wanted):
    frame = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    weights = box_weights(side, wanted)
    average = np.einsum("yh,hwc,xw->yxc", weights, frame.astype(np.float64), weights, optimize=True)
    made = preprocess(frame, Preprocess(crop=None, image_size=wanted))
    assert made.shape == (wanted, wanted, 3) and made.dtype == np.uint8
    assert np.abs(made - average).max() <= 0.51  # half a grey level of rounding, and float32 inside


def test_the_crop_takes_the_right_pixels():
    # 480x640, each pixel marked with its own row and column; 32x32 out of 64x64: 2x2 pixels make one
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[..., 0] = np.arange(480)[:, None] % 251
    frame[..., 1] = np.arange(640) % 241
    frame[100, 200] = frame[101, 201] = frame[100, 201] = frame[101, 200] = (255, 255, 255)
    frame[163, 263, 2] = 200  # the crop's last pixel; the one after it must not be seen
    frame[164, 264, 2] = 255
    made = preprocess(frame, Preprocess(crop=[100, 200, 64, 64], image_size=32))
    assert made[0, 0].tolist() == [255, 255, 255]
    assert made[1, 1].tolist() == pytest.approx([102.5, 202.5, 0], abs=0.5)  # rows 102, 103; columns 202, 203
    assert made[31, 31, 2] == 50  # one of four pixels at 200
    assert made[..., 2].astype(int).sum() == 255 + 50


def test_the_frame_is_left_alone_and_the_order_of_colours_kept():
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[..., 0] = 200
    kept = frame.copy()
    made = preprocess(frame, Preprocess(crop=None, image_size=64))
    made[:] = 7
    assert (frame == kept).all()
    assert preprocess(frame, Preprocess(crop=None, image_size=32))[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    ("frame", "crop", "sentence"),
    [
        (np.zeros((480, 640, 3), np.float32), None, r"got float32 \(480, 640, 3\), must be uint8"),
        (np.zeros((480, 640), np.uint8), None, r"got uint8 \(480, 640\), must be uint8 \(height, width, 3\)"),
        (np.zeros((3, 480, 640), np.uint8), None, "must be uint8"),
        (np.zeros((128, 128, 3), np.uint8), [0, 80, 480, 480], "does not fit a 128x128 frame; .* crop=null"),
        (np.zeros((480, 640, 3), np.uint8), [1, 80, 480, 480], "does not fit a 640x480 frame"),
        (np.zeros((480, 640, 3), np.uint8), [0, 161, 480, 480], "does not fit a 640x480 frame"),
        (np.zeros((480, 640, 3), np.uint8), None, "crop of 640x480 is not square"),
    ],
)
def test_refusals(frame, crop, sentence):
    with pytest.raises(DataError, match=sentence):
        preprocess(frame, Preprocess(crop=crop))


def test_a_frame_recorded_smaller_than_the_network_is_refused_with_the_reason():
    """Field record, row 14: the 84x84 recordings had lost what the network was to see."""
    with pytest.raises(DataError, match="84x84 is smaller than the network's 128x128.* record anew to train"):
        preprocess(np.zeros((84, 84, 3), np.uint8), Preprocess(crop=None))
