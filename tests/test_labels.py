"""Label files: success per observation, refusals that name the place, and the author's hand-written forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from so101.data.labels import EpisodeLabel, Labels, import_labels, labels_path
from so101.errors import DataError

LIFT = {0: 53, 1: 36, 2: 43, 3: 40, 4: 40, 5: 44, 6: 44, 7: 39, 8: 43, 9: 34}
REACH = """
00: 119    05: 39     10: 47     15: 62
01: 129    06: 76     11: 39     16: 33
02: 43     07: 44     12: 46     17: 35
03: 42     08: 36     13: 57     18: 41
04: 41     09: 42     14: 37     19: 55
"""


def shown(label: EpisodeLabel, observations: int) -> str:
    return "".join("+" if success else "." for success in label.success(observations))


def test_the_published_cutoffs_give_584_success_and_416_failure_frames() -> None:
    """Ten episodes of 100 observations each, that is 99 rows and the closing one."""
    labels = Labels("so101_pick_lift_cube")
    for episode, start in LIFT.items():
        labels.set(episode, EpisodeLabel(success_start=start))
    success = np.concatenate([labels.success(episode, 99) for episode in LIFT])
    assert (success.sum(), (~success).sum()) == (584, 416)


def test_the_published_column_table_gives_869_success_and_1063_failure_frames() -> None:
    """1932 frames; the failures are the frames before each start, so their number shows it counts from 0."""
    labels = import_labels(REACH, "reach.txt", one_based=False, end_inclusive=False)
    assert len(labels) == 20 and labels[0].success_start == 119 and labels[19].success_start == 55
    failures = sum(int((~label.success(135)).sum()) for label in labels.values())
    assert failures == 1063 and 1932 - failures == 869


def test_each_form_by_hand() -> None:
    assert shown(EpisodeLabel(success_start=3), 6) == "...+++"
    assert shown(EpisodeLabel(success_start=5), 6) == ".....+"  # the closing observation of 5 rows
    assert shown(EpisodeLabel(ranges=[[1, 3], [4, 5]]), 6) == ".++.+."
    assert shown(EpisodeLabel(ranges=[[1, 2], [4, None]]), 6) == ".+..++"
    assert shown(EpisodeLabel(ranges=[[0, 6]]), 6) == "++++++"
    assert shown(EpisodeLabel(all_fail=True), 6) == "......"
    assert shown(EpisodeLabel(success_start=2, exclude=[3, 0]), 6) == "..+.++"


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
        ("00: maybe", "line 2: episode 0: 'maybe' is none of"),
        ("01: 40-48, 60", "line 2: episode 1: '40-48, 60' is none of"),
        ("34-", "line 2: '34-' does not start with an episode"),
        ("ep 01: 34-", "does not start with an episode"),
        ("01: 0-", "line 2: episode 1: success_start has -1"),
        ("01: 9-3", r"ranges has \[8, 2\]"),
    ],
)
def test_lines_that_say_nothing_clear_are_refused(line: str, said: str) -> None:
    with pytest.raises(DataError, match=f"notes.txt, .*{said}|{said}"):
        import_labels(f"# notes\n{line}\n", "notes.txt", one_based=True, end_inclusive=False)
