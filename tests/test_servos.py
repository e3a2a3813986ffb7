"""The simulated servos against literal bytes, the servo's documents and the laws of motion."""

import math
from dataclasses import replace

import numpy as np
import pytest

from so101.robot.bus import ServoBus
from so101.robot.calibration import Calibration
from so101.robot.feetech import find_status, status_packet
from so101.robot.kinematics import JAW_CLOSED, JAW_OPEN
from so101.sim.servos import FAULTS, SIM_CALIBRATION, Faults, SimPort, SimServos

DT = 0.02
IDS = [1, 2, 3, 4, 5, 6]


def make() -> tuple[SimServos, SimPort, ServoBus]:
    servos = SimServos()
    port = SimPort(servos)
    return servos, port, ServoBus(port)


def ask(port: SimPort, request: str) -> str:
    port.write(bytes.fromhex(request))
    return port.read(1000).hex(" ")


def powered(p_gain: int = 16) -> tuple[SimServos, ServoBus]:
    """Holding position where they are, all torques on."""
    servos, _, bus = make()
    for servo_id in IDS:
        bus.write(servo_id, "P_Coefficient", p_gain)
        bus.write(servo_id, "Goal_Position", bus.read(servo_id, "Present_Position"))
        bus.write(servo_id, "Torque_Enable", 1)
    run(servos, 0.1)
    return servos, bus


def run(servos: SimServos, seconds: float) -> None:
    for _ in range(round(seconds / DT)):
        servos.step(DT)


def ticks_of(bus: ServoBus, servo_id: int, rad: float) -> int:
    return bus.read(servo_id, "Present_Position") + round(rad * 4096 / (2 * math.pi))


def test_golden_bytes_from_the_other_end() -> None:
    servos, port, _ = make()
    assert ask(port, "ff ff 01 02 01 fb") == "ff ff 01 02 00 fc"
    servos.angle[0] = (1304 - 2071) * 2 * math.pi / 4096
    assert ask(port, "ff ff 01 04 02 38 02 be") == "ff ff 01 04 00 18 05 dd"
    assert ask(port, "ff ff 01 09 03 2a 00 08 00 00 e8 03 d5") == "ff ff 01 02 00 fc"
    assert ask(port, "ff ff 01 04 02 2a 06 c8") == "ff ff 01 08 00 00 08 00 00 e8 03 03"
    assert ask(port, "ff ff fe 02 05 fa") == ""  # ACTION


def test_sync_read_answers_in_request_order_and_nobody_answers_for_the_missing() -> None:
    _, port, _ = make()
    # ids 3, 9, 1; register 5 (ID)
    assert ask(port, "ff ff fe 07 82 05 01 03 09 01 65") == "ff ff 03 03 00 03 f6 ff ff 01 03 00 01 fa"
    assert ask(port, "ff ff 09 02 01 f3") == ""


def test_an_instruction_may_come_in_pieces_and_after_noise() -> None:
    _, port, _ = make()
    port.write(bytes.fromhex("00 ff ff 07 ff"))
    for byte in bytes.fromhex("ff 01 02 01"):
        port.write(bytes((byte,)))
        assert port.in_waiting == 0
    assert ask(port, "fb ff ff 02 02 01 fa") == "ff ff 01 02 00 fc ff ff 02 02 00 fb"
    assert ask(port, "ff ff 01 02 01 fc") == ""  # wrong checksum


def test_status_level_0_answers_only_ping_and_reads() -> None:
    _, port, bus = make()
    bus.write_eprom(1, "Response_Status_Level", 1)
    port.write(bytes.fromhex("ff ff 01 04 03 08 00 ef"))  # level 0
    port.reset_input_buffer()
    assert ask(port, "ff ff 01 04 03 28 00 cf") == ""
    assert ask(port, "ff ff 01 02 01 fb") == "ff ff 01 02 00 fc"
    assert ask(port, "ff ff 01 04 02 08 01 ef") == "ff ff 01 03 00 00 fb"


def test_a_broadcast_write_reaches_all_and_is_not_answered() -> None:
    _, port, bus = make()
    assert ask(port, "ff ff fe 04 03 29 07 ca") == ""
    assert bus.sync_read("Acceleration", IDS) == dict.fromkeys(IDS, 7)


def test_a_broadcast_ping_is_answered_by_each_in_turn() -> None:
    _, port, _ = make()
    replies = "".join(f"ff ff {servo_id:02x} 02 00 {0xFD - servo_id:02x} " for servo_id in IDS)
    assert ask(port, "ff ff fe 02 01 fe") == replies.strip()


