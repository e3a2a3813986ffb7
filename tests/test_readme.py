"""What the README quotes and names is what the programs say and take."""

import re
from pathlib import Path

import pytest

import infer
import label
import record
import train_reward
import train_sac
from so101.config import flat, to_dict

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("so101/**/*.py")])
TROUBLES = README[README.index("## Troubleshooting") :].split("\n## ")[0]
SAYINGS = [words for row in re.findall(r"^\| (`.*?) \|", TROUBLES, re.M) for words in re.findall("`([^`]+)`", row)]


def test_there_are_sayings():
    assert len(SAYINGS) > 15


@pytest.mark.parametrize("words", SAYINGS)
def test_the_programs_say_what_the_readme_quotes(words):
    assert words in SOURCES


@pytest.mark.parametrize("script", [record, label, train_reward, train_sac, infer])
def test_the_scripts_take_the_settings_of_the_readme(script):
    leaves = flat(to_dict(script.Config()))
    known = {".".join(name.split(".")[:depth]) for name in leaves for depth in range(1, 5)}
    used = {
        setting
        for line in re.findall(rf"python {script.__name__}\.py (.*?)(?:  |`|$)", README, re.M)
        for setting in re.findall(r"(?:^| )([a-z_.]+)=", line)
    }
    assert used <= known


def test_the_tools_of_the_readme_are_there():
    for tool in set(re.findall(r"so101\.tools\.([a-z_]+)", README)):
        assert (ROOT / "so101" / "tools" / f"{tool}.py").exists(), tool


def test_the_pictures_are_there():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
