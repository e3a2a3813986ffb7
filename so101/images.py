"""From a camera's frame to the network's image. The only crop and the only resize in the program."""

import cv2
import numpy as np

from so101.errors import DataError
from so101.schema import Preprocess


def preprocess(frame: np.ndarray, spec: Preprocess) -> np.ndarray:
    """Crop and area-resize one frame, (H, W, 3) uint8 RGB -> (S, S, 3) uint8 RGB with S = image_size.

    Raises DataError where the frame is not uint8 RGB, the crop does not lie inside it, or is not square.
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise DataError(f"image: got {frame.dtype} {frame.shape}, must be uint8 (height, width, 3) RGB")
    top, left, height, width = spec.crop or (0, 0, *frame.shape[:2])
    if top + height > frame.shape[0] or left + width > frame.shape[1]:
        raise DataError(
            f"crop {spec.crop} does not fit a {frame.shape[1]}x{frame.shape[0]} frame; "
            f"a dataset cropped when it was recorded needs crop=null"
        )
    if height != width:
        raise DataError(f"crop of {width}x{height} is not square, so the resize would squash it")
    if height < spec.image_size:
        raise DataError(
            f"a frame of {width}x{height} is smaller than the network's {spec.image_size}x{spec.image_size}, and what "
            f"was not recorded cannot be learned from: look at it and label it, but record anew to train"
        )
    cropped = frame[top : top + height, left : left + width]
    return cv2.resize(cropped, (spec.image_size, spec.image_size), interpolation=cv2.INTER_AREA)
