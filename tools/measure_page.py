"""Size of a large model's report page, and how soon a browser has drawn it.

    python tools/measure_page.py [--rounds 5]

The model is transformers' ResNet-101 (104 layers, 52,672 channels), random weights. Milliseconds
from navigation until every chart is drawn and the page can be clicked, in headless Chromium, each
time in a browser of its own. Needs truenorm[dev] and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import truenorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from browser import browser, open_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(20)
    model = ResNetModel(ResNetConfig(depths=[3, 4, 23, 3])).eval()
    found = truenorm.inspect(model, torch.randn(2, 3, 64, 64))
    channels = sum(layer.num_channels for layer in found.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        found.save(path)
        size = path.stat().st_size / 1e6
        print(f"{len(found.layers)} layers, {channels:,} channels: {size:.1f} MB", flush=True)
        seconds = []
        for _ in range(args.rounds):
            with browser(1280, 900) as driver:
                open_page(driver, path)
                ready = driver.execute_script("return document.documentElement.dataset.ready")
                seconds.append(float(ready) / 1e3)
        each = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"interactive after {statistics.median(seconds):.2f} s (each: {each})")


if __name__ == "__main__":
    main()
