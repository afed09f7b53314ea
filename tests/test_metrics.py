"""Schedules and the log of a run."""

import argparse
import json
import math
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
from conftest import CPU, TINY, metrics, run

import common.metrics
import mirl
import train_pretrain
from common.metrics import MetricLogger, lr_factor


def test_schedules():
    """The cosine is in the plain loops of test_pretrain.py, but for its ends."""
    assert lr_factor(0, 120, 0) == lr_factor(9, 10, 10) == 1 and lr_factor(120, 120, 20) == 0
    steps, linear = (
        [lr_factor(k, 120, 20, kind) for k in range(120)] for kind in ("step", "linear")
    )
    rising = [(k + 1) / 20 for k in range(20)]
    assert linear == pytest.approx(rising + [1 - k / 100 for k in range(100)])
    assert steps == pytest.approx(rising + [1] * 60 + [0.1] * 30 + [0.01] * 10)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(common.metrics, "time", Mock(perf_counter=lambda: now[0]))

    def wait(seconds, result=None):
        now[0] += seconds
        return result

    return wait


def new_log(out, saved=(), tensorboard=False):
    """Of two epochs of five steps, each of two micro-batches of four images."""
    args = dict(out=str(out), epochs=2, batch_size=8, log_every=2, lr=1.0, tensorboard=tensorboard)
    log = MetricLogger(argparse.Namespace(**args, dtype="auto", model="m"), 43, 4, 2)
    log.start(dict(saved), mirl.build_vit("vit_nano"), CPU)
    return log


def train(log, clock):
    """An epoch whose loop waits 1 s for each micro-batch and computes for 3 s."""
    log.start_epoch(log.step // 5 + 1)
    for i in log.timed(clock(1.0, i) for i in range(10)):
        log.add(loss=torch.tensor(float(i)), term=torch.tensor(2.0 * i))
        clock(3)
        if i % 2:
            log.end_step(0.5, torch.tensor(1.0) if log.due else None, grads=torch.tensor([i, 2.0]))


def test_a_log_tells_means_speed_and_waiting(tmp_path, clock, capsys):
    log = new_log(tmp_path)
    for _ in range(2):
        train(log, clock)
        trained = log.trained(nn.Linear(1, 1))
        clock(7)  # an evaluation
        log.end_epoch(trained, top1=50.0, miou=math.nan)
    steps, epochs = metrics(tmp_path, "step"), metrics(tmp_path, "epoch")
    # five steps an epoch: the count goes on, and an epoch's last step is logged
    assert [m["step"] for m in steps] == [2, 4, 5, 6, 8, 10]
    found = [(m["loss"], m["term"], m["grads"]) for m in steps[:3]]
    assert found == [(1.5, 3, [3, 2]), (5.5, 11, [7, 2]), (8.5, 17, [9, 2])]
    # eight images in 2 · (1 + 3) seconds
    usual = dict(images_per_second=1, input_wait=0.25, lr=0.5, grad_norm=1)
    assert all(m | usual == m for m in steps)
    usual = dict(loss=4.5, term=9, top1=50, miou=None, images_per_second=1, seconds=47)
    assert all(m | usual == m for m in epochs)
    settings = json.loads((tmp_path / "config.json").read_text())
    usual = dict(dtype="float32", device="cpu", accumulation=2, batch_size=8)
    assert settings | usual == settings and settings["model_config"]["width"] == 96
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "43 images, 5 steps an epoch" in first and "x 4 images x 2 accumulated" in first
    assert second == "epoch 1/2  step 2/10  loss 1.5000  lr 5.00e-01  1 img/s  01:04 left"


def test_a_log_that_is_gone_begins_anew(tmp_path):
    log = new_log(tmp_path, dict(epoch=1, history=[dict(loss=1)], written=99))
    assert log.path.read_bytes() == b"" and log.step == 5 and log.history == [dict(loss=1)]


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch, clock):
    """The package is an optional extra: something that takes every call stands in for it."""
    package = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    log = new_log(tmp_path, dict(epoch=1, history=[], written=0), tensorboard=True)
    package.SummaryWriter.assert_called_once_with(tmp_path / "tensorboard", purge_step=6)
    train(log, clock)
    add = package.SummaryWriter.return_value.add_scalar
    for m in metrics(tmp_path, "step"):
        add.assert_any_call("step/term", m["term"], m["step"])
    assert not any("grads" in call.args[0] for call in add.call_args_list)


def test_tensorboard_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert run(train_pretrain, *TINY, "--out", tmp_path / "run", "--tensorboard") == 2
    assert "needs tensorboard: pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
