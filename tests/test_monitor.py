"""What a run measures of itself, on sequences worked by hand, and each alarm both ways."""

import json
import math

import numpy as np
import pytest

from so101.monitor import Monitor, brightness_of, largest_return
from so101.schema import RewardSpec

STEADY = np.array([0.5, -0.5, 0.1, 0.0])


def make(**other) -> Monitor:
    """One camera whose demonstrations' brightness was 100 +- 5; the shortest of them took 20 steps."""
    settings = {"utd_ratio": 4.0, "largest_return": 1.0, "target_entropy": -2.0, "shortest_demonstration": 20}
    return Monitor(**{**settings, "brightness": np.array([[100.0, 5.0]]), **other})


def play(monitor, flags=".....", success=False, light=100, action=None, actor="a", version=0, age=0.0, start=0.0):
    """An episode of one step for each of `flags` (h: by the person), at 10 Hz; its columns."""
    lights = [light] * len(flags) if isinstance(light, int) else light
    for t, (flag, level) in enumerate(zip(flags, lights, strict=True)):
        own = STEADY * (-1) ** t if action is None else action
        image = np.full((1, 4, 4, 3), level, np.uint8)
        monitor.moved(actor, start + 0.1 * t, own, 0.0, flag == "h", image, version, age)
    return monitor.ended(actor, start + 0.1 * (len(flags) - 1), success)


def alarm(monitor: Monitor, words: str) -> bool:
    """Whether the only new alarm begins with `words`; False where there is none."""
    said = monitor.alarms()
    assert len(said) <= 1 and all(sentence.startswith(words) for sentence in said), said
    return bool(said)


@pytest.mark.parametrize(
    ("success", "penalty", "discount", "most"),
    [
        (1.0, 0.0, 0.97, 1.0),
        (1.0, 0.05, 0.97, 0.95),  # at once
        (10.0, 0.05, 0.97, 9.95),
        (1.0, -0.1, 0.9, 1.1),  # a bonus of 0.1 for ever is worth 0.1 / 0.1 = 1, and 1 + 0.1 at once
        (0.5, -0.1, 0.9, 1.0),
        (0.5, 0.0, 1.0, 0.5),
        (0.5, -0.1, 1.0, math.inf),
    ],
)
def test_largest_return(success, penalty, discount, most):
    assert largest_return(RewardSpec(success, penalty), discount) == pytest.approx(most)
    steps = np.arange(1, 2000)  # and no policy that succeeds after n steps gets more, by the plain sum
    powers = np.cumsum(discount ** (steps - 1))
    assert (success * discount ** (steps - 1) - penalty * powers).max() <= most + 1e-9


def test_brightness_of_two_demonstrations():
    first = np.stack([np.full((2, 4, 4, 3), level, np.uint8) for level in (10, 20)])
    first[:, 1] = 7
    second = np.full((2, 2, 4, 4, 3), 30, np.uint8)
    second[:, 1] = 9
    # camera 1: 10 20 30 30, mean 22.5, squares off it 156.25 + 6.25 + 2 * 56.25; camera 2: 7 7 9 9
    assert brightness_of([first, second]) == pytest.approx(np.array([[22.5, math.sqrt(275 / 4)], [8.0, 1.0]]))


def test_an_episode_s_columns_by_hand():
    monitor = make(brightness=np.array([[100.0, 5.0], [50.0, 1.0]]))  # the second deviates by 2, the floor
    own, guided = np.array([1.0, -0.5, 0.25, 0.25]), np.ones(4)
    flags = [False, True, True, False, True, False]
    for t, by_human in enumerate(flags):
        images = np.stack([np.full((4, 4, 3), 100 + t, np.uint8), np.full((4, 4, 3), 46, np.uint8)])
        reward = 0.95 if t == 5 else -0.05
        monitor.moved("a", 10 + 0.2 * t, guided if by_human else own, reward, by_human, images, 3, 0.5 * t)
    assert monitor.ended("a", 11.0, success=True) == pytest.approx(
        {
            "episode_steps": 6, "episode_return": 0.7, "success": 1, "success_last_20": 1, "success_alone_last_20": 0,
            "intervention_share": 0.5, "interventions": 2, "intervention_length": 1.5, "actor_hz": 5.0,
            "reward_rate": 100 / 6, "action_size": 0.5, "policy_age": 2.5,
            "brightness": (102.5 + 46) / 2, "brightness_drift": -2.0,  # camera 1 is off by 0.5 of its deviations
        }
    )  # fmt: skip


