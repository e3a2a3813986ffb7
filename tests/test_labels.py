"""Label files: success per observation, refusals that name the place, and labels that were written elsewhere."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from so101.data.label_import import import_labels
from so101.data.labels import EpisodeLabel, Labels, frames_wanted, label_episode, labels_path
from so101.errors import DataError

ROOT = Path(__file__).parents[1]
LIFT = "cutoffs = {0: 53, 1: 36, 2: 43, 3: 40, 4: 40, 5: 44, 6: 44, 7: 39, 8: 43, 9: 34}"
REACH = """
00: 119    05: 39     10: 47     15: 62
01: 129    06: 76     11: 39     16: 33
02: 43     07: 44     12: 46     17: 35
03: 42     08: 36     13: 57     18: 41
04: 41     09: 42     14: 37     19: 55
"""
REACH_V1 = """Episode, Success Start, Env Reset Start, Notes
0,63,119,
1,63,116,
2,61,109,
3,75,115,
4,67,129,Gap: 78-88 are failure
5,61,90,
6,57,85,
7,45,78,
8,55,nan,No reset frames
9,43,71,
10,43,67,
11,27,48,
12,32,68,
13,41,63,
14,30,53,
"""
TWO_SETS = """# dataset path: /home/somebody/.cache/huggingface/lerobot/somebody/grasp_v1
00: 34-         # frames 34+ are success (1-indexed)
14: 40-48, 60-  # frames 40-48 success, then frames 60+ success

