"""Keys over a real pseudo-terminal, and the simulated person: what it does with a leader and keys alone."""

import os
import pty
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from so101.env import EnvConfig
from so101.rig import RigConfig, open_rig
from so101.robot import teleop
from so101.schema import Preprocess, RewardSpec

READER = textwrap.dedent(
    """
    import sys, time
    from so101.robot.teleop import TerminalKeys
    keys = TerminalKeys()
    print("ready", flush=True)
    pressed = []
    try:
        until = time.monotonic() + 5
        while len(pressed) < 3 and time.monotonic() < until:
            pressed += keys.poll()
            time.sleep(0.01)
    finally:
        keys.close()
    print(pressed, flush=True)
    """
)


def test_keys_are_read_one_at_a_time_from_a_real_terminal_and_unknown_ones_ignored():
    master, slave = pty.openpty()
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=slave, stdout=subprocess.PIPE, text=True)
    with reader:
        assert reader.stdout.readline() == "ready\n"
        for key in (b"s", b"z", b"I", b"q"):  # no Enter is pressed
            os.write(master, key)
            time.sleep(0.02)
        assert reader.stdout.readline() == "['success', 'intervene', 'quit']\n"
    assert reader.returncode == 0
    os.close(master)
    os.close(slave)


def test_without_a_terminal_no_key_is_ever_pressed():
    program = "from so101.robot.teleop import TerminalKeys; k = TerminalKeys(); print(k.poll()); k.close()"
    done = subprocess.run([sys.executable, "-c", program], input="sss", capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def training():
    with open_rig(RigConfig(), 1) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 1, rig.verdict)
        yield env, rig


def test_the_simulated_person_helps_only_after_it_has_watched_and_then_succeeds(training):
    env, rig = training
    rig.teleop.hear(teleop.TRAINING)
    env.reset()
    steps = [env.step(np.zeros(4)) for _ in range(RigConfig().operator.explore_steps)]
    assert not any(step.by_human for step in steps)
    steps = []
    while not (steps and steps[-1].terminated) and len(steps) < 30:
        steps.append(env.step(np.zeros(4)))
    assert steps[0].by_human and steps[-1].success
    assert np.abs([step.action for step in steps[1:]]).mean() > 0.1  # what it did is what is stored


def test_the_simulated_person_keeps_its_hands_off_an_evaluation(training):
    env, rig = training
    rig.teleop.hear(teleop.EVALUATION)
    env.reset()
    assert not any(env.step(np.zeros(4)).by_human for _ in range(60))


def test_a_deliberate_failure_never_succeeds_and_says_so():
    with open_rig(RigConfig(), 2) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 2, rig.verdict, success_ends=False)
        for _ in range(8):  # each way to fail, twice
            rig.teleop.hear(teleop.DEMONSTRATE_FAILURE)
            env.reset(person_drives=True)
            steps = [env.step(np.zeros(4))]
            while not (steps[-1].terminated or steps[-1].truncated):
                steps.append(env.step(np.zeros(4)))
            assert "failure" in steps[-1].events and not any(step.success for step in steps)


def test_most_demonstrations_succeed_and_are_recorded_through_the_leader():
    with open_rig(RigConfig(), 3) as rig:
        env = rig.make_env(EnvConfig(), Preprocess(), RewardSpec(), 3, rig.verdict)
        succeeded = 0
        for _ in range(10):
            rig.teleop.hear(teleop.DEMONSTRATE)
            env.reset(person_drives=True)
            for _ in range(40):
                step = env.step(np.zeros(4))
                assert step.by_human
                if step.terminated:
                    break
            succeeded += step.success
        assert succeeded >= 9
