"""Settings: what is read, what is refused, and with which sentence (field record, row 47: keys dropped)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from so101 import config
from so101.config import option
from so101.errors import ConfigError

ROOT = Path(__file__).parent.parent


@dataclass
class Camera:
    index: int | str = option(0, "device number or path")
    fps: float = option(30.0, "frames per second")


@dataclass(frozen=True)
class Range:
    low: float = option(0.0, "lower end, m")
    high: float = option(1.0, "upper end, m")

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"low: got {self.low}, must be below high, {self.high}")


@dataclass
class Rig:
    port: str = option("sim", "serial port")
    fps: float = option(10.0, "control rate, Hz")
    cameras: dict[str, Camera] = option({"wrist": Camera()}, "cameras by name")
    height: Range = option(Range(0.02, 0.2), "height of the tool")
    spare: Range | None = option(None, "a second range")


@dataclass
class Config:
    rig: Rig = option(Rig(fps=20.0), "the arm")
    name: str = option("lift", "name of the run")
    actor_q: Literal["mean", "min"] = option("mean", "how critics are joined")
    seed: int | None = option(None, "seed of the run")
    fast: bool = option(False, "no waiting")
    offset: tuple[float, float] = option((0.0, 0.5), "x and y, m")
    widths: list[int] = option([256, 256], "layers")
    rates: tuple[float, ...] = option((), "any number of rates")
    free: dict[str, Any] = option({}, "whatever")


@dataclass
class Needy:
    data: str = option(help="folder of the dataset")


def read(data: Any, cls: Any = Config) -> Any:
    return config.from_dict(cls, data, "a.json")


def put(folder: Path, name: str, data: Any) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_defaults_are_copied_not_shared():
    first, second = Config(), Config()
    first.widths.append(1)
    first.rig.cameras["wrist"].fps = 1.0
    first.rig.fps = 1.0
    assert second.widths == [256, 256] and second.rig.cameras["wrist"].fps == 30.0 and second.rig.fps == 20.0


def test_values_are_converted_and_the_rest_keeps_the_parents_default():
    made = read({"rig": {"port": "x"}, "offset": [1, 2], "rates": [1], "seed": 3, "free": {"a": [None]}})
    assert made.rig.port == "x" and made.rig.fps == 20.0  # Config's own default for rig, not Rig's 10
    assert made.offset == (1.0, 2.0) and made.rates == (1.0,) and type(made.offset[0]) is float
    assert made.seed == 3 and made.free == {"a": [None]}
    assert read({"rig": {"spare": {"high": 3}}}).rig.spare == Range(0.0, 3.0)
    assert read({"rig": {"cameras": {"top": {}}}}).rig.cameras == {"top": Camera()}  # replaced, not merged


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"rig": {"fpz": 1}}, "a.json: unknown key 'rig.fpz'; did you mean 'fps'?"),
        ({"zzz": 1}, "a.json: unknown key 'zzz'; the keys here are rig, name, actor_q"),
        ({"seed": True}, "a.json: seed: got true, must be null or a whole number"),
        ({"seed": 1.0}, "a.json: seed: got 1.0, must be null or a whole number"),
        ({"fast": 1}, "a.json: fast: got 1, must be true or false"),
        ({"name": 3}, "a.json: name: got 3, must be text"),
        ({"name": None}, "a.json: name: got null, must be text"),
        ({"rig": None}, "a.json: rig: got null, must be an object or the path of a JSON file"),
        ({"rig": {"fps": "10"}}, 'a.json: rig.fps: got "10", must be a number'),
        ({"rig": {"fps": True}}, "a.json: rig.fps: got true, must be a number"),
        ({"rig": {"fps": float("nan")}}, "a.json: rig.fps: got NaN, must be a number"),
        ({"rig": {"fps": float("-inf")}}, "a.json: rig.fps: got -Infinity, must be a number"),
        ({"rig": {"fps": 10**400}}, "must be a number"),
        ({"actor_q": "max"}, 'a.json: actor_q: got "max", must be one of "mean", "min"'),
        ({"offset": [1]}, "a.json: offset: got [1], must be a list of 2: a number, a number"),
        ({"offset": 1}, "a.json: offset: got 1, must be a list of 2"),
        ({"widths": [1, "2"]}, 'a.json: widths[1]: got "2", must be a whole number'),
        ({"rig": {"cameras": {"top": {"fsp": 1}}}}, "unknown key 'rig.cameras.top.fsp'; did you mean 'fps'?"),
        ({"rig": {"cameras": {"top": {"index": None}}}}, "must be a whole number or text"),
        ({"rig": {"height": {"low": 5}}}, "a.json: rig.height.low: got 5.0, must be below high, 0.2"),
    ],
)
def test_refusals_say_where_what_and_what_is_allowed(data, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read(data)


def test_missing_required_value():
    with pytest.raises(ConfigError, match=r"a.json: data is missing: folder of the dataset"):
        read({}, Needy)
    with pytest.raises(ConfigError, match="data is missing"):
        config.parse(Needy, [], "")
    assert config.parse(Needy, ["data=here"], "").data == "here"


def test_a_string_for_an_object_is_a_file_relative_to_the_file_it_stands_in(tmp_path, monkeypatch):
    put(tmp_path, "rigs/real.json", {"port": "tty", "height": "../height.json"})
    put(tmp_path, "height.json", {"high": 0.5})
    main = put(tmp_path, "main.json", {"rig": "rigs/real.json", "seed": 1})
    monkeypatch.chdir("/")
    made = config.load(Config, main)
    assert made.rig.port == "tty" and made.rig.height == Range(0.02, 0.5) and made.rig.fps == 20.0

    put(tmp_path, "height.json", {"hihg": 0.5})
    with pytest.raises(ConfigError, match=r"height.json: unknown key 'rig.height.hihg'; did you mean 'high'"):
        config.load(Config, main)


def test_include_is_the_base_that_an_objects_own_keys_override(tmp_path):
    put(tmp_path, "base.json", {"seed": 1, "name": "base", "rig": {"port": "tty", "fps": 5}})
    made = config.load(Config, put(tmp_path, "b.json", {"name": "own", "include": "base.json", "rig": {"fps": 6}}))
    assert (made.seed, made.name, made.rig.port, made.rig.fps) == (1, "own", "tty", 6.0)


def test_a_circle_of_files_is_refused(tmp_path):
    put(tmp_path, "a.json", {"include": "b.json"})
    put(tmp_path, "b.json", {"include": "a.json"})
    with pytest.raises(ConfigError, match="circle"):
        config.load(Config, tmp_path / "a.json")
    twice = put(tmp_path, "twice.json", {"rig": {"height": "h.json", "spare": "h.json"}})  # no circle
    put(tmp_path, "h.json", {"high": 3})
    made = config.load(Config, twice)
    assert made.rig.spare == Range(0.0, 3.0) and made.rig.height == Range(0.02, 3.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": 1,\n "name" "x"}', "line 2 column 9"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' is given twice"),
        ("[1]", "must hold one JSON object"),
        ('{"seed": ' + "1" * 5000 + "}", "no usable JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, sentence):
    path = put(tmp_path, "bad.json", text)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        config.load(Config, path)
    assert str(caught.value).startswith(path)


def test_missing_file_names_who_asked_for_it(tmp_path):
    main = put(tmp_path, "main.json", {"rig": "no.json"})
    with pytest.raises(ConfigError, match=r"no.json: cannot be read: No such file .*asked for by 'rig' in .*main"):
        config.load(Config, main)


@dataclass
class Replay:
    dataset: str = option("demos", "the dataset's folder", positional=True)
    episodes: list[int] = option([], "which episodes", positional=True)
    import_: str | None = option(None, "a file")
    as_json: bool = option(False, "for a program")


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], Replay()),
        (["cubes", "3", "4"], Replay("cubes", [3, 4])),
        (["7", "--as-json", "3"], Replay("7", [3], as_json=True)),
        (["--import", "a=b.txt", "cubes"], Replay("cubes", import_="a=b.txt")),
        (["import=x", "dataset=cubes", "--episodes=[5]", "as_json=true"], Replay("cubes", [5], "x", True)),
    ],
)
def test_a_command_line_may_be_typed_as_people_type_it(words, expected):
    assert config.parse(Replay, words, "") == expected


def test_overrides_go_through_the_same_checks(tmp_path):
    made = config.parse(
        Config,
        [
            "rig.fps=5",
            "name=7",
            "actor_q=min",
            "seed=null",
            "fast=true",
            "rig.cameras.wrist.fps=15",
            "widths=[8]",
        ],
        "",
    )
    assert made.rig.fps == 5.0 and made.name == "7" and made.actor_q == "min" and made.seed is None
    assert made.fast is True and made.widths == [8]
    assert made.rig.cameras == {"wrist": Camera(0, 15.0)}
    assert config.parse(Config, ["rig.cameras.wrist.index=COM3"], "").rig.cameras["wrist"].index == "COM3"
    assert config.parse(Config, ["name=a=b"], "").name == "a=b"
    assert config.parse(Config, ['name="quoted"'], "").name == "quoted"
    rig = put(tmp_path, "rig.json", {"port": "tty"})
    made = config.parse(Config, [f"rig={rig}", "rig.fps=7"], "")  # the later word wins
    assert made.rig.port == "tty" and made.rig.fps == 7.0
    for words, sentence in [
        (["rig.fpz=5"], "command line: unknown key 'rig.fpz'; did you mean 'fps'?"),
        (["seed=true"], "command line: seed: got true"),
        (["seed.x=1"], "command line: seed: got "),
        (["rig.height.low=5"], "command line: rig.height.low: got 5.0, must be below high"),
        (["--rig.fpz=5"], "command line: unknown key 'rig.fpz'; did you mean 'fps'?"),
        (["--verbose"], "command line: unknown key 'verbose'"),
        (["--seed"], "command line: --seed needs a value"),
        (["-v"], "unknown argument '-v'"),
        (["words"], "unknown argument 'words'; it takes key=value"),
        (["--config"], "--config takes one file"),
        (["--config", "a", "--config=b"], "--config takes one file, got a and b"),
        (["=1"], "unknown key ''"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            config.parse(Config, words, "")


def test_saved_config_loads_back_equal(tmp_path):
    rig = put(tmp_path, "rig.json", {"port": "tty", "spare": {"high": 0.1 + 0.2}})
    words = [f"rig={rig}", "rates=[1, 2.5]", 'free={"a": 1}', "rig.cameras.top.index=/dev/video0"]
    made = config.parse(Config, words, "")
    config.save(made, tmp_path / "config.json")
    assert config.load(Config, tmp_path / "config.json") == made
    assert config.from_dict(Config, config.to_dict(made), "x") == made
    assert made.rig.spare == Range(0.0, 0.30000000000000004)
    config.save(Config(), tmp_path / "config.json")
    assert config.load(Config, tmp_path / "config.json") == Config()


def test_help_lists_every_field_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse(Config, ["--help"], "Does things.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, shown.splitlines())) <= 100
    flat = " ".join(shown.split())
    assert "rig.fps control rate, Hz (a number; default 20.0)" in flat
    assert "rig.cameras.<name>.fps frames per second (a number; default 30.0)" in flat
    assert 'actor_q how critics are joined (one of "mean", "min"; default "mean")' in flat
    assert "seed seed of the run (null or a whole number; default null)" in flat
    assert "rig.height.low lower end, m (a number; default 0.02)" in flat
    assert "rig.spare.low" in flat and "--config FILE" in flat


SCRIPT = """
import sys, time
from dataclasses import dataclass
from so101.config import launch, option
from so101.errors import HardwareError

