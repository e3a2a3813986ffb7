"""Cues through real processes: fake speech and sound programs on the PATH that write down what they were given."""

import io
import os
import stat
import sys
import time
import wave
from dataclasses import fields

import numpy as np
import pytest

from so101.robot import sound, teleop
from so101.robot.sound import Cue, Sound, SoundConfig, tones
from so101.robot.teleop import TerminalKeys

POSIX = pytest.mark.skipif(os.name != "posix", reason="the fakes are shell scripts")
NOTED = Cue("success", "it's $(done); `rm`", (440, 880))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A PATH with nothing on it but the programs that a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def install(name, body):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return install, tmp_path


def wait_for(path, seconds=3.0):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.005)
    return path.read_text()


@POSIX
def test_the_words_reach_the_speech_program_as_one_argument_and_no_shell_sees_them(machine):
    install, folder = machine
    install(
        "spd-say", f'for word in "$@"; do echo "[$word]"; done > {folder}/part; /bin/mv {folder}/part {folder}/said'
    )
    heard = Sound(SoundConfig())
    heard.play(NOTED)
    assert wait_for(folder / "said") == "[--wait]\n[it's $(done); `rm`]\n"
    heard.close()
    assert not heard._thread.is_alive()


@POSIX
def test_notes_reach_the_player_as_a_wav_file_of_those_pitches(machine):
    install, folder = machine
    install(
        "aplay", f'/bin/cp "$2" {folder}/part.wav; echo "$1" > {folder}/part; /bin/mv {folder}/part {folder}/played'
    )
    heard = Sound(SoundConfig(speech=False))
    heard.play(NOTED)
    assert wait_for(folder / "played") == "-q\n"
    heard.close()
    assert (folder / "part.wav").read_bytes() == tones(NOTED.hertz)


def test_a_wav_file_holds_each_note_at_its_pitch_and_starts_and_ends_in_silence():
    with wave.open(io.BytesIO(tones((440, 880)))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
        rate = file.getframerate()
    assert len(samples) == round(2 * 0.12 * rate)
    for pitch, note in zip((440, 880), np.split(samples, 2), strict=True):
        spectrum = np.abs(np.fft.rfft(note * np.hanning(len(note))))
        assert np.fft.rfftfreq(len(note), 1 / rate)[spectrum.argmax()] == pytest.approx(pitch, abs=rate / len(note))
        assert abs(note[0]) < 100 and abs(note[-1]) < 1500  # no click: the peak is 9830


@POSIX
def test_a_cue_never_makes_the_control_loop_wait_and_one_that_comes_too_late_is_not_said(machine, monkeypatch):
    install, folder = machine
    monkeypatch.setattr(sound, "STALE_S", 0.2)
    install("say", f'echo "$1" >> {folder}/said; exec /bin/sleep 0.5')
    heard = Sound(SoundConfig(tones=False))
    began = time.monotonic()
    for word in ("first", "second", "third"):
        heard.play(Cue("start", word))
    assert time.monotonic() - began < 0.05  # a tick at 10 Hz is 0.1 s
    time.sleep(0.3)
    heard.close()
    assert (folder / "said").read_text() == "first\n"


@POSIX
def test_a_speech_program_that_hangs_is_ended_with_the_program(machine):
    install, folder = machine
    install("say", f"echo $$ > {folder}/part; /bin/mv {folder}/part {folder}/pid; exec /bin/sleep 60")
    heard = Sound(SoundConfig())
    heard.play(NOTED)
    pid = int(wait_for(folder / "pid"))
    heard.close()
    heard._thread.join(2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@POSIX
@pytest.mark.parametrize("body", ["exit 1", None])
def test_a_machine_that_cannot_speak_is_silent_and_raises_nothing(machine, body, capsys):
    install, folder = machine
    if body:
        install("espeak-ng", body)
    keys = TerminalKeys(Sound(SoundConfig()))
    (folder / "bin" / "espeak-ng").unlink(missing_ok=True)  # gone since it was looked for
    keys.hear(NOTED)
    keys.close()
    assert capsys.readouterr().out == "it's $(done); `rm`\n"  # what cannot be heard is still printed


@POSIX
def test_each_cue_has_a_switch_that_silences_it_alone(machine):
    install, folder = machine
    install("say", f'echo "$1" >> {folder}/said')
    cues = [cue for cue in vars(teleop).values() if isinstance(cue, Cue)]
    switches = {field.name for field in fields(SoundConfig)} - {"speech", "tones"}
    assert {cue.kind for cue in cues} == switches  # no cue without a switch, no switch without a cue
    heard = Sound(SoundConfig(tones=False, takeover=False))
    for cue in (teleop.SUCCESS, teleop.YOU_DRIVE, teleop.TIME_OUT):
        heard.play(cue)
    heard.close()
    assert (folder / "said").read_text() == "success\ntime out\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows beeps with its own sound")
def test_where_nothing_else_sounds_the_terminal_rings(machine, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    heard = Sound(SoundConfig())
    heard.play(NOTED)
    heard.close()
    assert capsys.readouterr().out == "\a"
