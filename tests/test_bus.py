"""The bus against literal bytes on a scripted wire, and against the simulated servos on bad lines."""

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import pytest

from so101.robot.bus import ServoBus, ServoError
from so101.robot.feetech import status_packet
from so101.sim.servos import FAULTS, SIM_CALIBRATION, Faults, SimPort, SimServos

IDS = [1, 2, 3, 4, 5, 6]
OK = "ff ff 01 02 00 fc"


class Wire:
    """A serial port whose far end sends the next of `answers` (hex) after each write."""

    name = "wire"

    def __init__(self, answers: Iterable[str]) -> None:
        self.answers = list(answers)
        self.sent: list[str] = []
        self.waiting = b""

    @property
    def in_waiting(self) -> int:
        return len(self.waiting)

    def write(self, data: bytes) -> int:
        self.sent.append(data.hex(" "))
        self.waiting += bytes.fromhex(self.answers.pop(0)) if self.answers else b""
        return len(data)

    def read(self, size: int) -> bytes:
        data, self.waiting = self.waiting[:size], self.waiting[size:]
        return data

    def close(self) -> None:
        pass


def bus_hearing(*answers: str, retries: int = 3) -> ServoBus:
    return ServoBus(Wire(answers), retries, names={1: "shoulder_pan", 4: "wrist_flex"})


def simulated(fault: Faults | None = None, echo: bool = False, retries: int = 3) -> tuple[SimServos, ServoBus]:
    servos = SimServos()
    return servos, ServoBus(SimPort(servos, fault, echo), retries, SIM_CALIBRATION.names)


def test_the_bytes_of_each_transaction() -> None:
    bus = bus_hearing("ff ff 01 04 00 18 05 dd", OK, "")
    assert bus.read(1, "Present_Position") == 1304
    bus.write(1, "Torque_Enable", 1)
    bus.sync_write("Goal_Position", {1: 2048, 2: 1000})
    assert bus.port.sent == [
        "ff ff 01 04 02 38 02 be",
        "ff ff 01 04 03 28 01 ce",
        "ff ff fe 0a 83 2a 02 01 00 08 02 e8 03 52",
    ]


def test_sync_read_asks_once_and_sorts_by_id() -> None:
    bus = bus_hearing("ff ff 02 04 00 e8 03 0e ff ff 01 04 00 18 05 dd")
    assert bus.sync_read("Present_Position", [2, 1]) == {2: 1000, 1: 1304}
    assert bus.port.sent == ["ff ff fe 06 82 38 02 02 01 3c"]


def test_a_sync_reply_out_of_order_is_a_late_one() -> None:
    late = "ff ff 02 04 00 e8 03 0e"  # servo 2 at 1000, from the read before; now it is at 1001
    whole = "ff ff 01 04 00 18 05 dd ff ff 02 04 00 e9 03 0d"
    bus = bus_hearing(late + whole[:23], whole)
    assert bus.sync_read("Present_Position", [1, 2]) == {1: 1304, 2: 1001}
    assert bus.faults == {"unexpected": 1}


def test_one_read_for_all_measurements() -> None:
    # position 1304, velocity -100, load -500, 7.4 V, 31 C, -, status 0, moving 1, goal twice, current 20
    data = "18 05 64 80 f4 05 4a 1f 00 00 01 00 08 14 00"
    bus = bus_hearing(status_packet(1, 0, bytes.fromhex(data)).hex())
    assert bus.sync_read_span("Present_Position", "Present_Current", [1])[1] == {
        "Present_Position": 1304,
        "Present_Velocity": -100,
        "Present_Load": -500,
        "Present_Voltage": 74,
        "Present_Temperature": 31,
        "Status": 0,
        "Moving": 1,
        "Present_Current": 20,
    }
    assert bus.port.sent == ["ff ff fe 05 82 38 0f 01 32"]


def test_a_servo_with_a_condition_is_read_and_the_condition_kept() -> None:
    bus = bus_hearing("ff ff 01 04 20 18 05 bd", "ff ff 01 04 00 18 05 dd")
    assert bus.read(1, "Present_Position") == 1304
    assert bus.status == {1: 32}  # overload
    bus.read(1, "Present_Position")
    assert bus.status == {1: 0}


def test_an_over_voltage_servo_is_not_called_missing() -> None:
    # Its answer to a PING (error 1) is the PING itself, byte for byte; LeRobot lists such a servo as missing.
    bus = bus_hearing("ff ff 01 02 01 fb", "ff ff 01 04 01 09 03 ed")
    assert bus.ping(1) == 777
    assert bus.status[1] == 1