def test_what_was_not_there_has_no_column():
    monitor = make()
    there = {"episode_steps", "episode_return", "success", "success_last_20", "success_alone_last_20", "reward_rate"}
    there |= {"intervention_share", "interventions", "brightness", "brightness_drift"}
    assert set(play(monitor, ".", version=-1)) == there  # one step, of chance: no rate, nothing of the policy
    assert set(play(monitor, "...", version=-1)) == there | {"actor_hz"}
    assert set(play(monitor, "hh")) == there | {"actor_hz", "policy_age", "intervention_length"}


def test_the_last_20_episodes():
    monitor = make()
    for index in range(25):  # 0 .. 4 are forgotten; of the rest 5 .. 9 succeed alone and 10 .. 14 with help
        columns = play(monitor, "." * 20 + ("h" if 10 <= index < 15 else "."), success=index < 15)
    assert columns["success_last_20"] == 0.5 and columns["success_alone_last_20"] == 0.25
    assert columns["reward_rate"] == pytest.approx(100 * 10 / (20 * 21))


def test_actors_do_not_mix_and_a_discarded_episode_never_was():
    monitor = make()
    image = np.full((1, 4, 4, 3), 100, np.uint8)
    for t in range(3):
        monitor.moved("left", 0.1 * t, STEADY, 1.0, False, image, 0, 0.0)
        monitor.moved("right", 50 + 0.5 * t, STEADY, 2.0, True, image, 0, 0.0)
    monitor.discarded("right")
    monitor.discarded("right")
    assert play(monitor, "...", actor="right")["intervention_share"] == 0
    columns = monitor.ended("left", 0.2, True)
    assert columns["episode_return"] == 3 and columns["actor_hz"] == pytest.approx(10)
    assert columns["success_last_20"] == 0.5


def test_a_late_verdict_counts_for_its_own_actor():
    monitor = make()
    play(monitor, success=True, actor="left")
    play(monitor, success=True, actor="right")
    monitor.corrected(False, "left")
    monitor.corrected(False, "right")
    assert play(monitor, success=True)["success_last_20"] == pytest.approx(1 / 3)
    monitor.corrected(False)  # the last of all
    assert play(monitor, success=True)["success_last_20"] == pytest.approx(1 / 4)
    make().corrected(True)  # nothing to correct


def test_the_learner_s_columns_by_hand():
    monitor = make(largest_return=2.0)
    assert monitor.updated(10.0, 100, 50, {"q": np.float32(0.5)}) == {"q": 0.5, "utd_asked": 4.0}
    columns = monitor.updated(12.0, 110, 100, {"q_max": 0.5, "entropy": -1.0, "temperature": 0.01})
    assert columns == {
        "q_max": 0.5, "entropy": -1.0, "temperature": 0.01,
        "utd_asked": 4.0, "updates_per_s": 25.0, "utd_done": 5.0, "q_share": 0.25,
    }  # fmt: skip
    # The same step again, after a pause of a second: made up for
    assert monitor.updated(13.0, 110, 130, {}) == {"utd_asked": 4.0, "updates_per_s": 30.0, "utd_done": 8.0}
    # An episode was discarded, and its steps with it: no share of them can be told
    assert monitor.updated(14.0, 90, 130, {}) == {"utd_asked": 4.0, "updates_per_s": 0.0}


def test_what_is_made_up_at_the_start_does_not_count_as_done():
    monitor = make()
    for updates in range(50, 401, 50):  # at the step at which learning starts
        monitor.updated(updates / 50, 100, updates, {})
    assert monitor.updated(9.0, 110, 430, {})["utd_done"] == 3.0


def test_updates_done_are_those_of_the_last_1000_steps():
    monitor = make()
    for step in range(100, 1101, 100):
        monitor.updated(float(step), step, 4 * step, {})
    for step in range(1200, 2101, 100):  # half as many
        columns = monitor.updated(float(step), step, 4400 + 2 * (step - 1100), {})
    assert columns["utd_done"] == pytest.approx(2.0)
    assert make().updated(0.0, 5, 0, {"q_max": 1.0})["q_share"] == 1.0


def test_possible_values_where_targets_pay_for_entropy():
    monitor = make(entropy_steps=9.0)  # discount 0.9
    # 1 + 9 * 0.1 * log(2^4): an action uniform in a box of volume 2^4 has that entropy
    assert monitor.updated(0.0, 1, 1, {"q_max": 1.0, "temperature": 0.1})["q_share"] == pytest.approx(1 / 3.495329)
    assert "q_share" not in make(largest_return=-0.5).updated(0.0, 1, 1, {"q_max": -0.6})