@dataclass
class Config:
    do: str = option("nothing", "what to do")

def main(config):
    if config.do == "fail":
        raise HardwareError("servo 4 does not answer; check its cable")
    if config.do == "code":
        return 1
    if config.do == "bug":
        raise ValueError("a bug")
    if config.do == "pipe":
        raise BrokenPipeError("another pipe")
    if config.do == "talk":
        for _ in range(100000):
            print("a line of output")
    if config.do == "wait":
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            print("arm at rest", flush=True)

launch(Config, main, "A script.")
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script above with the words given; what is still running at the end is killed."""
    script = put(tmp_path, "script.py", SCRIPT)
    running = []

    def start_one(*words: str) -> "subprocess.Popen[str]":
        pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, script, *words], env=environment, stdout=pipe, stderr=pipe, text=True
        )
        running.append(process)
        return process

    yield start_one
    for process in running:
        with process:
            process.kill()


def test_exit_codes_and_sentences(start):
    words = {"": 0, "do=code": 1, "do=fail": 3, "don=t": 2, "do=bug": 1, "do=pipe": 1, "--help": 0}
    running = {word: start(*[word] * bool(word)) for word in words}
    errors = {word: process.communicate(timeout=30)[1] for word, process in running.items()}
    assert {word: process.returncode for word, process in running.items()} == words
    assert errors[""] == errors["do=code"] == errors["--help"] == ""
    assert errors["do=fail"] == "servo 4 does not answer; check its cable\n"
    assert errors["don=t"] == "command line: unknown key 'don'; did you mean 'do'?\n"
    assert errors["do=bug"].startswith("Traceback") and "ValueError: a bug" in errors["do=bug"]
    assert "BrokenPipeError: another pipe" in errors["do=pipe"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_and_a_lost_terminal_take_the_path_of_ctrl_c(start):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        process = start("do=wait")
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        begun = time.monotonic()
        out, error = process.communicate(timeout=10)
        assert (process.returncode, out, error) == (130, "arm at rest\n", "interrupted\n")
        assert time.monotonic() - begun < 5


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_traceback(start):
    process = start("do=talk")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 1
