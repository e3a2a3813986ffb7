"""Who may import whom, and which packages: read from the source, so that a lazy import counts as well."""

import ast
import re
import sys
from pathlib import Path

import pytest

import so101

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "so101").rglob("*.py")) + sorted(ROOT.glob("*.py"))

BASE = {
    "config", "schema", "images", "timing", "runlog", "plots", "errors", "files", "signals", "monitor", "tensorboard"
}  # fmt: skip
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    **{layer: BASE | {layer} for layer in ("robot", "data", "learn")},
    **{layer: BASE | {"robot", layer} for layer in ("sim", "env")},
    "rig": BASE | {"robot", "sim", "env"},
    "episodes": BASE | {"data", "learn"},
    "learner": BASE | {"data", "learn", "episodes"},
    "actor": BASE | {"data", "learn", "episodes", "env"},
    "runfolder": BASE | {"data", "learn"},
    "processes": BASE,
}  # tools, web and the scripts may import everything
PACKAGES = {"torch", "numpy", "serial", "cv2", "av", "pyarrow"}
NEVER = {
    "robot": {"torch", "av", "pyarrow"},
    "sim": {"torch", "av", "pyarrow"},
    "data": {"torch", "serial"},
    "learn": {"serial", "cv2", "av", "pyarrow"},
    **dict.fromkeys(BASE, {"torch", "serial", "av", "pyarrow"}),
}
DRAWS = {"images", "plots"}  # the base modules that import cv2, and so are closed to learn


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "so101" else "script"


def imported(path: Path) -> set[str]:
    """Every module named by an import, wherever it stands: `so101.data.video`, `numpy`, ..."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its layer; write so101."
            module = node.module or ""
            names |= {f"so101.{alias.name}" for alias in node.names} if module == "so101" else {module}
    return names


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_keep_to_the_layers(path):
    layer, names = layer_of(path), imported(path)
    inside = {name.split(".")[1] for name in names if name.startswith("so101.")}
    outside = {name.split(".")[0] for name in names} - {"so101"} - set(sys.stdlib_module_names)
    scripts = {file.stem for file in ROOT.glob("*.py")} if layer in ("tools", "web", "script") else set()
    assert inside <= MAY_IMPORT.get(layer, inside), f"{layer} may not import {inside - MAY_IMPORT[layer]}"
    assert outside <= PACKAGES | scripts, f"not on the list of packages: {outside - PACKAGES}"
    assert not outside & NEVER.get(layer, set()), f"{layer} must never import {outside & NEVER[layer]}"
    assert layer != "learn" or not inside & DRAWS, f"learn must not import cv2 through {inside & DRAWS}"


def test_only_the_rig_knows_the_port_of_the_simulation():
    rig = ROOT / "so101" / "rig.py"
    if not rig.exists():
        pytest.skip("so101/rig.py is not there")
    knows = {
        path
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == "sim"
    }
    assert knows == {rig}


def test_the_order_to_read_in_names_files_that_are_there():
    steps = re.split(r"^\d\. ", so101.__doc__ or "", flags=re.MULTILINE)[1:]
    assert len(steps) == 9
    for step in steps:
        folder = re.match(r"(\w+)/:", step)
        places = [ROOT / "so101" / (folder[1] if folder else ""), ROOT / "so101", ROOT]
        for name in re.findall(r"\w+\.py|\w+/", step):
            assert any((place / name).exists() for place in places), f"{name} of {step}"
