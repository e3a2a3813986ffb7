"""Statistics of each feature of an episode, in the form LeRobot keeps them, and how two such merge.

Normalisation in this program never reads these: they are there for other software, and for a person.
"""

import numpy as np

Stats = dict[str, np.ndarray]  # min, max, mean, std, count and the quantiles below

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def column_stats(values: np.ndarray) -> Stats:
    """Statistics over the rows of one column, (T,) or (T, d) -> arrays of (1,) or (d,).

    `std` is the population's; `min` and `max` keep the column's type.
    """
    rows = values.reshape(len(values), -1)
    numbers = rows.astype(np.float64)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": numbers.mean(0), "std": numbers.std(0)}
    quantiles = {name: np.quantile(numbers, q, axis=0) for name, q in QUANTILES.items()}
    return {**stats, "count": np.array([len(rows)]), **quantiles}


def frame_histogram(frame: np.ndarray) -> np.ndarray:
    """Counts of the 256 values of each channel in one frame, (H, W, 3) uint8 -> (3, 256).

    A side of 300 pixels or more is thinned by a stride of int(longer side / 150), as LeRobot does.
    """
    longer = max(frame.shape[:2])
    stride = int(longer / 150) if longer >= 300 else 1
    small = frame[::stride, ::stride]
    return np.stack([np.bincount(small[:, :, channel].ravel(), minlength=256) for channel in range(3)])


def sampled_frames(length: int) -> np.ndarray:
    """Which frames of an episode stand for it: all up to 100, then evenly max(100, length ** 0.75)."""
    count = max(min(100, length), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, count)).astype(int)


def image_stats(histograms: np.ndarray) -> Stats:
    """Statistics of a video, in 0..1, from its frames' histograms (n, 3, 256) -> arrays of (3, 1, 1)."""
    counts = histograms.sum(0)  # (3, 256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    low = values[(counts > 0).argmax(1)]
    high = values[255 - (counts > 0)[:, ::-1].argmax(1)]
    below = share.cumsum(1)
    quantiles = {name: values[(below < q - 1e-12).sum(1)] for name, q in QUANTILES.items()}
    channels = {"min": low, "max": high, "mean": mean, "std": std, **quantiles}
    stats = {name: channel.reshape(3, 1, 1) for name, channel in channels.items()}
    return {**stats, "count": np.array([len(histograms)])}


def merge_stats(first: Stats, second: Stats) -> Stats:
    """Statistics of two sets of rows together: exact but for the quantiles, which are averaged by count.

    The variance is Chan's: each set's own, plus the squared distance of its mean from the common one.
    """
    n1, n2 = first["count"], second["count"]
    w1, w2 = n1 / (n1 + n2), n2 / (n1 + n2)
    mean = w1 * first["mean"] + w2 * second["mean"]
    variance = w1 * (first["std"] ** 2 + (first["mean"] - mean) ** 2)
    variance = variance + w2 * (second["std"] ** 2 + (second["mean"] - mean) ** 2)
    low, high = np.minimum(first["min"], second["min"]), np.maximum(first["max"], second["max"])
    merged = {"min": low, "max": high, "mean": mean, "std": np.sqrt(variance), "count": n1 + n2}
    return {**merged, **{name: w1 * first[name] + w2 * second[name] for name in QUANTILES}}
