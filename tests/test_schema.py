"""The one definition of action, state and image, and the sentences that refuse another one."""

import pytest

from so101 import config, schema
from so101.errors import ConfigError, DataError
from so101.schema import Preprocess


def test_state_has_18_entries_each_with_a_floor():
    # 6 positions, 6 velocities, tool x y z, tool roll pitch yaw
    assert len(schema.STATE) == len(set(schema.STATE)) == len(schema.STATE_FLOOR) == 18
    assert all(floor > 0 for floor in schema.STATE_FLOOR)
    assert schema.ACTION == ("delta_x", "delta_y", "delta_z", "gripper")
    assert (schema.STATE[0], schema.STATE[schema.OPENING]) == ("shoulder_pan.pos", "gripper.pos")
    assert schema.STATE[6] == "shoulder_pan.vel" and schema.STATE[schema.TOOL_Z] == "tool.z"
    assert schema.STATE[schema.TOOL_XYZ] == ("tool.x", "tool.y", "tool.z")


def test_image_size_84_is_refused_when_the_config_is_read(tmp_path):
    path = tmp_path / "reward.json"
    path.write_text('{"image_size": 84}')
    with pytest.raises(ConfigError, match=r"reward.json: image_size: got 84, must be a multiple of 32") as caught:
        config.load(Preprocess, path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("size", [-32, 0, 16, 100])
def test_other_image_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"image_size: got {size}, must be a multiple of 32"):
        Preprocess(image_size=size)


@pytest.mark.parametrize("crop", [[0, 0, 480], [-1, 0, 480, 480], [0, 0, 0, 480], [0, 0, 480, 480, 3]])
def test_crops_that_make_no_sense_are_refused(crop):
    with pytest.raises(ConfigError, match="must be .top, left, height, width. in pixels, or null"):
        Preprocess(crop=crop)


def described(**changes):
    values = {"cameras": ["wrist"], "fps": 10.0, "action_scale": 0.02, "gripper_step": 0.5}
    return schema.describe(**{"preprocess": Preprocess(), **values, **changes})


def test_require_same_passes_the_same_and_names_what_differs():
    schema.require_same(described(), described(), "outputs/lift")
    other = described(fps=30.0, preprocess=Preprocess(crop=None))
    with pytest.raises(DataError) as caught:
        schema.require_same(other, described(), "outputs/lift")
    sentence = str(caught.value)
    assert sentence.startswith("outputs/lift: ") and caught.value.exit_code == 4
    assert "fps is 30.0 there, 10.0 here" in sentence
    assert "'crop': None" in sentence and "[0, 80, 480, 480]" in sentence
    assert "gripper_step" not in sentence and "cameras" not in sentence


def test_require_same_notices_an_entry_that_only_one_side_has():
    more, less = described(), described()
    del less["units"]
    for stored, wanted in ((more, less), (less, more)):
        with pytest.raises(DataError, match="units is .*None"):
            schema.require_same(stored, wanted, "x")


def test_hash_follows_the_content_not_the_order():
    forward = described()
    backward = dict(reversed(forward.items()))
    assert schema.schema_hash(forward) == schema.schema_hash(backward)
    assert schema.schema_hash(forward) != schema.schema_hash(described(gripper_step=0.25))
