"""eval_speed.py: what it counts, and that it reports what it measured."""

import dataclasses
import functools
import importlib.util
import json
import re

import bench_peers
import pytest
import torch
import torch.nn as nn
from conftest import CPU, ROOT, TORCHRUN, launch, needs_gpu, run

import eval_speed
import mirl

QUICK = ["--models", "vit_nano", "--device", "cpu", "--windows", "2", "--seconds", "0"]
QUICK += ["--batch-size", "2"]
speed = functools.partial(run, eval_speed, *QUICK)


def vit_nano(batch_size):
    config = mirl.model_config("vit_nano")
    return eval_speed.Case("vit_nano", config, lambda: mirl.ViT(config), batch_size)


@pytest.mark.parametrize(
    ("name", "params", "macs", "with_attention"),
    [
        ("vit_s", 21.98, 4.24, 4.60),
        ("vit_s_54", 96.50, 18.88, 20.49),
        ("vit_b", 86.42, 16.85, 17.56),
        ("vit_b_24", 171.47, 33.58, 35.01),
        ("vit_b_48", 341.58, 67.04, 69.91),
    ],
)
def test_multiply_adds_are_those_of_table_4(name, params, macs, with_attention):
    with torch.device("meta"):
        counted = eval_speed.count(mirl.build_vit(name), torch.empty(1, 3, 224, 224), "infer")
    assert round(counted["params"] / 1e6, 2) == params
    assert round(counted["macs"] / 1e9, 2) == macs
    assert round(counted["macs_with_attention"] / 1e9, 2) == with_attention


@pytest.mark.parametrize(("mode", "embedded"), [("finetune", 64), ("pretrain", 16)])
def test_a_training_step_computes_everything_three_times_but_the_images_gradient(mode, embedded):
    model = eval_speed.build("vit_nano", mode, "mirl")
    counted = eval_speed.count(model, torch.randn(1, 3, 32, 32), mode)
    patches = embedded * 48 * 96  # embedded forward, and for the weights' gradient
    assert counted["step_macs"] == 3 * counted["macs_with_attention"] - patches
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"], ["--dtype", "bf16", "--no-autocast"]])
@pytest.mark.parametrize("mode", ["infer", "finetune", "pretrain"])
def test_the_table_and_the_json_agree(tmp_path, capsys, mode, dtype):
    path = tmp_path / "speed.json"
    assert speed("--mode", mode, "--batch-size", 2, 3, "--json", path, *dtype) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert result["mode"] == mode and f"mode {mode}" in lines[0]
    assert result["dtype"] == ("bfloat16" if dtype else "float32")
    headings = re.split(r"\s{2,}", lines[1].strip())
    for line, row in zip(lines[2:], result["rows"], strict=True):
        shown = dict(zip(headings, re.split(r"\s{2,}", line.strip()), strict=True))
        assert shown["model"] == row["model"] == "vit_nano" and int(shown["depth"]) == 6
        assert int(shown["batch"]) == row["batch_size"]
        assert float(shown["img/s"]) == pytest.approx(row["images_per_second"], abs=0.006)
    assert [row["batch_size"] for row in result["rows"]] == [2, 3]


def test_windows_are_timed_and_interleaved(monkeypatch):
    """Two cases, three windows: the clock is advanced by hand, each call taking longer."""
    now, calls = [0.0], []
    monkeypatch.setattr(eval_speed.time, "perf_counter", lambda: now[0])

    def step(label):
        calls.append(label)
        now[0] += len(calls)

    cases = [dataclasses.replace(vit_nano(4), label=label, seconds=[]) for label in "ab"]
    for case in cases:
        case.step = lambda label=case.label: step(label)
        case.row["step_macs"] = 10**12
    args = eval_speed.parse([*QUICK, "--windows", "3"])
    eval_speed.measure(cases, args, CPU)
    assert "".join(calls) == "baabba"
    row, other = (eval_speed.result(case, args, 8.0) for case in cases)  # 2, 3, 6 and 1, 4, 5 s
    assert (row["highest"], row["images_per_second"], row["lowest"]) == (2, 4 / 3, 4 / 6)
    assert (other["highest"], other["images_per_second"], other["lowest"]) == (4, 1, 4 / 5)
    assert row["tflops"] == pytest.approx(2 * 4 / 3)
    assert row["of_matrix_product"] == pytest.approx(1 / 3)


def test_running_out_of_memory_is_reported_and_survived(tmp_path, capsys, monkeypatch):
    original = eval_speed.whole_step

    def full_above_four(model, args, images, dtype):
        if len(images) > 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you …")
        return original(model, args, images, dtype)

    monkeypatch.setattr(eval_speed, "whole_step", full_above_four)
    assert speed("--batch-size", 8, 4, "--json", tmp_path / "speed.json") == 0
    assert "out of memory" in capsys.readouterr().out.splitlines()[2]
    eight, four = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert eight["error"] == "out of memory" and "images_per_second" not in eight
    assert four["images_per_second"] > 0 and "error" not in four
    # and the largest that fits
    case = vit_nano(0)
    args = eval_speed.parse(QUICK)
    assert eval_speed.largest_that_fits(case, args, CPU, torch.float32)
    assert case.batch_size == 4 and case.step


@pytest.mark.parametrize("mode", ["infer", "pretrain"])
def test_two_processes_add_up(tmp_path, mode):
    path = tmp_path / "speed.json"
    done = launch(*TORCHRUN, ROOT / "eval_speed.py", *QUICK, "--mode", mode, "--json", path)
    result = json.loads(path.read_text())
    [row] = result["rows"]
    assert result["processes"] == 2 and len(row["per_process"]) == 2
    assert sum(row["per_process"]) == pytest.approx(row["images_per_second"])  # of two windows
    assert ("scaling" in row) == (mode == "pretrain")
    assert done.stdout.count("vit_nano") == 1


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--mode", "pretrain", "--compile", "default"]])
def test_on_a_gpu(tmp_path, flags):
    path = tmp_path / "speed.json"
    assert speed("--device", "cuda", "--json", path, *flags) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert row["lowest"] > 0 and row["memory_gib"] > 0


def test_every_batch_size_is_compiled_by_itself(monkeypatch):
    """torch would make the second one dynamic, reuse that for the third, and give up at the 9th."""
    compiled, compile = [], nn.Module.compile

    def backend(graph, inputs):
        compiled.extend(x.shape[0] for x in inputs if x.shape[1:] == (3, 32, 32))
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode, **how: compile(self, backend=backend, **how)
    )
    one_block = dataclasses.replace(mirl.MODELS["vit_nano"], depth=1)
    monkeypatch.setitem(mirl.MODELS, "vit_nano", one_block)
    sizes = range(2, 11)
    assert speed("--batch-size", *sizes, "--compile", "default", "--windows", 1) == 0
    assert compiled == list(sizes)


def test_peers_that_are_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    assert run(bench_peers, *QUICK) == 2
    assert re.search(r"needs the package \w+: pip install -e '.\[peers\]'", capsys.readouterr().err)


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm, an optional extra")
def test_the_timm_mae_is_ours_with_their_blocks():
    """It takes our encoder's weights, makes the same of the images, and is as large."""
    config = mirl.model_config("vit_nano", **mirl.mae_overrides("vit_nano"))
    ours, theirs = mirl.MIRL(config), bench_peers.TimmMAE(config)
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encoder(images), theirs.encoder(images), atol=1e-5, rtol=1e-4
        )
        assert theirs(images).loss.isfinite()
    sizes = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs))
    assert len(set(sizes)) == 1