def test_reg_write_waits_for_action() -> None:
    _, port, bus = make()
    assert ask(port, "ff ff 02 05 04 2a 34 08 8e") == "ff ff 02 02 00 fb"
    assert bus.read(2, "Goal_Position") == 0
    assert ask(port, "ff ff fe 02 05 fa") == ""
    assert bus.read(2, "Goal_Position") == 2100
    bus.write(2, "Goal_Position", 1900)
    assert ask(port, "ff ff fe 02 05 fa") == ""  # once only
    assert bus.read(2, "Goal_Position") == 1900


def test_read_only_bytes_stay() -> None:
    _, port, bus = make()
    before = bus.read(1, "Present_Voltage")
    assert ask(port, "ff ff 01 04 03 3e 00 b9") == "ff ff 01 02 00 fc"
    assert ask(port, "ff ff 01 05 03 03 01 01 f1") == "ff ff 01 02 00 fc"
    assert bus.read(1, "Present_Voltage") == before == 74
    assert bus.read(1, "Model_Number") == 777


def test_what_is_written_to_locked_eprom_is_lost_with_the_power() -> None:
    servos, _, bus = make()
    bus.write(3, "P_Coefficient", 11)
    assert bus.read(3, "P_Coefficient") == 11
    servos.power_cycle()
    assert bus.read(3, "P_Coefficient") == 32
    bus.write(3, "Lock", 0)
    bus.write(3, "P_Coefficient", 12)
    bus.write(3, "Torque_Enable", 1)
    servos.power_cycle()
    assert bus.read(3, "P_Coefficient") == 12
    assert bus.read(3, "Torque_Enable") == 0
    assert not servos.torque_on.any()


def test_max_torque_limit_reaches_torque_limit_at_power_up_only() -> None:
    servos, _, bus = make()
    bus.write_eprom(6, "Max_Torque_Limit", 500)
    assert bus.read(6, "Torque_Limit") == 1000
    servos.power_cycle()
    assert bus.read(6, "Torque_Limit") == 500


def test_position_is_encoder_minus_homing_offset_within_a_turn_unless_it_counts_turns() -> None:
    servos, port, bus = make()
    assert bus.read(2, "Present_Position") == 1996  # angle 0
    bus.write(2, "Homing_Offset", 0)
    assert bus.read(2, "Present_Position") == 1996 + 655  # the encoder itself
    bus.write(3, "Homing_Offset", 2047)
    assert bus.read(3, "Present_Position") == 2105 - 803 - 2047 + 4096
    bus.write(3, "Phase", 12 | 16)  # feedback over many turns
    assert bus.read(3, "Present_Position") == 2105 - 803 - 2047  # -745
    assert ask(port, "ff ff 03 04 02 38 02 bc")[15:20] == "e9 82"  # 745 = 0x2e9, sign in bit 15


def test_angles_and_calibration_agree() -> None:
    # Two independent ways from an angle to a position: through the servo's bytes, and directly.
    servos, _, bus = make()
    rng = np.random.default_rng(1)
    for _ in range(50):
        servos.move_by_hand(rng.uniform(-1.6, 1.6, 6))
        ticks = np.array(list(bus.sync_read("Present_Position", IDS).values()))
        position = SIM_CALIBRATION.to_position(ticks)
        assert position[:5] == pytest.approx(servos.angle[:5], abs=math.pi / 4096 + 1e-9)
        opening = (servos.angle[5] - JAW_CLOSED) / (JAW_OPEN - JAW_CLOSED)
        assert position[5] == pytest.approx(opening, abs=0.5 / 1251 + 1e-9)


def test_an_inverted_joint_turns_against_its_servo() -> None:
    joints = {name: replace(joint, drive_mode=1) for name, joint in SIM_CALIBRATION.joints.items()}
    servos = SimServos(Calibration(joints))
    bus = ServoBus(SimPort(servos))
    servos.angle[:] = [0.5] * 5 + [JAW_OPEN]
    ticks = np.array(list(bus.sync_read("Present_Position", IDS).values()))
    assert ticks[0] == 2071 - round(0.5 * 4096 / (2 * math.pi))
    assert ticks[5] == 1420  # open at the lower end
    assert Calibration(joints).to_position(ticks) == pytest.approx([0.5] * 5 + [1.0], abs=1e-3)