def look(monitor, times, **metrics):
    """So many looks in which nothing but `metrics` is seen."""
    for _ in range(times):
        monitor.updated(0.0, 0, 0, metrics)


@pytest.mark.parametrize("low", [-7.1, -50.0])
def test_alarm_entropy(low):
    words = "policy collapsed: its entropy is"
    monitor = make()  # the target is -2
    look(monitor, 100, entropy=-6.9)
    for _ in range(10):  # now and then
        look(monitor, 59, entropy=low)
        look(monitor, 1, entropy=-6.9)
    look(monitor, 59, entropy=low)
    look(monitor, 5, q=0.0)  # no word of it
    assert not alarm(monitor, words)
    look(monitor, 1, entropy=low)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} {low:.1f}") and "target of -2," in said[0]
    look(monitor, 100, entropy=low)
    assert not alarm(monitor, words)
    look(monitor, 1, entropy=-3.0)
    look(monitor, 60, entropy=low)
    assert alarm(monitor, words)


def test_alarm_when_the_numbers_are_none_any_more():
    words = "training has diverged: entropy, q_max is not a number any more"
    monitor = make()
    look(monitor, 3, entropy=-2.0, q_max=0.5)
    assert not alarm(monitor, words)
    look(monitor, 5, entropy=math.nan, q_max=math.nan)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(words)
    look(monitor, 1, entropy=-2.0, q_max=0.5)
    look(monitor, 1, entropy=math.nan, q_max=math.nan)
    assert alarm(monitor, words)


@pytest.mark.parametrize(
    ("stuck", "seen"), [(np.array([1.0, -1.0, 0.995, -0.995]), "100% at their limits"), (STEADY, "all but constant")]
)
def test_alarm_actions(stuck, seen):
    words = "policy collapsed: for 5 episodes its actions were"
    monitor = make()
    for _ in range(4):
        play(monitor, action=stuck)
    play(monitor)  # as it should be
    for _ in range(4):
        play(monitor, action=stuck)
    play(monitor, "....", action=stuck)  # too short to tell
    play(monitor, "hhhhhhhh....", action=stuck)
    play(monitor, action=stuck, version=-1)  # chance, not the policy
    assert not alarm(monitor, words)
    play(monitor, action=stuck)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} {seen}, so")
    play(monitor, action=stuck)
    assert not alarm(monitor, words)
    play(monitor)
    for _ in range(5):
        play(monitor, action=stuck)
    assert alarm(monitor, words)


def test_actions_that_jump_between_their_limits_are_a_collapse():
    monitor = make()
    for _ in range(5):
        for t in range(10):
            monitor.moved("a", t, np.ones(4) * (-1) ** t, 0.0, False, np.full((1, 4, 4, 3), 100, np.uint8), 1, 0.0)
        monitor.ended("a", 9.0, False)
    assert alarm(monitor, "policy collapsed: for 5 episodes its actions were 100% at their limits")


def test_actions_at_most_of_their_limits_are_no_collapse():
    monitor = make()
    for _ in range(30):
        play(monitor, action=np.array([1.0, -1.0, 1.0, 0.0]) + np.random.default_rng(0).normal(0, 1e-3, 4))
        play(monitor)
    assert monitor.alarms() == []
    monitor = make()
    for _ in range(30):
        for t in range(20):  # three of four entries at their limits, the fourth moving
            action = np.array([1.0, -1.0, 1.0, math.sin(t)])
            monitor.moved("a", 0.1 * t, action, 0.0, False, np.full((1, 4, 4, 3), 100, np.uint8), 1, 0.0)
        monitor.ended("a", 1.9, False)
    assert monitor.alarms() == []


@pytest.mark.parametrize(("most", "fine", "high"), [(1.0, 1.19, 1.21), (-1.0, -0.81, -0.79), (0.95, 1.1, 1.2)])
def test_alarm_q(most, fine, high):
    words = "Q above what is possible: the highest value is"
    monitor = make(largest_return=most)
    look(monitor, 50, q_max=fine)
    look(monitor, 4, q_max=high)
    look(monitor, 1, q_max=fine)
    look(monitor, 4, q_max=high)
    assert not alarm(monitor, words)
    look(monitor, 1, q_max=high)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} {high:.2f} where a policy can earn {most:.2f} at most")
    look(monitor, 50, q_max=high)
    assert not alarm(monitor, words)
    look(monitor, 1, q_max=fine)
    look(monitor, 5, q_max=high)
    assert alarm(monitor, words)