def test_an_echo_is_no_servo() -> None:
    bus = bus_hearing("ff ff 01 02 01 fb", *["ff ff 01 04 02 03 02 f3"] * 4)
    with pytest.raises(ServoError, match="no valid reply to READ Model_Number"):
        bus.ping(1)


def test_own_bytes_are_skipped() -> None:
    model = "ff ff 01 04 00 09 03 ee"
    bus = bus_hearing(
        "ff ff 01 04 02 38 02 be" + "ff ff 01 04 00 18 05 dd",
        "ff ff 01 02 01 fb" + OK,
        "ff ff 01 04 02 03 02 f3" + model,
    )
    assert bus.read(1, "Present_Position") == 1304
    assert bus.ping(1) == 777
    assert not bus.faults


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("", "no reply"),
        ("ff ff 01 04 00 18", "truncated"),
        ("ff ff 01 04 00 18 05 dc", "checksum"),
        ("00 11 22", "noise"),
        ("ff ff 02 04 00 e8 03 0e", "unexpected"),  # servo 2
        ("ff ff 01 03 00 18 e3", "unexpected"),  # one byte where two were asked for
        ("ff ff 01 04 00 e8 03 0f" + "ff ff 01 04 00 18 05 dd", "unexpected"),  # a late reply, then ours
    ],
)
def test_a_bad_reply_is_asked_for_again(bad: str, kind: str) -> None:
    bus = bus_hearing(bad, "ff ff 01 04 00 18 05 dd")
    assert bus.read(1, "Present_Position") == 1304
    assert bus.faults == {kind: 1}
    assert len(bus.port.sent) == 2


def test_noise_before_a_good_reply_costs_no_second_try() -> None:
    bus = bus_hearing("ff 00 ff ff 07" + "ff ff 01 04 00 18 05 dd")
    assert bus.read(1, "Present_Position") == 1304
    assert len(bus.port.sent) == 1
    assert bus.faults == {"noise": 1}


def test_late_bytes_do_not_leak_into_the_next_transaction() -> None:
    bus = bus_hearing("ff ff 01 04 00 18 05 dd")
    bus.port.waiting = bytes.fromhex("ff ff 01 04 00 e8 03 0f")  # 1000, of an earlier read
    assert bus.read(1, "Present_Position") == 1304


def test_the_error_says_which_servo_register_how_often_and_the_bytes() -> None:
    bus = bus_hearing(*["ff ff 04 04 00 18 05 dd"] * 4)
    with pytest.raises(ServoError) as caught:
        bus.read(4, "Present_Position")
    assert str(caught.value) == (
        "servo 4 (wrist_flex): no valid reply to READ Present_Position in 4 attempts: "
        "checksum 0xdd, expected 0xda: ff ff 04 04 00 18 05 dd"
    )
    with pytest.raises(
        ServoError, match=r"servo 5: .* in 1 attempts: no reply; check its power and the cable that leads"
    ):
        bus_hearing(retries=0).read(5, "Present_Position")


def test_a_sync_read_names_the_one_servo_that_is_silent() -> None:
    servos, bus = simulated()
    servos._eprom[3][5] = 77  # nobody answers to 4 any more
    servos.power_cycle()
    with pytest.raises(ServoError, match=r"^servo 4 \(wrist_flex\): no valid reply to SYNC READ Present_Load"):
        bus.sync_read("Present_Load", IDS)


def test_requests_that_no_servo_could_fulfil() -> None:
    bus = bus_hearing()
    with pytest.raises(ServoError, match="'Goal_Positon'; did you mean 'Goal_Position'"):
        bus.read(1, "Goal_Positon")
    with pytest.raises(ServoError, match=r"servo id: got 254, must be 0 \.\. 253"):
        bus.read(254, "Goal_Position")
    with pytest.raises(ServoError, match="SYNC WRITE Goal_Position: no servos given"):
        bus.sync_write("Goal_Position", {})
    with pytest.raises(ServoError, match="SYNC READ Goal_Position: no servos given"):
        bus.sync_read("Goal_Position", [])
    with pytest.raises(ServoError, match="Present_Load: .* cannot be written"):
        bus.write(1, "Present_Load", 1)
    with pytest.raises(ServoError, match=r"servo 4 \(wrist_flex\): Homing_Offset: got 2114"):
        bus.write(4, "Homing_Offset", 2114)
    with pytest.raises(ServoError, match="Torque_Enable: not an EPROM register"):
        bus.write_eprom(1, "Torque_Enable", 1)
    assert bus.port.sent == []


def test_a_lost_port_is_one_sentence() -> None:
    _, bus = simulated()
    bus.close()
    with pytest.raises(ServoError, match=r"READ Lock: the port failed \(simulated: it is closed\); check its USB"):
        bus.read(1, "Lock")