def test_a_step_is_63_percent_done_after_delay_and_time_constant() -> None:
    servos, bus = powered()
    bus.write(1, "Goal_Position", ticks_of(bus, 1, 0.1))
    run(servos, DT)
    assert servos.angle[0] == pytest.approx(0, abs=1e-3)  # the order takes one step to arrive
    servos.step(0.09)
    assert servos.angle[0] == pytest.approx(0.1 * (1 - 1 / math.e), abs=5e-4)


def test_speed_never_passes_the_motor_s_and_goal_velocity_slows_it() -> None:
    servos, bus = powered()
    bus.write(5, "Goal_Position", 3800)
    bus.write(1, "Goal_Velocity", 512)  # an eighth of a turn per second
    bus.write(1, "Goal_Position", 3200)
    run(servos, DT)
    before = servos.angle.copy()
    run(servos, 0.2)
    speed = (servos.angle - before) / 0.2
    assert speed[4] == pytest.approx(4.5)
    assert speed[0] == pytest.approx(math.pi / 4)
    assert bus.read(1, "Present_Velocity") == 512
    assert bus.read(5, "Present_Velocity") == round(4.5 * 4096 / (2 * math.pi))
    assert bus.read(1, "Moving") == 1
    run(servos, 4)
    assert bus.read(1, "Present_Velocity") == 0
    assert bus.read(1, "Moving") == 0


def test_goals_end_at_the_position_limits() -> None:
    servos, bus = powered()
    bus.write(2, "Goal_Position", 4000)
    bus.write(3, "Goal_Position", -50)
    run(servos, 3)
    assert bus.read(2, "Present_Position") == 3186
    assert bus.read(3, "Present_Position") == 975


def test_gravity_makes_it_sag_until_the_motor_s_torque_is_equal() -> None:
    servos, bus = powered()
    servos.load_torque[1] = 0.74  # Nm, the arm stretched out
    run(servos, 2)
    sag = servos.angle[1]
    assert math.degrees(sag) == pytest.approx(4.5, abs=0.1)  # the published estimate for this load
    # The motor's own law, torque = kt / R * V * duty (kt 1.178, R 2.479), with the duty that it reports.
    torque = 1.178 / 2.479 * 7.4 * bus.read(2, "Present_Load") / 1000
    assert torque == pytest.approx(-0.74, rel=0.01)

    stiff, _ = powered(p_gain=32)
    stiff.load_torque[1] = 0.74
    run(stiff, 2)
    assert stiff.angle[1] == pytest.approx(sag / 2, rel=1e-6)


def test_a_blocked_jaw_shows_as_error_load_current_and_warmth() -> None:
    servos, bus = powered()
    bus.write(6, "Torque_Limit", 500)
    bus.write(6, "Goal_Position", 1420)  # closed
    for _ in range(1500):
        servos.step(DT)
        servos.angle[5] = max(servos.angle[5], 0.2)  # a cube
    assert bus.read(6, "Present_Position") == pytest.approx(1420 + (0.2 - JAW_CLOSED) * 4096 / (2 * math.pi), abs=1)
    assert bus.read(6, "Present_Load") == -500  # limited
    assert bus.read(6, "Present_Current") == pytest.approx(0.5 * 2.7 / 0.0065, abs=1)
    assert bus.read(6, "Present_Velocity") == 0
    assert 25 < bus.read(6, "Present_Temperature") < 40
    assert bus.read(1, "Present_Temperature") == 25


def test_without_torque_it_stays_and_only_a_hand_moves_it() -> None:
    servos, bus = powered()
    for servo_id in (1, 2, 3):
        bus.write(servo_id, "Torque_Enable", 0)
    servos.load_torque[:] = 1.0
    run(servos, 1)
    assert (servos.angle[:3] == 0).all()
    servos.move_by_hand(np.full(6, 0.7))
    assert (servos.angle[:3] == 0.7).all()
    assert (servos.angle[3:] < 0.2).all()  # stiff ones only sag
    servos.move_by_hand(np.full(6, 9.0))
    assert bus.read(1, "Present_Position") == 3280  # as far as its stop


def test_torque_comes_on_at_the_goal_of_that_moment() -> None:
    # Both orders are on their way for one step; the goal from before, at the far end, must not be felt.
    servos, _, bus = make()
    servos.step(DT)
    bus.write(2, "Goal_Position", bus.read(2, "Present_Position"))
    bus.write(2, "Torque_Enable", 1)
    run(servos, 0.5)
    assert abs(servos.angle[1]) < 1e-9


def test_replies_carry_the_condition() -> None:
    servos, port, bus = make()
    servos.voltage[1] = 12.0  # on a 7.4 V servo
    servos.condition[4] = 32
    assert ask(port, "ff ff 02 02 01 fa") == "ff ff 02 02 01 fa"
    status = bus.sync_read("Status", IDS)
    assert (status[1], status[2], status[5]) == (0, 1, 32)
    assert bus.status == status


