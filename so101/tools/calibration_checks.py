"""Whether a calibration is right: against a tape measure, and against the other arm. Modes of tools.calibrate."""

import numpy as np

from so101.robot.arm import Arm
from so101.robot.kinematics import forward
from so101.runlog import table
from so101.schema import ARM_JOINTS
from so101.tools.ask import ask, until_enter

POSES = (
    "stretched far forward, the fingertips on the table",
    "folded back, the fingertips on the table close to the base",
    "turned well to one side, the gripper pointing down on the table",
)
PAN_AXIS_CM = 3.9  # of the shoulder's turning axis ahead of the base frame's origin
RULER_TOLERANCE_CM = 1.5  # along each axis; a tape and a good calibration agree to about 1
MIRROR_TOLERANCE_DEG = 5.0  # poses that a person made equal agree to about 3


def ruler_test(arm: Arm) -> bool:
    """Whether the tool of a limp arm is where a person measures it to be, in each of three poses."""
    print("Measure to the point between the fingertips: x forward from the shoulder's turning axis, y sideways")
    print("from the line straight ahead of it, z up from the table.")
    failed = 0
    for pose in POSES:
        measured = _three_numbers(ask(f"Put the arm {pose}. Measure it there, and type x y z in cm:"))
        while measured is None:
            measured = _three_numbers(ask("Three numbers with spaces between them, in cm:"))
        tool = 100 * forward(arm.read().position)[0] - [PAN_AXIS_CM, 0, 0]
        tool[1], measured[1] = abs(tool[1]), abs(measured[1])
        off = tool - measured
        wrong = bool((np.abs(off) > RULER_TOLERANCE_CM).any())
        failed += wrong
        rows = [["computed", *tool.round(1)], ["measured", *measured], ["difference", *off.round(1)]]
        print(table(["cm", "x", "|y|", "z"], rows), "too far off" if wrong else "good", sep="\n")
    if not failed:
        print(f"good: all {len(POSES)} poses are where they were measured")
    else:
        print(
            f"failed: {failed} of {len(POSES)} poses are more than {RULER_TOLERANCE_CM} cm off. Calibrate again, each "
            f"joint from stop to stop; if that does not help, a part is mounted turned against its joint"
        )
    return not failed


def mirror_test(name: str, arm: Arm, other_name: str, other: Arm) -> bool:
    """Whether two limp arms that a person holds in the same pose say so, joint by joint."""
    difference = np.zeros(len(ARM_JOINTS))

    def look() -> str:
        here, there = (np.degrees(each.read().position[:5]) for each in (arm, other))
        difference[:] = here - there
        columns = np.round([here, there, difference], 1)
        return table(["degrees", name, other_name, "difference"], list(zip(ARM_JOINTS, *columns, strict=True)))

    print("Hold both arms in the same pose, and press Enter.", flush=True)
    until_enter(look)
    apart = [
        f"{joint} by {d:+.1f}" for joint, d in zip(ARM_JOINTS, difference, strict=True) if abs(d) > MIRROR_TOLERANCE_DEG
    ]
    if apart:
        print(f"failed: the arms differ in {', '.join(apart)} degrees. Calibrate both again, from stop to stop")
    else:
        print(f"good: no joint is more than {MIRROR_TOLERANCE_DEG:g} degrees apart")
    return not apart


def _three_numbers(text: str) -> np.ndarray | None:
    try:
        numbers = np.array([float(word) for word in text.replace(",", " ").split()])
    except ValueError:
        return None
    return numbers if len(numbers) == 3 else None
