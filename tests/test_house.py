"""How the files hang together: who imports whom, and that mirl.py stands alone."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

PATHS = sorted([*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tasks/*.py")])
OURS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
# what a room may import of ours; a script imports all three rooms, and no script
ROOMS = dict(mirl=set(), common={"mirl", "common"}, tasks={"mirl", "common", "tasks"})
PACKAGES = {"torch", "torchvision", "einops", "tqdm", "numpy", "PIL"}


def room(module):
    return module.split(".")[0]


def imports(module):
    """What a file of ours imports: {module: whether at its top}."""
    tree, found = ast.parse(OURS[module].read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]  # from common import x
            names = [name for name in inner if name in OURS] or [node.module]
        found |= {name: node in tree.body or found.get(name, False) for name in names}
    return found


@pytest.mark.parametrize("module", OURS)
def test_what_a_module_imports(module):
    """Nothing upwards; at its top no packages that few need; not itself by way of others."""
    rooms = {room(name) for name in imports(module)} & {room(name) for name in OURS}
    assert rooms <= ROOMS.get(room(module), {*ROOMS})
    needed = {"torch", "torchvision", "einops"} if module == "mirl" else PACKAGES
    tops = {room(name) for name, top in imports(module).items() if top}
    assert tops <= needed | {*ROOMS} | sys.stdlib_module_names
    seen, ahead = set(), [module]
    while ahead:
        new = {name for name in imports(ahead.pop()) if name in OURS} - seen
        seen |= new
        ahead += new
    assert module not in seen


ALONE = """
import sys
sys.path.insert(0, ".")
import mirl, torch, torchvision

images, model = torch.randn(4, 3, 32, 32), mirl.build_mirl("vit_nano")
out = model(images)
out.loss.backward()
vit = mirl.build_vit("vit_nano", num_classes=10)
vit.load_state_dict(model.encoder.state_dict(), strict=False)
assert vit(images).shape == (4, 10)
picture = torchvision.utils.make_grid(mirl.panels(images, out, 4).flatten(0, 1), nrow=5, padding=0)
torchvision.utils.save_image(picture, "picture.png")
"""


def test_mirl_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "mirl.py", tmp_path)
    command = [sys.executable, "-I", "-c", ALONE]  # -I: without PYTHONPATH
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (5 * 32, 4 * 32)
