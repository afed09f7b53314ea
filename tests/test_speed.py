"""eval_speed.py: what it counts, and that it reports what it measured."""

import functools
import importlib.util
import json
import re
from unittest.mock import Mock

import bench_peers
import pytest
import torch
import torch.nn as nn
from conftest import CPU, run, start, succeed

import eval_speed
import mirl

QUICK = ["--models", "vit_nano", "--device", "cpu", "--windows", "2", "--seconds", "0"]
QUICK += ["--batch-size", "2"]
speed = functools.partial(run, eval_speed, *QUICK)


def vit_nano(label="vit_nano", mode="infer"):
    make = functools.partial(eval_speed.build, "vit_nano", mode, "mirl")
    return eval_speed.Case(label, mirl.model_config("vit_nano"), make, batch_size=4)


def test_multiply_adds_are_those_of_table_4():
    table = dict(  # parameters in millions, billions of multiply-adds without and with attention
        vit_s=[21.98, 4.24, 4.60],
        vit_s_54=[96.50, 18.88, 20.49],
        vit_b=[86.42, 16.85, 17.56],
        vit_b_24=[171.47, 33.58, 35.01],
        vit_b_48=[341.58, 67.04, 69.91],
    )
    for name, expected in table.items():
        with torch.device("meta"):
            image = torch.empty(1, 3, 224, 224)
            counted = eval_speed.count_operations(mirl.build_vit(name), image, "infer")
        found = counted["params"] / 1e6, counted["macs"] / 1e9, counted["macs_with_attention"] / 1e9
        assert found == pytest.approx(expected, abs=0.005), name


@pytest.mark.parametrize(("mode", "embedded"), [("finetune", 64), ("pretrain", 16)])
def test_a_training_step_computes_everything_three_times_but_the_images_gradient(mode, embedded):
    model = eval_speed.build("vit_nano", mode, "mirl")
    counted = eval_speed.count_operations(model, torch.randn(1, 3, 32, 32), mode)
    patches = embedded * 48 * 96  # embedded forward, and for the weights' gradient
    assert counted["step_macs"] == 3 * counted["macs_with_attention"] - patches
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["infer", "finetune", "pretrain"])
@pytest.mark.parametrize("flags", [[], ["--dtype", "bf16"], ["--dtype", "bf16", "--no-autocast"]])
def test_a_step_is_what_the_flags_say(mode, flags):
    case, seen = vit_nano(mode=mode), []
    dtype = torch.bfloat16 if flags else torch.float32
    weights = dtype if "--no-autocast" in flags else torch.float32
    eval_speed.prepare(case, eval_speed.parse([*QUICK, "--mode", mode, *flags]), CPU, dtype)
    linear = next(m for m in case.model.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, x, y: seen.append((len(y), y.dtype)))
    before = linear.weight.clone()
    case.step()
    assert seen == [(4, dtype)] and linear.weight.dtype == weights
    assert before.equal(linear.weight) == (mode == "infer") == (not case.model.training)
    assert all(p.grad is None for p in case.model.parameters())


def test_the_table_and_the_json_agree(tmp_path, capsys):
    path = tmp_path / "speed.json"
    assert speed("--batch-size", 2, 3, "--json", path, "--dtype", "bf16") == 0
    head, headings, *lines = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert "mode infer" in head and (result["mode"], result["dtype"]) == ("infer", "bfloat16")
    for line, row, size in zip(lines, result["rows"], (2, 3), strict=True):
        shown = dict(zip(re.split(r"\s{2,}", headings.strip()), re.split(r"\s{2,}", line.strip())))
        assert (shown["model"], shown["depth"], shown["batch"]) == ("vit_nano", "6", str(size))
        assert float(shown["img/s"]) == pytest.approx(row["images_per_second"], abs=0.006)


