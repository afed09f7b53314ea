"""What the README says of the code must stay true."""

import operator
import re

import pytest
import torch
from conftest import ROOT

import eval_speed
import mirl
import train_finetune
import train_pretrain

README = (ROOT / "README.md").read_text()


def test_the_names_of_the_lesson_and_the_linked_files_exist():
    lesson = README.split("## The lesson")[1].split("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", lesson))
    assert len(names) > 7 and operator.attrgetter(*names)(mirl)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 5 and all((ROOT / link).exists() for link in links)


def test_the_flags_named_exist(capsys):
    torchruns = {"--help", "--nproc-per-node", "--nnodes", "--max-restarts"}
    torchruns |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    for script in (train_pretrain, train_finetune, eval_speed):
        with pytest.raises(SystemExit):
            script.parse(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    flags = {flag for line in lines for flag in re.findall(r"--[a-z][a-z-]+", line)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(flags) > 70 and named - torchruns <= flags


def test_the_example_runs():
    """On a small model in place of ViT-B."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace('"vit_b"', '"vit_nano"').replace("224, 224", "32, 32")
    names = {}
    exec(code.replace("patch_size=16", "patch_size=4"), names)
    assert names["pictures"].shape == (8, 5, 3, 32, 32)
    assert isinstance(names["mae"], mirl.MIRL) and names["mae"].config.segments == 1
    assert torch.equal(names["encoder"].cls_token, names["model"].encoder.cls_token)