def test_alarm_success_in_too_few_steps():
    words = "classifier farmed: 3 of the last"
    monitor = make()  # the shortest demonstration took 20 steps
    for _ in range(20):
        play(monitor, "." * 10, success=True)
        play(monitor, "...")  # no success
        play(monitor, "h..", success=True)  # with help
    play(monitor, "." * 9, success=True)

    def succeed(times, steps):
        for _ in range(times):
            play(monitor, "." * steps, success=True)

    succeed(5, steps=10)
    succeed(1, steps=3)
    assert not alarm(monitor, words)
    succeed(1, steps=3)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} 20 successes were paid without help in under 10 steps")
    succeed(13, steps=10)  # 2 of 20 are left: not over
    succeed(1, steps=3)
    assert not alarm(monitor, words)
    succeed(19, steps=10)  # one is left
    succeed(2, steps=3)
    assert not alarm(monitor, words)
    succeed(1, steps=3)
    assert alarm(monitor, words)


def test_alarm_overruled_successes():
    words = "classifier farmed: a person overruled"
    monitor = make()

    def succeed(overruled):
        play(monitor, "." * 15, success=True)
        if overruled is not None:
            monitor.corrected(not overruled)

    for verdict in (True, True, None):  # two of three: could be chance
        succeed(verdict)
    for _ in range(18):
        succeed(None)
    for verdict in (True, True, False, True, True):  # 4 of 20, one success confirmed
        succeed(verdict)
        play(monitor, "." * 15)  # a failure
        monitor.corrected(True)  # and a person who calls another a success, which nothing was paid for
        play(monitor, "." * 15)
        monitor.corrected(True)
    assert not alarm(monitor, words)
    succeed(True)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} 5 of the last 20 successes;") and "label.py" in said[0]
    succeed(True)
    assert not alarm(monitor, words)
    for _ in range(15):  # 4 of 20 are left: not over
        succeed(None)
    succeed(True)  # 5 again
    assert not alarm(monitor, words)
    for _ in range(20):
        succeed(None)
    for _ in range(5):
        succeed(True)
    assert alarm(monitor, words)


def test_a_verdict_taken_back():
    monitor = make()
    for _ in range(3):
        play(monitor, "." * 15, success=True)
        monitor.corrected(False)
        monitor.corrected(True)
    assert monitor.alarms() == []


@pytest.mark.parametrize(("dim", "fine"), [(84, 86), (116, 114)])
def test_alarm_light(dim, fine):
    words = "lighting drift at actor a: camera 1 shows a brightness of"
    monitor = make()  # 100 +- 5: 84 is 3.2 deviations off
    play(monitor, light=fine)
    play(monitor, light=[dim, dim, dim, dim, fine])
    play(monitor, light=[dim, dim, 200 - dim, dim, dim])  # off both ways: the view, not the lamp
    assert not alarm(monitor, words)
    play(monitor, light=dim)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} {dim}, 100 in") and "nearer than 3.2 of" in said[0]
    play(monitor, light=dim)
    play(monitor, light=fine)  # 2.8: not over yet
    play(monitor, light=dim)
    assert not alarm(monitor, words)
    play(monitor, light=[dim, dim, dim, dim, 100])
    play(monitor, light=dim)
    assert alarm(monitor, words)


def test_each_actor_has_its_own_light():
    monitor = make()
    for _ in range(3):
        play(monitor, light=50, actor="left")
        play(monitor, light=100, actor="right")
    assert alarm(monitor, "lighting drift at actor left")
    play(monitor, light=150, actor="right")
    assert alarm(monitor, "lighting drift at actor right")


def test_the_camera_that_drifted_is_named():
    monitor = make(brightness=np.array([[100.0, 5.0], [100.0, 0.0]]))
    for t in range(5):
        images = np.stack([np.full((4, 4, 3), 110, np.uint8), np.full((4, 4, 3), 107, np.uint8)])
        monitor.moved("a", t, STEADY, 0.0, False, images, 0, 0.0)
    assert monitor.ended("a", 4.0, False)["brightness_drift"] == 3.5  # of 2 of 255, the least deviation
    assert alarm(monitor, "lighting drift at actor a: camera 2 shows a brightness of 107")


