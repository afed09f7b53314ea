"""What the README says of the code must stay true."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import eval_speed
import mirl
import train_finetune
import train_pretrain

README = (Path(__file__).parent.parent / "README.md").read_text()
SOURCE = (Path(__file__).parent.parent / "mirl.py").read_text().splitlines()
LINKS = re.findall(r"\[`([\w.]+)`\]\(mirl\.py#L(\d+)\)", README)


def line_of(name: str) -> int:
    """Where a class, function or constant, or a class's method, is defined."""
    line = 0
    for part in name.split("."):
        definition = rf"\s*(def|class) {part}\b|{part} = "
        line = next(i for i, s in enumerate(SOURCE, 1) if i > line and re.match(definition, s))
    return line


@pytest.mark.parametrize(("name", "line"), sorted(set(LINKS)))
def test_links_lead_to_the_code(name, line):
    assert int(line) == line_of(name)


def test_every_link_is_checked():
    assert len(LINKS) > 15 and README.count("mirl.py#L") == len(LINKS)


def test_the_flags_named_exist():
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    torchruns = {"--nproc-per-node", "--nnodes", "--max-restarts", "--help"}
    torchruns |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    scripts = (train_pretrain, train_finetune, eval_speed)
    fields = [f.name for script in scripts for f in dataclasses.fields(script.Args)]
    flags = {"--" + name.strip("_").replace("_", "-") for name in fields}
    study = (Path(__file__).parent.parent / "assets" / "depth_study.py").read_text()
    flags |= set(re.findall(r'add_argument\("(--[a-z]+)"', study))
    assert named - torchruns <= flags | {"--no-dense"}


def test_the_example_runs():
    """On a small model in place of ViT-B."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace('"vit_b"', '"vit_nano"').replace("224, 224", "32, 32")
    names = {}
    exec(code.replace("patch_size=16", "patch_size=4"), names)
    assert names["pictures"].shape == (8, 5, 3, 32, 32)
    assert isinstance(names["mae"], mirl.MIRL) and names["mae"].config.segments == 1
    assert torch.equal(names["encoder"].cls_token, names["model"].encoder.cls_token)
