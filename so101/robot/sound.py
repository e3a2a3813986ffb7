"""Cues: what the program tells the person, printed always, and spoken and sounded where the machine can.

A cue never raises and never makes the control loop wait: a thread of its own runs the machine's speech and
sound programs. What it could not say in time it drops, because a late cue is a wrong one.
"""

import io
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import wave
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from so101.config import option

if sys.platform == "win32":
    import winsound

TEXT = "{text}"  # stands for the cue's words in a command
# PowerShell would take words among its arguments for a command, so they come on its standard input.
READ_ALOUD = (
    "Add-Type -AssemblyName System.Speech; "
    "(New-Object System.Speech.Synthesis.SpeechSynthesizer).Speak([Console]::In.ReadToEnd())"
)
SPEAKERS = (
    ["say", TEXT],
    ["spd-say", "--wait", TEXT],
    ["espeak-ng", TEXT],
    ["powershell", "-NoProfile", "-Command", READ_ALOUD],
)
PLAYERS = (["afplay"], ["aplay", "-q"], ["paplay"])
SAMPLE_RATE = 16_000
NOTE_S, FADE_S = 0.12, 0.01  # the fade keeps a note from clicking
STALE_S = 4.0  # a cue that had to wait longer is not said
LONGEST_S = 10.0  # a speech program that takes longer hangs


class Cue(NamedTuple):
    """One thing to tell the person."""

    kind: str  # the SoundConfig switch it belongs to
    text: str
    hertz: tuple[int, ...] = ()  # its notes, one after the other

    def about(self, what: object) -> "Cue":
        """The same cue with `what` in its text's place for it."""
        return self._replace(text=self.text.format(what))


@dataclass
class SoundConfig:
    """Which cues are heard. All of them are printed."""

    speech: bool = option(True, "speak the cues, through say, spd-say, espeak-ng or PowerShell, whichever is there")
    tones: bool = option(True, "play a few notes with each cue, or the terminal's bell where nothing else sounds")
    task: bool = option(True, "what the next episode is")
    reset: bool = option(True, "the arm has gone home: place the object")
    start: bool = option(True, "an episode begins")
    success: bool = option(True, "an episode ended in success")
    failure: bool = option(True, "an episode ended in failure")
    time_out: bool = option(True, "an episode ended because its time was up")
    takeover: bool = option(True, "who drives from now on")
    pause: bool = option(True, "the next episode waits, or waits no longer")
    dropped: bool = option(True, "an episode was not kept")
    fault: bool = option(True, "the arm was stopped")


class Sound:
    """Says cues in the order in which they come."""

    def __init__(self, config: SoundConfig) -> None:
        self.config = config
        self._speaker = _installed(SPEAKERS) if config.speech else None
        self._player = _installed(PLAYERS) if config.tones else None
        self._running: subprocess.Popen[bytes] | None = None
        self._cues: queue.SimpleQueue[tuple[float, Cue] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="sound", daemon=True)
        self._thread.start()

    def play(self, cue: Cue) -> None:
        """Say it as soon as what came before is said; returns at once."""
        if getattr(self.config, cue.kind):
            self._cues.put((time.monotonic(), cue))

    def close(self) -> None:
        """Let what is being said end, for two seconds at most."""
        self._cues.put(None)
        self._thread.join(2.0)
        running = self._running
        if running is not None and self._thread.is_alive():
            running.kill()

    def _work(self) -> None:
        while (waiting := self._cues.get()) is not None:
            asked, cue = waiting
            if time.monotonic() - asked > STALE_S:
                continue
            with suppress(OSError, RuntimeError, subprocess.SubprocessError):  # silence must not stop an arm
                self._sound(cue)
                if self._speaker is not None:
                    self._run([cue.text if word is TEXT else word for word in self._speaker], cue.text.encode())

    def _sound(self, cue: Cue) -> None:
        """Play the cue's notes, or ring the bell where this machine has neither notes nor words."""
        if not self.config.tones or not cue.hertz:
            return
        if sys.platform == "win32":
            winsound.PlaySound(tones(cue.hertz), winsound.SND_MEMORY)
        elif self._player is not None:
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                file.write(tones(cue.hertz))
                file.flush()
                self._run([*self._player, file.name], b"")
        elif self._speaker is None and sys.stdout.isatty():
            print("\a", end="", flush=True)

    def _run(self, command: list[str], given: bytes) -> None:
        quiet = subprocess.DEVNULL
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        try:
            self._running.communicate(given, timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()
        self._running = None


def tones(hertz: tuple[int, ...]) -> bytes:
    """A mono 16-bit WAV file of the notes, one after the other."""
    seconds = np.arange(round(NOTE_S * SAMPLE_RATE)) / SAMPLE_RATE
    loudness = 0.3 * np.minimum(1, np.minimum(seconds, NOTE_S - seconds) / FADE_S)
    notes = np.concatenate([loudness * np.sin(2 * np.pi * pitch * seconds) for pitch in hertz])
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        sound.writeframes((notes * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _installed(commands: tuple[list[str], ...]) -> list[str] | None:
    """The first of the commands whose program this machine has."""
    return next((command for command in commands if shutil.which(command[0])), None)
