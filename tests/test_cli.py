"""The command line, how a script ends, devices and processes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import CPU, ROOT, TINY, refused, start, succeed, write_images

import train_pretrain
from common import checkpoint, cli, distributed
from mirl import UserError


def test_recipes_and_help(capsys):
    """Those of fine-tuning are in test_finetune.py and test_tasks.py."""
    args = train_pretrain.parse(["--recipe", "imagenet", "--epochs", "800", "--method", "mae"])
    assert (args.epochs, args.batch_size, args.model) == (800, 4096, "vit_b")
    assert args.lr == pytest.approx(1.5e-4 * 16) and args.out == "runs/mae-imagenet"
    with pytest.raises(SystemExit):
        train_pretrain.parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images; quick 15; cifar10 200" in printed


def test_how_a_script_ends(capsys, monkeypatch):
    class Lost(UserError):
        exit_code = 1

    def ends(error):
        with pytest.raises(SystemExit) as stop:
            cli.run_script(Mock(side_effect=error))
        return stop.value.code, capsys.readouterr().err

    full = RuntimeError("Traceback …\nCUDA out of memory. Tried to allocate 2 GiB")
    for error, code, told in (
        (UserError("No."), 2, "No."),
        (Lost("Lost."), 1, "Lost."),
        (OSError(""), 2, "OSError('')"),
        (UserError("Traceback …\nmirl.UserError: In a worker."), 2, "In a worker."),
        (full, 1, "the memory does not suffice: lower the (device) batch size"),
    ):
        assert ends(error) == (code, f"error: {told}\n")
    assert ends(KeyboardInterrupt())[0] == 130
    with pytest.raises(RuntimeError, match="a bug"):
        ends(RuntimeError("a bug"))
    monkeypatch.setattr(cli, "LOCAL_RANK", 1)
    monkeypatch.setattr(cli, "time", Mock())
    assert ends(UserError("No.")) == (2, "error: process 0: No.\n")
    assert cli.time.sleep.called


def test_a_log_that_cannot_write_every_name(tmp_path):
    write_images(tmp_path / "猫", 10)
    (tmp_path / "猫" / "é.png").touch()
    training = [f"--data={tmp_path}/猫", f"--out={tmp_path}/ö", "--workers=0", *TINY]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii")
    for flags, expected in ((["--help"], r"IMAGE\u2026"), (training, r"\u732b/\xe9.png cannot")):
        command = [sys.executable, ROOT / "train_pretrain.py", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    assert (tmp_path / "ö" / "encoder.pt").exists()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", 2), ("RANK", 3)])
def test_an_environment_that_is_torchruns_in_part(monkeypatch, name, value):
    monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, name, value)
    message = "of RANK, WORLD_SIZE, .* some are not set: start with torchrun"
    refused(distributed.process_group("cpu").__enter__, message=message)


def test_what_precision_a_gpu_gets(monkeypatch):
    device, capability = torch.device("cuda"), Mock(return_value=(8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert distributed.pick_dtype("auto", device) == torch.bfloat16
    assert distributed.pick_dtype("auto", CPU) == torch.float32
    capability.return_value = (7, 5)
    assert distributed.pick_dtype("auto", device) == torch.float32
    assert distributed.pick_dtype("fp16", device) == torch.float16
    refused(distributed.pick_dtype, "bf16", device, message="--dtype bf16: this GPU has no bf16")


def test_which_device(monkeypatch):
    here = Mock(is_available=Mock(return_value=False))
    monkeypatch.setattr(torch, "accelerator", here)
    assert distributed.pick_device("auto") == CPU
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    here.is_available.return_value = True
    here.current_accelerator.return_value = torch.device("mps")  # of which there is one
    assert distributed.pick_device("auto") == CPU
    for flag in ("cuda:1", "mps"):
        refused(distributed.pick_device, flag, message=f"--device {flag}: use auto, cuda, cpu$")


def in_each_of_two_processes(folder):
    rank = distributed.RANK
    with distributed.process_group("cpu"):
        with distributed.rank_zero_first():
            there = Path(folder, "downloaded").exists()
            time.sleep(0.3 * (rank == 0))
            Path(folder, "downloaded").touch()
        assert distributed.gather((rank, there)) == [(0, False), (1, True)]
        # each has its own buffers, until they are shared
        norm = torch.nn.BatchNorm1d(2, momentum=0.5)
        parallel = distributed.data_parallel(norm, CPU)
        for _ in range(2):
            parallel(torch.full((4, 2), 8.0 * rank))
        assert distributed.gather(norm.running_mean.tolist()) == [[0, 0], [6, 6]]
        distributed.share_buffers(norm)
        assert distributed.gather(norm.running_mean.tolist()) == [[0, 0], [0, 0]]
        # only the first node sees the run that is to be continued
        own = Path(folder, f"node-{rank}")
        own.mkdir()
        if rank == 0:
            torch.save(dict(identity={}, epoch=1), own / "checkpoint.pt")
        message = f"--out {own} must be shared by all nodes"
        refused(checkpoint.resume, str(own), {}, dict(epochs=2), message=message)


def test_what_processes_do_together(tmp_path):
    succeed(start(f"import test_cli; test_cli.in_each_of_two_processes({str(tmp_path)!r})", 2))
