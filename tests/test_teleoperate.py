"""The leader drives the follower through the env's own control step, timed, and safe on every way out."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
from test_record import FaultyCamera, Scripted

from so101.errors import ConfigError
from so101.rig import RigConfig, open_rig
from so101.tools import teleoperate


@pytest.fixture
def driving(monkeypatch):
    """Drives for some seconds with keys pressed as told; returns the rig."""

    def run(keys, seconds=3.0):
        @contextmanager
        def rigged(config, seed, page=None, flights=None):
            with open_rig(config, seed, page) as rig:
                run.rig, rig.teleop.keys = rig, Scripted(rig.teleop.keys, keys)
                rig.cameras = {"wrist": FaultyCamera(())}
                run.start = rig.arm.read().position
                yield rig

        monkeypatch.setattr(teleoperate, "open_rig", rigged)
        teleoperate.main(teleoperate.Config(seconds=seconds))

    return run


def interrupt():
    raise KeyboardInterrupt


def test_it_drives_for_its_time_and_says_how_long_the_ticks_took(driving, capsys):
    driving({})
    said = capsys.readouterr().out
    assert "30 ticks: mean 100.0 ms, p99 100.0, longest 100.0; 0 overran" in said
    assert re.search(r"teleoperate: 30/30 tick .* tool [+-]0\.\d{3} [+-]0\.\d{3} [+-]0\.\d{3} +opening 0\.", said)


@pytest.mark.parametrize("keys, ticks", [({(1, 12): "quit"}, 11), ({(1, 12): interrupt}, 10), ({(1, 1): "quit"}, 0)])
def test_every_way_out_tells_the_times_and_leaves_both_arms_limp_and_the_follower_at_rest(driving, capsys, keys, ticks):
    if interrupt in keys.values():
        with pytest.raises(KeyboardInterrupt):
            driving(keys)
    else:
        driving(keys)
    said = capsys.readouterr().out
    assert (f"{ticks} ticks: mean" if ticks else "no tick was completed") in said
    for arm in (driving.rig.arm, driving.rig.teleop.leader.arm):
        assert not arm.bus.port.servos.torque_on.any()
    assert np.abs(driving.rig.arm.read().position - driving.start)[:5].max() < 0.15


def test_without_a_leader_it_says_what_it_needs():
    with pytest.raises(
        ConfigError, match="rig.leader: got null; drive with a leader arm, or from the page with page=true"
    ):
        teleoperate.Config(rig=RigConfig(leader=None))
