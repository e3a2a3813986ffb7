"""The schedule of the control loop: absolute, so lateness does not add up; misses are counted."""

import time

import pytest

from so101.timing import SUBSTEP, Clock, Rate, SimClock


def test_sim_clock_moves_the_world_in_whole_substeps():
    clock, steps = SimClock(), []
    clock.on_substep.append(steps.append)
    clock.sleep_until(0.1)
    assert clock.now() == pytest.approx(0.1) and steps == [SUBSTEP] * 5
    clock.sleep_until(0.05)  # a time that has passed
    assert clock.now() == pytest.approx(0.1) and len(steps) == 5


def test_sim_clock_does_not_drift_over_an_hour():
    clock = SimClock()
    for tick in range(1, 36_001):
        clock.sleep_until(tick * 0.1)
    assert clock.now() == pytest.approx(3600.0, abs=SUBSTEP / 2)


def test_sim_clock_takes_no_real_time_unless_paced():
    begun = time.monotonic()
    SimClock().sleep_until(20.0)
    assert time.monotonic() - begun < 1.0
    begun = time.monotonic()
    SimClock(pace=2.0).sleep_until(0.2)
    assert time.monotonic() - begun >= 0.1  # 0.2 simulated seconds at twice the speed


def test_rate_keeps_an_absolute_schedule_when_the_work_varies():
    clock = SimClock()
    rate = Rate(clock, 0.1)
    ends = []
    for work in (0.02, 0.08, 0.0, 0.06):
        clock.sleep_until(clock.now() + work)
        assert rate.wait() == 0.0
        ends.append(clock.now())
    assert ends == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rate.overruns == 0


def test_rate_counts_a_miss_and_goes_on_from_there_without_a_burst():
    clock = SimClock()
    rate = Rate(clock, 0.1)
    clock.sleep_until(0.36)  # due at 0.1
    assert rate.wait() == pytest.approx(0.26) and rate.overruns == 1
    assert clock.now() == pytest.approx(0.36)  # late already: it does not wait as well
    assert rate.wait() == 0.0 and clock.now() == pytest.approx(0.46)
    clock.sleep_until(5.0)
    rate.restart()
    assert rate.wait() == 0.0 and clock.now() == pytest.approx(5.1) and rate.overruns == 1


def test_rate_on_the_real_clock():
    clock = Clock()
    rate = Rate(clock, 0.02)
    begun = clock.now()
    for _ in range(10):
        time.sleep(0.005)  # work, which must not add to the period
        rate.wait()
    taken = clock.now() - begun
    assert 0.2 - 0.001 <= taken < 0.2 + 0.05 * (1 + rate.overruns)
    missed = rate.overruns
    time.sleep(0.05)
    assert rate.wait() > 0.0 and rate.overruns == missed + 1


def test_real_clock_starts_at_zero_and_never_returns_early():
    clock = Clock()
    assert 0.0 <= clock.now() < 1.0
    clock.sleep_until(0.02)
    assert clock.now() >= 0.02
