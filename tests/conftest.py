"""What several test files need."""

import functools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

import mirl
import train_finetune

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CPU = torch.device("cpu")
# two epochs of four steps on the small shapes, or on as many files
TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--log-every", "2"]
TINY += ["--device", "cpu"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
make_shapes = functools.cache(mirl.make_shapes)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The embedded data set with 33 images for 10,000: the scripts then take seconds."""
    monkeypatch.setattr(mirl, "make_shapes", lambda count, seed: make_shapes(33, seed))


def run(script, *flags):
    """A script in this process; its exit code."""
    try:
        mirl.run_script(script.main, [str(flag) for flag in flags])
    except SystemExit as stop:
        return stop.code
    return 0


def finetuned(*flags):
    """The model that the fine-tuning script makes of --from, and its classes."""
    args = train_finetune.parse([str(flag) for flag in flags])
    return train_finetune.finetuned_model(train_finetune.TASKS[args.task](args, CPU))


def with_tests_on_path():
    """The environment of a process that imports from the project and from its tests."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def metrics(out, kind):
    """The records of a run's log: of kind "step" or "epoch"."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def write_images(folder, count=33, seed=0):
    """The first small shapes as files 000.png, 001.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(make_shapes(33, seed).images[:count]):
        save_image(image / 255, folder / f"{i:03d}.png")
    return folder
