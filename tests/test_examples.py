"""The examples, and the README's torchrun line as it stands."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^    (torchrun .*)$", re.MULTILINE)


def output(example: str, *options: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, f"examples/{example}.py", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_distributed_digits() -> None:
    (line,) = LINE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert line in (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert line in (ROOT / "examples" / "distributed_digits.py").read_text(encoding="utf-8")
    # torchrun as a module: the environment of these tests, and no other host than this one
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    number = r"([\d.e+-]+)"
    own, common = (
        re.search(rf"{name} statistics: {number}% right, {number} from one", done.stdout).groups()
        for name in ("own", "common")
    )
    (whole,) = re.search(rf"whole batches: {number}% right", done.stdout).groups()
    # float64: roundings grow by the step
    assert float(common[1]) < 1e-10 < 1e-2 < float(own[1])
    assert float(common[0]) == float(whole) > 85.0


def test_statistics_digits() -> None:
    printed = output("statistics_digits")
    steps, moved = re.search(r"(\d+) steps, statistics moved (\d+) times", printed).groups()
    assert steps == moved
    assert float(re.search(r"trained: ([\d.]+)%", printed).group(1)) > 85.0
    assert float(re.search(r"fine-tuned, frozen: ([\d.]+)%", printed).group(1)) > 70.0


def test_masked_text() -> None:
    printed = output("masked_text")
    line = re.compile(r"(with|without) lengths: ([\d.]+)% right.* (\d+) of \d+ answers .* to (\S+)")
    found = {name: rest for name, *rest in line.findall(printed)}
    right, changed, apart = found["with"]
    assert float(right) > 30.0
    assert int(changed) == 0
    assert float(apart) < 1e-4 < 1e-1 < float(found["without"][2])
    assert int(found["without"][1]) > 0


def test_fused_unet() -> None:
    # a quarter of the pixels: the convolutions are what takes the time
    printed = output("fused_unet", "--size", "48")
    line = re.compile(r"(as written|fused|recomputed): +last loss ([\d.]+), .* pieces ([\d.]+),")
    found = {name: tuple(map(float, rest)) for name, *rest in line.findall(printed)}
    noise = float(re.search(r"noise ([\d.]+)", printed).group(1))
    assert found["recomputed"] == found["fused"]
    loss, left = found["as written"]
    # roundings grow by the step: of the network as it is written, 64 weights that begin one unit in
    # the last place off move the last loss by up to 3.9e-3 of it (the most of six such nudges)
    bound = 1e-2
    assert abs(found["fused"][0] - loss) < bound * loss
    assert abs(found["fused"][1] - left) < bound * left < left < 0.9 * noise


def test_tokens_digits() -> None:
    printed = output("tokens_digits")
    line = re.compile(r"(transposed|channel_axis=-1): +last loss ([\d.]+), ([\d.]+)% of unseen")
    found = {name: (float(loss), float(right)) for name, loss, right in line.findall(printed)}
    loss, right = found["transposed"]
    # roundings grow by the step
    assert abs(found["channel_axis=-1"][0] - loss) < 0.02
    assert min(right, found["channel_axis=-1"][1]) > 85.0


def losses(printed: str) -> list[tuple[float, float]]:
    """Of the network as it was, and of the one converted: the first and the last."""
    found = re.findall(r"loss ([\d.]+) to ([\d.]+)", printed)
    assert len(found) == 2
    return [(float(first), float(last)) for first, last in found]


def no_further_apart_than_a_last_bit(printed: str) -> None:
    apart, nudged = re.search(
        r"most ([\d.e+-]+) apart; by a last bit ([\d.e+-]+)", printed
    ).groups()
    assert float(apart) < 10 * float(nudged) < 1e-1


def test_diffusion_block() -> None:
    printed = output("diffusion_block", "--steps", "30")
    assert "13 normalization layers, 13 of them truenorm's" in printed
    assert "rms, cast_first" in printed
    (first, last), converted = losses(printed)
    assert last < 0.7 * first
    assert converted == (first, last)
    no_further_apart_than_a_last_bit(printed)


def test_timm_digits() -> None:
    printed = output("timm_digits", "--steps", "12")
    if importlib.util.find_spec("timm") is None:
        assert printed == "timm is not installed: pip install timm\n"
        return
    assert "13 of them truenorm's" in printed
    (first, last), converted = losses(printed)
    assert last < 0.8 * first
    assert converted[0] == first
    no_further_apart_than_a_last_bit(printed)


def test_llama_text() -> None:
    printed = output("llama_text", "--steps", "25")
    assert "5 of them truenorm's" in printed
    losses = re.findall(r"loss ([\d.]+) to ([\d.]+)", printed)
    assert all(float(last) < 0.8 * float(first) for first, last in losses)
    assert losses[0] == losses[1]
    apart, nudged = re.search(r"most ([\d.e-]+) apart; by a last bit ([\d.e-]+)", printed).groups()
    assert float(apart) < 10 * float(nudged) < 1e-2
    assert "The data set contains" in printed