def govern(monitor, steps, updates, start=(0, 0)):
    """So many steps with `updates` for each of them, a look every 50 steps; returns where it got to."""
    step, done = start
    for _ in range(steps // 50):
        step, done = step + 50, done + round(50 * updates)
        monitor.updated(0.1 * step, step, done, {})
    return step, done


def test_alarm_governor():
    words = "governor starved:"
    monitor = make()  # asks for 4
    for step in range(0, 3000, 50):  # before the first update
        monitor.updated(0.1 * step, step, 0, {})
    at = govern(monitor, 2000, 3.3, (3000, 1))
    assert not alarm(monitor, words)
    at = govern(monitor, 1000, 2.0, at)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(words) and "1000 steps where 4 are asked" in said[0]
    at = govern(monitor, 2000, 2.0, at)
    at = govern(monitor, 2000, 3.4, at)  # under 90 %: not over
    at = govern(monitor, 2000, 2.0, at)
    assert not alarm(monitor, words)
    at = govern(monitor, 2000, 4.0, at)
    assert not alarm(monitor, words)
    govern(monitor, 2000, 0.0, at)
    assert alarm(monitor, words)


def test_a_governor_that_spends_in_the_resets_is_not_starved():
    """Episodes of 200 steps in which no update is made, all of them in the reset."""
    monitor, step, updates = make(), 100, 400
    for _ in range(20):
        step += 200
        monitor.updated(0.1 * step, step, updates, {})  # as the episode ends
        while updates < 4 * step:
            updates += 50
            monitor.updated(0.1 * step + updates / 1000, step, updates, {})
    assert monitor.alarms() == []
    monitor = make(utd_ratio=0.0)
    govern(monitor, 3000, 0.0, (100, 1))
    assert monitor.alarms() == []


def test_alarm_interventions():
    words = "interventions too long:"
    monitor = make()
    play(monitor, "h" * 40 + "." + "h" * 40 + "." + "h" * 40 + "." + "h" * 40)
    assert not alarm(monitor, words)  # four do not make a habit
    play(monitor, "." * 25)  # and it may do without
    play(monitor, ".." + "h" * 31)
    said = monitor.alarms()
    assert len(said) == 1 and said[0].startswith(f"{words} the last 5 took 40 steps") and "let go" in said[0]
    play(monitor, "h" * 40)
    assert not alarm(monitor, words)
    for _ in range(10):
        play(monitor, "." + "h" * 28)  # 28 at the median: not over
    for _ in range(10):
        play(monitor, "h" * 40)
    assert not alarm(monitor, words)
    for _ in range(10):
        play(monitor, "...hhhhh")
    for _ in range(5):  # 5 5 5 5 5 40 ..: the median is 22.5
        play(monitor, "h" * 40)
    assert not alarm(monitor, words)
    play(monitor, "h" * 40)
    assert alarm(monitor, words)


def test_a_run_as_it_should_be_is_silent():
    monitor, rng, step = make(), np.random.default_rng(0), 0
    for episode in range(100):
        steps = int(rng.integers(15, 40))
        for t in range(steps):
            light = np.full((1, 4, 4, 3), round(rng.normal(100, 5)), np.uint8)
            monitor.moved("a", step / 10, np.tanh(rng.normal(0, 1, 4)), 0.0, t < 8 and episode < 30, light, 3, 1.0)
            step += 1
            monitor.updated(step / 10, step, 4 * step, {"q_max": 0.9, "entropy": rng.normal(-2, 1), "td_target": 0.3})
        monitor.ended("a", step / 10, success=episode % 3 > 0)
    assert monitor.alarms() == []


def test_a_resumed_run_goes_on(tmp_path):
    def first(monitor):
        for index in range(30):
            play(monitor, "hhh" + "." * 20, success=index % 2 == 0)
        look(monitor, 59, entropy=-9.0)
        look(monitor, 4, q_max=5.0)
        for _ in range(4):
            play(monitor, action=STEADY)
        play(monitor, light=50, action=STEADY)  # two alarms, one of them not yet said

    straight, before, after = make(), make(), make()
    first(straight)
    first(before)
    after.load_state(json.loads(json.dumps(before.state())))
    for monitor in (straight, after):
        assert sorted(sentence.split(":")[0][:16] for sentence in monitor.alarms()) == [
            "lighting drift a",
            "policy collapsed",
        ]
        look(monitor, 1, entropy=-9.0, q_max=5.0)
        assert [sentence.split(":")[0] for sentence in monitor.alarms()] == [
            "policy collapsed", "Q above what is possible",
        ]  # fmt: skip
        play(monitor, light=50)  # goes on, and is not said again
        monitor.corrected(True)
        assert monitor.alarms() == []
    assert play(after, "hhhh") == play(straight, "hhhh")
    assert after.state() == straight.state()