def test_each_fault_does_what_it_says() -> None:
    reply, next_reply = status_packet(1, 0, b"\x18\x05"), status_packet(2, 0, b"\x01\x02")
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert Faults(rng, 1.0, ["drop"])(reply) == b""
        truncated = Faults(rng, 1.0, ["truncate"])(reply)
        assert len(truncated) < len(reply)
        assert reply.startswith(truncated)
        corrupt = Faults(rng, 1.0, ["corrupt"])(reply)
        assert sum((a ^ b).bit_count() for a, b in zip(corrupt, reply, strict=True)) == 1
        noisy = Faults(rng, 1.0, ["noise"])(reply)
        assert len(noisy) > len(reply)
        assert find_status(noisy)[0] == find_status(reply)[0]
        assert Faults(rng, 1.0, ["echo"])(reply) == reply + reply
        assert len(Faults(rng, 1.0, ["garbage"])(reply)) == len(reply)
    late = Faults(rng, 1.0, ["late"])
    assert late(reply) == b""
    late.rate = 0.0
    assert late(next_reply) == reply + next_reply
    assert late(next_reply) == next_reply


def test_faults_come_at_their_rate_and_repeat_with_their_seed() -> None:
    reply = status_packet(1, 0, b"\x18\x05")
    first, second = (Faults(np.random.default_rng(3), 0.1, FAULTS) for _ in range(2))
    delivered = [first(reply) for _ in range(2000)]
    assert delivered == [second(reply) for _ in range(2000)]
    assert 130 < sum(data != reply for data in delivered) < 290  # late ones show twice


def test_motors_from_the_box_all_have_id_1_and_no_calibration() -> None:
    servos = SimServos(factory=True)
    servos.present[:] = [False] * 5 + [True]
    bus = ServoBus(SimPort(servos))
    assert bus.ping(1) == 777
    stored = [bus.read(1, name) for name in ("Baud_Rate", "Homing_Offset", "Min_Position_Limit", "Max_Position_Limit")]
    assert stored == [0, 0, 0, 4095]
    bus.write_eprom(1, "ID", 6)
    servos.present[:] = [True] * 6
    assert bus.ping(6) == 777
    servos.angle[5] = JAW_CLOSED
    assert bus.read(6, "Present_Position") == 1420 - 290  # how it is built in; there is no offset now


def test_what_is_due_happens_in_its_step_and_in_order() -> None:
    servos, happened = SimServos(), []
    servos.after(0.06, lambda: happened.append("b"))
    servos.after(0.02, lambda: happened.append("a"))
    servos.after(0.06, lambda: happened.append("c"))
    servos.step(DT)
    assert happened == ["a"]
    servos.step(DT)
    assert happened == ["a"]
    servos.step(DT)
    assert happened == ["a", "b", "c"]


def test_an_unplugged_port_is_an_oserror_until_it_is_opened_again() -> None:
    port = SimPort(SimServos())
    port.unplug()
    for use in (lambda: port.in_waiting, lambda: port.read(1), lambda: port.write(b"x"), port.open):
        with pytest.raises(OSError):
            use()
    port.plug_in()
    with pytest.raises(OSError, match="the port is closed"):
        port.read(1)
    assert port.open() is port
    assert ask(port, "ff ff 01 02 01 fb") == "ff ff 01 02 00 fc"


def test_a_load_that_pauses_is_no_overload() -> None:
    servos, bus = powered()
    for servo_id, register, value in ((4, "Overload_Torque", 40), (4, "Protection_Time", 50)):
        bus.write(servo_id, register, value)
    servos.block([3])
    goal = ticks_of(bus, 4, 0.25)  # a load of 0.1668 * 16 * 0.25 = 0.67
    for _ in range(3):
        bus.write(4, "Goal_Position", goal)
        run(servos, 0.4)
        bus.write(4, "Goal_Position", bus.read(4, "Present_Position"))
        run(servos, 0.1)
    assert bus.read(4, "Status") == 0
    bus.write(4, "Goal_Position", goal)
    run(servos, 0.6)
    assert bus.read(4, "Status") == 32
    assert bus.read(4, "Present_Load") == 200


def test_echo_returns_what_was_written() -> None:
    port = SimPort(SimServos(), echo=True)
    assert ask(port, "ff ff 01 02 01 fb") == "ff ff 01 02 01 fb ff ff 01 02 00 fc"