def test_a_clean_line_has_nothing_to_report() -> None:
    bus = bus_hearing("ff ff 01 04 00 18 05 dd", "", "ff ff 01 04 00 18 05 dc", "ff ff 01 04 00 18 05 dd")
    bus.read(1, "Present_Position")
    assert bus.report() == ""
    bus.read(1, "Present_Position")
    assert bus.report() == "servo line wire: bad answers: 2, asked for again or mended (no reply 1, checksum 1)"


def test_eprom_is_written_in_order_and_only_where_it_differs() -> None:
    bus = bus_hearing("ff ff 01 03 00 20 db")
    assert bus.write_eprom(1, "P_Coefficient", 32) is False
    assert bus.port.sent == ["ff ff 01 04 02 15 01 e2"]

    bus = bus_hearing("ff ff 01 03 00 20 db", OK, OK, OK, "ff ff 01 03 00 10 eb", OK)
    assert bus.write_eprom(1, "P_Coefficient", 16) is True
    assert bus.port.sent[1:] == [
        "ff ff 01 04 03 28 00 cf",  # torque off
        "ff ff 01 04 03 37 00 c0",  # unlock
        "ff ff 01 04 03 15 10 d2",
        "ff ff 01 04 02 15 01 e2",  # read back
        "ff ff 01 04 03 37 01 bf",  # lock
    ]


def test_eprom_that_does_not_keep_a_value_is_locked_again_and_reported() -> None:
    bus = bus_hearing("ff ff 01 03 00 20 db", OK, OK, OK, "ff ff 01 03 00 20 db", OK)
    with pytest.raises(ServoError, match=r"shoulder_pan\): P_Coefficient reads 32 after 16 was written"):
        bus.write_eprom(1, "P_Coefficient", 16)
    assert bus.port.sent[-1] == "ff ff 01 04 03 37 01 bf"


@pytest.mark.parametrize("register, value", [("P_Coefficient", 16), ("ID", 9)])
@pytest.mark.parametrize("obeyed", [False, True])
@pytest.mark.parametrize("step", range(6))
def test_a_fault_at_any_step_of_an_eprom_write_leaves_it_locked(
    step: int, obeyed: bool, register: str, value: int
) -> None:
    """All tries of one step are lost, on the way there or on the way back; the line is well again after them."""
    servos, bus = simulated()
    write, lost, steps = bus.port.write, [], [b""]

    def failing(data: bytes) -> int:
        if data != steps[-1]:
            steps.append(data)
        if len(steps) - 2 != step or len(lost) > bus.retries:
            return write(data)
        lost.append(data)
        if obeyed:
            write(data)
            bus.port.reset_input_buffer()
        return len(data)

    bus.port.write = failing
    unanswered = (register, step) == ("ID", 3)  # nobody waits for an answer to a new id, and the lost one stays
    with nullcontext() if unanswered and obeyed else pytest.raises(ServoError):
        bus.write_eprom(6, register, value)
    assert lost and servos.read_memory(5, 55, 1) == b"\1"


def test_a_new_id_holds_at_once_and_outlasts_the_power() -> None:
    servos, bus = simulated()
    assert bus.write_eprom(6, "ID", 9)
    assert bus.read(9, "Lock") == 1
    servos.power_cycle()
    assert bus.ping(9) == 777
    with pytest.raises(ServoError):
        bus.ping(6)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("kind", FAULTS)
def test_no_fault_ever_becomes_a_wrong_value(kind: str, echo: bool) -> None:
    servos, bus = simulated(Faults(np.random.default_rng(5), 0.1, [kind]), echo, retries=12)
    servos.angle[:] = [0.1, -0.2, 0.3, -0.4, 0.5, 0.6]
    _, clean = simulated()
    clean.port.servos.angle[:] = servos.angle
    registers = [
        "Present_Position",
        "Homing_Offset",
        "Min_Position_Limit",
        "Max_Position_Limit",
        "Torque_Limit",
    ]
    for servo_id in IDS * 4:
        for register in registers:
            assert bus.read(servo_id, register) == clean.read(servo_id, register)
    for _ in range(10):  # six replies, all of which must be good
        assert bus.sync_read("Present_Position", IDS) == clean.sync_read("Present_Position", IDS)
    assert sum(bus.faults.values()) > 10


def test_writes_arrive_on_a_bad_line() -> None:
    servos, bus = simulated(Faults(np.random.default_rng(6), 0.3), retries=12)
    for servo_id in IDS:
        bus.write(servo_id, "Torque_Limit", 100 + servo_id)
    clean = ServoBus(SimPort(servos))
    assert clean.sync_read("Torque_Limit", IDS) == {servo_id: 100 + servo_id for servo_id in IDS}
