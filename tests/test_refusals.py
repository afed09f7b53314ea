"""What cannot be is refused in one sentence with exit code 2, and nothing is written."""

import re

import pytest
from conftest import TINY, run

import eval_speed
import train_finetune
import train_pretrain

PRETRAIN = [
    (["--model", "vit_x"], "no model 'vit_x'; the models are"),
    (["--segments", 8], "8 segments need at least 8 blocks"),
    (["--segments", 3], "segments must be 1 .* or even"),
    (["--mask-ratio", "nan"], "--mask-ratio: must be at least .*, not nan"),
    (["--mask-ratio", 0.999], "leaves no visible patch"),
    (["--image-size", 30], "30x30 does not divide into patches of 4"),
    (["--batch-size", 64], "--batch-size 64 is larger than the 33 training images"),
    (["--device-batch-size", 3], "--device-batch-size 3 does not divide .*: try 2"),
    (["--epochs", 0], "--epochs: must be at least 1 and .*, not 0"),
    (["--warmup-epochs", 5], "--warmup-epochs 5 is longer than the run of 2 epochs"),
    (["--lr", "-1"], "--lr: must be greater than 0 and .*, not -1"),
    (["--seed", 10**400], "--seed: must be at least 0 and"),
    (["--data", ""], "--data: must not be empty"),
    (["--warmup", 1], "unrecognized arguments: --warmup"),  # nothing is guessed
    (["--data", "/no/such/folder"], "/no/such/folder: there is no such folder"),
    (["--device", "cuda:99"], "--device cuda:99: no cuda:99"),
    (["--device", "toaster"], "--device toaster: use auto, cuda"),
    (["--dtype", "fp16"], "--dtype fp16 needs a CUDA device"),
    (["--picture-pair", 2], "--picture-pair 2: the model has 1"),
    (["--method", "mae", "--segments", 2], "--method mae is one segment"),
    (["--draw", "a.png"], "--draw needs --from, a pre-trained model"),
    (["--from", "a.pt"], "--from is for --draw alone"),
    (["--draw", "a.png", "--from", "/no/file"], "there is no file /no/file"),
    (["--truncate", 6], "--truncate 6 leaves none of the 6 blocks"),
    (["--vgg-weight", 1, "--vgg-checkpoint", "/no/file"], "there is no file /no/file"),
]

FINETUNE = [
    (["--from", "/no/file.pt"], "there is no file /no/file.pt"),
    (["--eval"], "--eval and --predict need --from"),
    (["--eval", "--protocol", "knn"], "exclude each other"),
    (["--predict", "a.png", "--from", "/no/file.pd"], "--predict: there is no file a.png"),
    (["--train-images", 99], "--train-images 99: there are 33"),
    (["--train-images", 1, "--protocol", "knn"], "--protocol knn needs at least 2 training images"),
    (["--layer-decay", 1.5], "--layer-decay: must be greater than 0 and at most 1, not 1.5"),
    (["--randaug", -1], "--randaug: must be at least 0 and at most 10"),
    (["--drop-path", 1], "drop_path must be in"),
    (["--head-width", 64], "--head-width: not for --task classify"),
    (["--task", "segment", "--pool", "cls"], "--pool: not for --task segment"),
    (["--task", "segment", "--label-smoothing", 0], "--label-smoothing: not for --task segment"),
    (["--task", "segment", "--protocol", "knn"], "--protocol: not for --task segment"),
    (["--recipe", "cifar10", "--task", "segment"], "cifar10 is for --task classify, not segment"),
    (["--task", "segment", "--head-width", 2], "--head-width: must be at least 8 and"),
]

SPEED = [
    (["--batch-size", 8, "many"], "--batch-size: invalid int value: 'many'"),
    (["--json", "/no/such/folder/a.json"], "--json /no/such/folder/a.json is no file"),
]

START = ["--from", "scratch", "--train-images", "33", "--workers", "0"]
CASES = [(train_pretrain, [*TINY, "--workers", "0"], *case) for case in PRETRAIN]
CASES += [(train_finetune, [*TINY, *START], *case) for case in FINETUNE]
CASES += [(eval_speed, [], *case) for case in SPEED]


@pytest.mark.parametrize(("script", "usual", "flags", "message"), CASES)
def test_refusals(tmp_path, capsys, monkeypatch, script, usual, flags, message):
    monkeypatch.chdir(tmp_path)
    out = [] if script is eval_speed else ["--out", tmp_path / "run"]
    assert run(script, *usual, *out, *flags) == 2
    *usage, sentence = capsys.readouterr().err.splitlines()  # argparse's, for a flag by itself
    assert len(usage) < 3 and all(line.startswith("usage: ") for line in usage[:1])
    assert re.search(f"error: .*{message}", sentence)
    assert not list(tmp_path.iterdir())