# /home/somebody/.cache/huggingface/lerobot/somebody/grasp_negative_v1
00: all fail
09: 56-58,61-63,66-  # intermittent success ranges
"""
PLAIN = {"one_based": False, "end_inclusive": True}  # as the original's creation script took its JSON files


def shown(label: EpisodeLabel, observations: int) -> str:
    return "".join("+" if success else "." for success in label.success(observations))


def totals(labels: dict[int, EpisodeLabel], frames: dict[int, int]) -> tuple[int, int]:
    """Frames of success and of failure over episodes of so many frames."""
    success = np.concatenate([labels[episode].success(count) for episode, count in frames.items()])
    return int(success.sum()), int((~success).sum())


def test_the_published_cutoffs_give_584_success_and_416_failure_frames() -> None:
    labels = import_labels(LIFT, "notes.txt", one_based=False, end_inclusive=False, observations=[100] * 10)
    assert totals(labels, dict.fromkeys(range(10), 100)) == (584, 416)


def test_the_published_column_table_gives_869_success_and_1063_failure_frames() -> None:
    """1932 frames; the failures are the frames before each start, so their number shows it counts from 0."""
    labels = import_labels(REACH, "reach.txt", one_based=False, end_inclusive=False)
    assert len(labels) == 20 and labels[0].success_start == 119 and labels[19].success_start == 55
    failures = sum(int((~label.success(135)).sum()) for label in labels.values())
    assert failures == 1063 and 1932 - failures == 869
    from_one = import_labels(REACH, "reach.txt", one_based=True, end_inclusive=False)
    assert sum(int((~label.success(135)).sum()) for label in from_one.values()) == 1063 - 20


def test_the_published_ranges_of_the_lamp_set() -> None:
    """Five episodes of 10 s: "ep0: 14-28, ep2: 12-end success; others all fail"."""
    lines = "0: 14-28\n1: all fail\n2: 12-end\n3: all fail\n4: all fail"
    source = {"dataset_path": "/somewhere/lamp_5ep", "episodes": {str(i): None for i in range(5)}}
    source["episodes"] |= {"0": {"ranges": [[14, 28]]}, "2": {"ranges": [[12, None]]}}
    for text in (lines, json.dumps(source)):
        labels = import_labels(text, "lamp", **PLAIN, observations=[100] * 5)
        assert np.flatnonzero(labels[0].success(100)).tolist() == list(range(14, 29))
        assert np.flatnonzero(labels[2].success(100)).tolist() == list(range(12, 100))
        assert totals(labels, dict.fromkeys(range(5), 100)) == (15 + 88, 500 - 103)


def test_the_original_s_second_reach_set_counts_from_1() -> None:
    """Published with it: 53, 44, 46, 0 and 44 frames of success; 48, 106, 66, 150 and 97 of failure."""
    text = "0: 49-\n1: 107-\n2: 67-\n3: all fail\n4: 98-\n"
    labels = import_labels(text, "v2.txt", one_based=True, end_inclusive=True)
    counts = dict(enumerate([101, 150, 112, 150, 141]))
    assert [totals(labels, {i: n}) for i, n in counts.items()] == [(53, 48), (44, 106), (46, 66), (0, 150), (44, 97)]
    assert totals(labels, counts) == (187, 467)


def test_the_table_of_the_first_reach_set_gives_537_success_and_759_failure_frames() -> None:
    """Published with it: 1296 frames before the resets. That fits only counted from 1, with 99 in episode 8."""
    table = {"one_based": True, "end_inclusive": True, "reset_is_failure": True}
    labels = import_labels(REACH_V1, "reach.csv", **table)
    before_reset = [119, 116, 109, 115, 129, 90, 85, 78, None, 71, 67, 48, 68, 63, 53]
    frames = {i: 99 if reset is None else reset - 1 for i, reset in enumerate(before_reset)}
    assert sum(frames.values()) == 1296 and totals(labels, frames) == (537, 759)
    assert labels[4].ranges == [[66, 77], [88, 128]] and labels[8] == EpisodeLabel(success_start=54)
    whole = {i: n + 20 for i, n in frames.items()}  # as recorded, with the resets: none of them is success
    assert totals(labels, whole)[0] == 537 + 20  # only episode 8, which has none, goes on
    with pytest.raises(DataError, match="line 2: episode 0: .*say reset_is_failure"):
        import_labels(REACH_V1, "reach.csv", one_based=True, end_inclusive=True)


def test_each_form_by_hand() -> None:
    assert shown(EpisodeLabel(success_start=3), 6) == "...+++"
    assert shown(EpisodeLabel(success_start=5), 6) == ".....+"  # the closing observation of 5 rows
    assert shown(EpisodeLabel(ranges=[[1, 3], [4, 5]]), 6) == ".++.+."
    assert shown(EpisodeLabel(ranges=[[1, 2], [4, None]]), 6) == ".+..++"
    assert shown(EpisodeLabel(ranges=[[0, 6]]), 6) == "++++++"
    assert shown(EpisodeLabel(all_fail=True), 6) == "......"
    assert shown(EpisodeLabel(success_start=2, exclude=[3, 0]), 6) == "..+.++"


@pytest.mark.parametrize(
    ("positive", "negative", "said"),
    [
        (0, 0, ["0 positive frames of 200 wanted, 200 to go", "0 negative frames of 400 to 600 wanted, 400 to go"]),
        (200, 623, ["200 positive frames of 200 wanted: enough", "623 negative frames of 400 to 600 wanted: enough"]),
        (300, 599, ["300 positive frames of 200 wanted: enough", "599 negative frames of 600 to 900 wanted, 1 to go"]),
    ],
)
def test_how_many_frames_a_classifier_wants(positive: int, negative: int, said: list[str]) -> None:
    assert [str(each) for each in frames_wanted(positive, negative)] == said


def test_unlabelled_and_skipped_are_not_failure() -> None:
    labels = Labels("set")
    labels.set(0, EpisodeLabel(all_fail=True))
    labels.set(1, EpisodeLabel(success_start=2, skip=True))
    labels.set(2, EpisodeLabel(skip=True))
    assert labels.success(0, 4).tolist() == [False] * 5
    assert [labels.success(episode, 4) for episode in (1, 2, 3)] == [None] * 3
    assert [episode for episode, label in labels.episodes.items() if label.skip] == [1, 2]
    labels.set(0, None)
    assert labels.success(0, 4) is None


def test_a_saved_file_reads_back_and_looks_as_documented(tmp_path: Path) -> None:
    labels = Labels("lift")
    labels.set(10, EpisodeLabel(ranges=[[4, 8], [9, None]], exclude=[5]))
    labels.set(2, EpisodeLabel(success_start=0))
    labels.set(3, EpisodeLabel(all_fail=True, skip=True))
    labels.save(tmp_path / "lift.labels.json")
    assert json.loads((tmp_path / "lift.labels.json").read_text()) == {
        "dataset": "lift",
        "episodes": {
            "2": {"success_start": 0},
            "3": {"all_fail": True, "skip": True},
            "10": {"ranges": [[4, 8], [9, None]], "exclude": [5]},
        },
    }
    again = Labels.load(tmp_path / "lift.labels.json")
    assert again.dataset == "lift" and again.episodes == labels.episodes
    assert [path.name for path in tmp_path.iterdir()] == ["lift.labels.json"]
    Labels("none").save(tmp_path / "none.json")
    assert Labels.load(tmp_path / "none.json").episodes == {}


def test_the_file_lies_beside_the_dataset() -> None:
    assert labels_path("outputs/lift_demos/") == Path("outputs/lift_demos.labels.json")
    assert labels_path("outputs/v1.2") == Path("outputs/v1.2.labels.json")


@pytest.mark.parametrize(
    ("episodes", "said"),
    [
        ('{"3": {"success_end": 12}}', r"episode 3: unknown \['success_end'\]"),
        ('{"3": {"success_start": 1, "ranges": [[2, 3]]}}', "episode 3: got success_start and ranges"),
        ('{"3": {"success_start": 1, "all_fail": true}}', "episode 3: got success_start and all_fail"),
        ('{"3": {"exclude": [1]}}', "episode 3: got no label"),
        ('{"3": {}}', "episode 3: got no label"),
        ('{"3": null}', "episode 3: unknown None"),
        ('{"3": {"success_start": -1}}', "success_start has -1"),
        ('{"3": {"success_start": 1.0}}', "success_start has 1.0"),
        ('{"3": {"success_start": true}}', "success_start has True"),
        ('{"3": {"success_start": 1, "skip": 1}}', "skip is 1"),
        ('{"3": {"success_start": 1, "exclude": 2}}', "exclude is 2"),
        ('{"3": {"ranges": []}}', r"ranges is \[\]"),
        ('{"3": {"ranges": [[5, 5]]}}', r"ranges has \[5, 5\]"),
        ('{"3": {"ranges": [[5, 8], [7, 9]]}}', r"ranges has \[7, 9\]"),
        ('{"3": {"ranges": [[5, null], [7, 9]]}}', r"ranges has \[7, 9\]"),
        ('{"3": {"ranges": [5, 8]}}', "ranges has 5"),
        ('{"3": {"ranges": [[null, 8]]}}', "ranges has None"),
        ('{"03": {"all_fail": true}}', "episode '03'"),
        ('{"x": {"all_fail": true}}', "episode 'x'"),
        ('{"3": {"all_fail": true}, "3": {"success_start": 1}}', "'3' is given twice"),
        ("[]", '"episodes" an object'),
        ('{"3": {"sucess_start": 12}}', r"unknown \['sucess_start'\]; the keys are success_start, ranges"),
        ('{"3": 12}', "episode 3: unknown 12; the keys are"),
        ('{"3": {"success_start": "12"}}', "success_start has '12'"),
        ('{"3": {"success_start": 012}}', "no usable JSON"),
        ('{"3": {"success_start": 12},}', "no usable JSON: "),
        ("{'3': {}}", "no usable JSON: .*double quotes"),
        ('{"3": {"ranges": [[8, 5]]}}', r"ranges has \[8, 5\], each must end after its start"),
        ('{"3": {"ranges": [[5, 6, 7]]}}', r"ranges has \[5, 6, 7\], must be \[start, end\] pairs"),
        ('{"3": {"success_start": 1, "exclude": [4, 4]}}', "exclude has frame 4 twice"),
        ('{"3": {"success_start": 1, "exclude": [[4, 6]]}}', r"exclude has \[4, 6\], must be a frame"),
        ('{"3": {"all_fail": "yes"}}', "all_fail is 'yes', must be a bool"),
        ('{"-1": {"all_fail": true}}', "episode '-1': must be a number"),
        (f'{{"{"9" * 5000}": {{"all_fail": true}}}}', "must be a number"),
    ],
)
def test_what_does_not_fit_is_refused_by_file_episode_and_value(tmp_path: Path, episodes: str, said: str) -> None:
    path = tmp_path / "a.labels.json"
    path.write_text(f'{{"dataset": "a", "episodes": {episodes}}}')
    with pytest.raises(DataError, match=rf"a\.labels\.json: .*{said}"):
        Labels.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.labels.json"
    twice = '{"dataset": "a", "dataset": "b", "episodes": {}}'
    for content, said in (
        ("{", "no usable"),
        (twice, "given twice"),
        ("[]", "one JSON"),
        ("{}", 'must hold "dataset"'),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            Labels.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        Labels.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("label", "fits", "said"),
    [
        (EpisodeLabel(success_start=5), 5, "success start 5 is past the last frame, 4"),
        (EpisodeLabel(ranges=[[1, 6]]), 5, "success end 6 is past the last frame, 4"),
        (EpisodeLabel(ranges=[[5, None]]), 5, "success start 5 is past the last frame, 4"),
        (EpisodeLabel(all_fail=True, exclude=[5]), 5, "exclude has frame 5, past the last frame, 4"),
    ],
)
def test_frames_that_are_not_there_are_refused(tmp_path: Path, label: EpisodeLabel, fits: int, said: str) -> None:
    labels = Labels("a")
    labels.set(7, label)
    labels.save(tmp_path / "a.json")
    loaded = Labels.load(tmp_path / "a.json")
    assert loaded.success(7, fits).shape == (fits + 1,)  # 5 rows have frames 0 to 5
    with pytest.raises(DataError, match=rf"a\.json: episode 7: {said}"):
        loaded.success(7, fits - 1)


def test_lines_of_the_text_form_with_each_habit() -> None:
    text = "# dataset: somewhere\n\n00: 34-\n01: 40-48, 60-\n02: all fail\n"
    plain = import_labels(text, "t", one_based=False, end_inclusive=False)
    assert plain == {
        0: EpisodeLabel(success_start=34),
        1: EpisodeLabel(ranges=[[40, 48], [60, None]]),
        2: EpisodeLabel(all_fail=True),
    }
    counted = import_labels(text, "t", one_based=True, end_inclusive=True)
    assert counted[0].success_start == 33
    assert counted[1].ranges == [[39, 48], [59, None]]  # images 40 to 48 counted from 1 are frames 39 to 47
    thirds = import_labels(text, "t", one_based=True, end_inclusive=True, every=3)
    assert thirds[0].success_start == 99  # image 34 from 1 is the 33rd step of 3; times 3 first would give 102
    assert thirds[1].ranges == [[117, 142], [177, None]]  # image 48 is frame 141, and 142 is not known
    assert import_labels("3: 14-28", "t", one_based=False, end_inclusive=True)[3].ranges == [[14, 29]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("00: 34- 00: 35-", "line 2: episode 0 is labelled twice"),
        ("00: maybe", "line 2: episode 0: 'maybe': is none of"),
        ("01: 40-48, 60", "line 2: episode 1: '40-48, 60': is none of"),
        ("34-", "line 2: '34-' does not start with an episode"),
        ("ep 01: 34-", "does not start with an episode"),
        ("01: 0-", "line 2: episode 1: '0-': 0 is no image's number, the first is 1"),
        ("01: 9-3", r"'9-3': ranges has \[8, 2\]"),
        ("01: 9-12, 11-", r"'9-12, 11-': ranges has \[10, None\], each must end after .* not overlap"),
        ("01: 9-, 12-14", r"ranges has \[11, 13\], must be .* null only as the last end"),
        ("01:", "line 2: episode 1: '': is none of"),
        ("01; 34-", "'01; 34-' does not start with an episode"),
        ("01: 34+", "'34\\+': is none of"),
    ],
)
def test_lines_that_say_nothing_clear_are_refused(line: str, said: str) -> None:
    with pytest.raises(DataError, match=f"notes.txt, .*{said}"):
        import_labels(f"# notes\n{line}\n", "notes.txt", one_based=True, end_inclusive=False)


def test_one_text_file_with_the_labels_of_two_datasets() -> None:
    habits = {"one_based": True, "end_inclusive": True}
    first = import_labels(TWO_SETS, "v1.txt", **habits, dataset="grasp_v1")
    assert first == {0: EpisodeLabel(success_start=33), 14: EpisodeLabel(ranges=[[39, 48], [59, None]])}
    second = import_labels("\ufeff" + TWO_SETS.replace("\n", "\r\n"), "v1.txt", **habits, dataset="grasp_negative_v1")
    assert second == {0: EpisodeLabel(all_fail=True), 9: EpisodeLabel(ranges=[[55, 58], [60, 63], [65, None]])}
    for dataset in (None, "grasp"):
        with pytest.raises(DataError, match=r"v1.txt: has the labels of grasp_negative_v1, grasp_v1; say dataset="):
            import_labels(TWO_SETS, "v1.txt", **habits, dataset=dataset)
    with pytest.raises(DataError, match="empty.txt: has no labels"):
        import_labels("# nothing yet\n", "empty.txt", **habits)


@pytest.mark.parametrize("heading", ["# dataset path: data/{}", "# Dataset: {}", r"# dataset_path = C:\data\{}"])
def test_blocks_headed_by_relative_paths_are_kept_apart(heading: str) -> None:
    text = f"{heading.format('a')}\n00: 34-\n{heading.format('b')}\n01: all fail\n"
    assert import_labels(text, "both.txt", **PLAIN, dataset="b") == {1: EpisodeLabel(all_fail=True)}
    with pytest.raises(DataError, match="both.txt: has the labels of a, b; say dataset="):
        import_labels(text, "both.txt", **PLAIN)


def test_labels_of_a_dataset_of_another_name_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"dataset_path": "data/lamp", "episodes": {"0": None}}
    for text in (json.dumps(content), "# dataset path: data/lamp\n00: all fail\n"):
        for quiet in ({}, {"into": "lamp"}, {"into": "table", "dataset": "lamp"}):
            import_labels(text, "labels", **PLAIN, **quiet)
        assert capsys.readouterr().err == ""
        import_labels(text, "labels", **PLAIN, into="table")
        said = "labels: says that these are the labels of lamp; they are taken for table all the same\n"
        assert capsys.readouterr().err == said


def test_json_forms_with_each_habit() -> None:
    merged = {
        "source": "merged from two (ep 0-2) + (ep 3-4)",
        "0": {"success_start": 27, "exclude": [0, 30]},
        "1": {"ranges": [[56, 58], [61, None]]},
        "2": {"success_ranges": [[27, 38], [49, 61]]},
        "3": {"success_start": 41, "success_end": 43},
        "6": None,
    }
    text = json.dumps(merged)
    assert import_labels(text, "merged.json", **PLAIN) == {
        0: EpisodeLabel(success_start=27, exclude=[0, 30]),
        1: EpisodeLabel(ranges=[[56, 59], [61, None]]),
        2: EpisodeLabel(ranges=[[27, 39], [49, 62]]),
        3: EpisodeLabel(ranges=[[41, 44]]),
        6: EpisodeLabel(all_fail=True),
    }  # and 4 and 5 are unlabelled
    half_open = import_labels(text, "merged.json", one_based=False, end_inclusive=False)
    assert half_open[1].ranges == [[56, 58], [61, None]] and half_open[3].ranges == [[41, 43]]
    wrapped = {"dataset_path": "/data/lamp/", "episodes": {"0": {"success_start": 102}, "1": {"ranges": [[6, 9]]}}}
    lamp = {"one_based": True, "end_inclusive": True, "every": 3, "dataset": "lamp"}
    times_three = import_labels(json.dumps(wrapped), "lamp.json", **lamp, multiplied=True)
    assert times_three[0].success_start == 99  # image 34 counted from 1 was written as 102, and is frame 33 * 3
    assert times_three[1].ranges == [[3, 7]]  # images 2 and 3 are frames 3 and 6
    assert import_labels(json.dumps(wrapped), "lamp.json", **lamp, multiplied=False)[0].success_start == 303
    with pytest.raises(DataError, match=r"lamp\.json: every is 3; say multiplied too"):
        import_labels(json.dumps(wrapped), "lamp.json", **lamp)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"output_repo_id": "a/b", "sources": ["lift", "lamp"]}',
            r"a plan for merging .* python -m so101\.tools\.edit",
        ),
        ('{"output_repo_id": "a/b", "sources": [{"dataset_path": "/a", "episodes": [0, 1]}]}', "a plan for merging"),
        ('{"dataset": "lift", "episodes": {"0": {"all_fail": true}}}', r"put it beside .* <dataset>\.labels\.json"),
        ('{"dataset_path": "/a", "episodes": {"0": null}, "fps": 10}', r"unknown \['fps'\]; beside episodes"),
        ('{"dataset_path": "/a", "episodes": [0, 1]}', "must hold labels by episode"),
        ("[1, 2]", "must hold labels by episode"),
        ("{}", "has no labels"),
        ('{"0": null, "0": {"success_start": 3}}', "'0' is given twice"),
        ('{"0": null, "00": null}', "episode '00': must be a number"),
        ('{"notes": "lift", "0": null}', "episode 'notes': must be a number"),
        ('{"0": {"success_end": 43}}', r"episode 0: \{'success_end': 43\}: must be null for all fail, or have one of"),
        ('{"0": {"sucess_start": 43}}', "episode 0: .*must be null for all fail"),
        ('{"0": {"success_start": 4, "ranges": [[4, 5]]}}', "episode 0: .*must be null for all fail"),
        ('{"0": {"exclude": [4]}}', "episode 0: .*must be null for all fail"),
        ('{"0": 41}', "episode 0: 41: must be null for all fail"),
        ('{"0": {"success_start": 4.5}}', "episode 0: .*4.5 is no image's number, the first is 0"),
        ('{"0": {"success_start": null}}', "None is no image's number"),
        ('{"0": {"success_start": -1}}', "-1 is no image's number"),
        ('{"0": {"ranges": [[4, true]]}}', "True is no image's number"),
        ('{"0": {"ranges": []}}', r"ranges is \[\]"),
        ('{"0": {"ranges": [4, 9]}}', "ranges has 4, must be"),
        ('{"0": {"success_start": 4, "exclude": 5}}', "exclude is 5, must be a list"),
        ('{"0": {"success_start": 4, "exclude": [5, 5]}}', "exclude has frame 5 twice"),
        ('{"0": {"success_start": 20}}', "episode 0: success start 20 is past the last frame, 19"),
        ('{"0": {"ranges": [[4, 20]]}}', "episode 0: success end 21 is past the last frame, 19"),
        ('{"0": null, "1": null}', "episode 1: the dataset has only 1"),
        ("episode, start\n0, 4", r"has the columns \['episode', 'start'\], must have"),
        pytest.param("episode, success_start\n0, " + 131_073 * "4", "is no table of labels: field larger", id="field"),
        ("episode, success start\n0, 4\n0, 5", "line 3: episode 0 is labelled twice"),
        ("episode, success start\n0, 4, 9", "line 2: has 3 columns, must be 2"),
        ("episode, success start\n00, 4", "line 2: episode '00'"),
        ("episode, success start\n0, none", "line 2: episode 0: .*success start must be an image's number"),
        ("episode, success start, notes\n0, 4, fails 8 to 9", "line 2: episode 0: .*number in it, and is no gap"),
        ("episode, success start, notes\n0, 4, Gap: 2-3", r"line 2: episode 0: .*ranges has \[4, 2\]"),
    ],
)
def test_files_that_are_no_labels_or_say_something_else_are_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"^notes: .*{said}|^notes, {said}"):
        import_labels(text, "notes", **PLAIN, observations=[20])


def creation_script(entry: dict[str, Any] | None, frames: int) -> list[bool]:
    """What the original made of one JSON entry, in its own words: reward 0, then success, and exclude wins."""
    rewards = []
    for frame in range(frames):
        reward = False
        if entry is not None and "success_start" in entry:
            reward = frame >= entry["success_start"]
        elif entry is not None:
            reward = any(a <= frame <= (frames if b is None else b) for a, b in entry["ranges"])
        rewards.append(reward and frame not in (entry or {}).get("exclude", []))
    return rewards


def seen(stretches: list[tuple[int, int | None]], exclude: list[int], frames: int, every: int) -> list[bool]:
    """What somebody saw who looked at every n-th frame, the images from 0; `stretches` of images with success."""
    images = [frame // every if frame % every == 0 else None for frame in range(frames)]
    said = []
    for frame, image in enumerate(images):
        success = False
        for first, last in stretches:
            if image is not None:
                success |= first <= image and (last is None or image <= last)
            else:  # between two images: known only where both are of one stretch, or it goes on to the end
                success |= first <= frame // every and (last is None or frame // every + 1 <= last)
        said.append(success and image not in exclude)
    return said


def test_every_form_and_habit_gives_what_was_seen() -> None:
    """Random labels, written down in each form with each habit; the original's script agrees where it can."""
    draw, compared = random.Random(4), 0
    habits = itertools.product((False, True), (False, True), (1, 2, 3), (False, True), range(60))
    for one_based, end_inclusive, every, multiplied, _ in habits:
        images = draw.randint(4, 30)
        frames = (images - 1) * every + draw.randint(1, every)
        edges = sorted(draw.sample(range(images), draw.choice((0, 1, 2, 3, 4))))
        stretches: list[tuple[int, int | None]] = list(itertools.zip_longest(edges[::2], edges[1::2]))
        stretches = [(a, b) for i, (a, b) in enumerate(stretches) if not i or a > (stretches[i - 1][1] or 0) + 1]
        exclude = sorted(draw.sample(range(images), draw.randint(0, 2)))

        def number(image: int) -> int:
            return (image + one_based) * (every if multiplied else 1)  # noqa: B023

        def ending(image: int | None) -> int | None:
            return None if image is None else number(image if end_inclusive else image + 1)  # noqa: B023

        ranges = [[number(a), ending(b)] for a, b in stretches]
        spec = ", ".join(f"{a}-{'' if b is None else b}" for a, b in ranges) or "all fail"
        more = {"exclude": [number(image) for image in exclude]} if exclude else {}
        entries: list[dict[str, Any] | None] = [{key: ranges} | more for key in ("ranges", "success_ranges")]
        if not ranges:
            entries, exclude = [None], []
        elif len(ranges) == 1:
            entries.append({"success_start": ranges[0][0], "success_end": ranges[0][1]} | more)
            entries += [{"success_start": ranges[0][0]} | more] if ranges[0][1] is None else []
        texts = [(f"# by hand\n07: {spec}\n", [])] + [(json.dumps({"7": entry}), exclude) for entry in entries]
        if stretches:
            gaps = [
                f"Gap: {number(b + 1)}-{ending(a - 1)} are failure" for (_, b), (a, _) in itertools.pairwise(stretches)
            ]
            last = stretches[-1][1]
            cells = f"7, {ranges[0][0]}, {'nan' if last is None else number(last + 1)}, {'; '.join(gaps)}"
            texts.append((f"episode, success_start, env_reset_start, notes\n{cells}\n", []))
        for text, left_out in texts:
            got = import_labels(
                text,
                "file",
                one_based=one_based,
                end_inclusive=end_inclusive,
                every=every,
                multiplied=multiplied,
                reset_is_failure=True,
                observations=[frames] * 8,
            )[7].success(frames)
            assert got.tolist() == seen(stretches, left_out, frames, every), (text, one_based, end_inclusive, every)
            compared += 1
        if (one_based, end_inclusive, every) == (False, True, 1):
            for entry in entries:
                if entry is None or set(entry) <= {"success_start", "exclude"} or "ranges" in entry:
                    mine = import_labels(json.dumps({"7": entry}), "file", **PLAIN)[7].success(frames)
                    assert mine.tolist() == creation_script(entry, frames)
    assert compared > 4000