def test_windows_are_timed_and_interleaved(monkeypatch):
    """By a clock that is advanced by hand, each call taking longer."""
    now, calls = [0.0], []
    monkeypatch.setattr(eval_speed, "time", Mock(perf_counter=lambda: now[0]))

    def step(label):
        calls.append(label)
        now[0] += len(calls)

    cases = [vit_nano("a"), vit_nano("b")]
    for case in cases:
        case.step = functools.partial(step, case.label)
        case.row["step_macs"] = 10**12
    cases[0].alone = [2.25]
    eval_speed.measure(cases, 3, CPU)
    assert "".join(calls) == "baabba"
    row, other = (eval_speed.result(case, "infer", 8.0) for case in cases)  # 2, 3, 6 and 1, 4, 5 s
    assert (row["highest"], row["images_per_second"], row["lowest"]) == (2, 4 / 3, 4 / 6)
    assert (other["highest"], other["images_per_second"], other["lowest"]) == (4, 1, 4 / 5)
    assert row["tflops"] == pytest.approx(2 * 4 / 3)
    assert row["of_matrix_product"] == pytest.approx(1 / 3)
    assert row["scaling"] == pytest.approx(2.25 / 3) and "scaling" not in other


def test_running_out_of_memory_is_reported_and_survived(tmp_path, capsys, monkeypatch):
    """The memory holds no 8 images, 6 by themselves (the two calls that prepare them), and 4."""
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: …")
    calls = {8: [full], 6: [None, None, full], 4: [None] * 99}
    steps = [Mock(side_effect=calls[size]) for size in calls]
    monkeypatch.setattr(eval_speed, "whole_step", Mock(side_effect=steps))
    assert speed("--batch-size", *calls, "--json", tmp_path / "speed.json") == 0
    assert "out of memory" in capsys.readouterr().out.splitlines()[2]
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row.get("error") for row in rows] == ["out of memory", "out of memory", None]
    assert ["images_per_second" in row for row in rows] == [False, False, True]


@pytest.mark.parametrize("mode", ["infer", "pretrain"])
def test_two_processes_add_up(tmp_path, mode):
    path, told = tmp_path / "speed.json", tmp_path / "told"
    code = f"import sys, eval_speed\nsys.stdout = open({str(told)!r}, 'a')\n"
    code += f"eval_speed.main({[*QUICK, '--mode', mode, '--json', str(path)]})"
    succeed(start(code, world=2))
    result = json.loads(path.read_text())
    [row] = result["rows"]
    assert result["processes"] == 2 and len(row["per_process"]) == 2
    assert sum(row["per_process"]) == pytest.approx(row["images_per_second"])  # of two windows
    assert ("scaling" in row) == (mode == "pretrain")
    assert told.read_text().count("vit_nano") == 1


def test_every_batch_size_is_compiled_by_itself(monkeypatch):
    """torch would make the second dynamic, reuse that for the third, and give up at the 9th."""
    compiled, compile = [], nn.Module.compile

    def backend(graph, inputs):
        compiled.extend(x.shape[0] for x in inputs if x.shape[1:] == (3, 32, 32))
        return graph.forward

    def spied(self, mode, **how):
        compile(self, backend=backend, **how)

    monkeypatch.setattr(nn.Module, "compile", spied)
    monkeypatch.setitem(mirl.MODELS, "vit_nano", mirl.model_config("vit_nano", depth=1))
    assert speed("--batch-size", *range(2, 11), "--compile", "default", "--windows", 1) == 0
    assert compiled == list(range(2, 11))


def test_peers_that_are_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    assert run(bench_peers, *QUICK) == 2
    assert re.search(r"needs the package \w+: pip install -e '.\[peers\]'", capsys.readouterr().err)


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm, an optional extra")
def test_the_timm_mae_is_ours_with_their_blocks():
    """It takes our encoder's weights, makes the same of the images, and is as large."""
    ours, images = mirl.build_mae("vit_nano"), torch.randn(2, 3, 32, 32)
    theirs = bench_peers.TimmMAE(ours.config)
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    expected = ours.encoder(images)
    torch.testing.assert_close(theirs.encoder(images), expected, atol=1e-5, rtol=1e-4)
    assert theirs(images).loss.isfinite()
    sizes = {sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)}
    assert len(sizes) == 1