def test_every_label_reads_back_equal(tmp_path: Path) -> None:
    draw, labels = random.Random(1), Labels("lift")
    forms = ({"success_start": 0}, {"success_start": 9}, {"ranges": [[0, 2], [2, None]]}, {"all_fail": True}, {})
    for episode, (form, exclude, skip) in enumerate(itertools.product(forms, ([], [0], [7, 3]), (False, True))):
        if form or skip:
            labels.set(episode * draw.randint(1, 9), EpisodeLabel(**form, exclude=exclude, skip=skip))
    labels.save(tmp_path / "lift.labels.json")
    again = Labels.load(tmp_path / "lift.labels.json")
    assert again.episodes == labels.episodes and {str(label) for label in again.episodes.values()} >= {
        "from 0",
        "skip from 9 without [7, 3]",
        "0-2, 2-end without [0]",
        "skip all fail",
        "skip",
    }
    labels.check([10] * 300)
    with pytest.raises(DataError, match=r"^lift: episode \d+: success start 9 is past the last frame, 8"):
        labels.check([9] * 300)


SAVE_FOREVER = r"""
import os, sys
from pathlib import Path
from so101.data.labels import EpisodeLabel, Labels
path, both = Path(sys.argv[1]), (Labels("lift"), Labels("lift"))
for episode in range(500):
    both[0].set(episode, EpisodeLabel(success_start=episode))
    both[1].set(episode, EpisodeLabel(ranges=[[episode, episode + 5], [episode + 9, None]], exclude=[episode]))
for labels, name in zip(both, ("old", "new")):
    labels.save(path.with_name(name))
for line in sys.stdin:  # each line asks for one more process that saves, until it is killed
    child = os.fork()
    while child == 0:
        for labels in both if line == "old first\n" else both[::-1]:
            labels.save(path)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path, draw = tmp_path / "lift.labels.json", random.Random(7)
    command = [sys.executable, "-c", SAVE_FOREVER, str(path)]
    found, midway, read = set(), 0, 0
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdin and process.stdout
    try:
        for _ in range(30):
            print(draw.choice(("old first", "new first")), flush=True, file=process.stdin)
            child = int(process.stdout.readline())
            whole = {(tmp_path / name).read_bytes(): name for name in ("old", "new")}
            while not path.exists():  # until it has saved once, however busy the machine is
                time.sleep(0.001)
            end = time.monotonic() + draw.uniform(0, 0.02)
            while time.monotonic() < end:
                assert path.read_bytes() in whole  # somebody who reads meanwhile
                read += 1
            os.kill(child, signal.SIGKILL)
            assert int(process.stdout.readline()) == signal.SIGKILL
            aside = list(tmp_path.glob(".*.tmp"))
            midway += bool(aside)
            for leftover in aside:
                leftover.unlink()
            found.add(whole[path.read_bytes()])
            assert len(Labels.load(path).episodes) == 500
            path.unlink()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # a child that still saves too
        process.communicate()
    assert found == {"old", "new"} and midway > 0 and read > 0


def test_two_threads_that_save_at_once_do_not_mix(tmp_path: Path) -> None:
    """As two requests of a page do: each has its own file aside."""
    both = [Labels("lift"), Labels("lift")]
    for episode in range(300):
        both[0].set(episode, EpisodeLabel(all_fail=True))
        both[1].set(episode, EpisodeLabel(success_start=episode))
    failed: list[Exception] = []

    def save(labels: Labels) -> None:
        try:
            for _ in range(10):
                labels.save(tmp_path / "lift.labels.json")
                assert len(Labels.load(tmp_path / "lift.labels.json").episodes) == 300
        except (OSError, DataError, AssertionError) as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(labels,)) for labels in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["lift.labels.json"]


def test_a_dataset_and_its_labels_may_be_reached_through_links(tmp_path: Path) -> None:
    (tmp_path / "disk/demos").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/set").symlink_to(tmp_path / "disk/demos")
    assert labels_path(tmp_path / "here/set") == (tmp_path / "disk/demos.labels.json").resolve()
    (tmp_path / "kept.json").write_text('{"dataset": "demos", "episodes": {}}')
    link = tmp_path / "disk/demos.labels.json"
    link.symlink_to(tmp_path / "kept.json")
    label_episode(tmp_path / "here/set", 3, EpisodeLabel(all_fail=True))
    assert link.is_symlink() and Labels.load(tmp_path / "kept.json").episodes == {3: EpisodeLabel(all_fail=True)}


def test_a_label_decided_on_an_older_one_is_refused(tmp_path: Path) -> None:
    label_episode(tmp_path / "set", 0, EpisodeLabel(success_start=5))
    with pytest.raises(DataError, match="was labelled from 5 elsewhere meanwhile"):
        label_episode(tmp_path / "set", 0, EpisodeLabel(all_fail=True), None)
    label_episode(tmp_path / "set", 0, EpisodeLabel(all_fail=True), EpisodeLabel(success_start=5))
    assert Labels.load(labels_path(tmp_path / "set")).episodes[0].all_fail


LABELLER = """
import sys
from pathlib import Path
from so101.data.labels import EpisodeLabel, label_episode
for number in range(40):
    label_episode(Path(sys.argv[1]), 2 * number + int(sys.argv[2]), EpisodeLabel(success_start=number))
"""


def test_two_programs_that_label_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """record.py adds episodes while a person labels the earlier ones in label.py."""
    commands = [[sys.executable, "-c", LABELLER, str(tmp_path / "demos"), parity] for parity in "01"]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    labels = Labels.load(labels_path(tmp_path / "demos"))
    assert sorted(labels.episodes) == list(range(80))
    assert [path.name for path in tmp_path.iterdir()] == ["demos.labels.json"]
