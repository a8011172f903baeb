"""The page of an inspection: its file, its contents in a real browser, and its command."""

from __future__ import annotations

import gzip
import json
import re
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser, open_page, screenshot, wait_for
from cases import randomize
from test_convert import ResNet, UNet
from torch import nn

import truenorm
from truenorm._tools.cli import main

for package in ("jinja2", "plotly", "sklearn"):
    pytest.importorskip(package)

NETS: dict[str, Any] = {"ResNet": ResNet, "UNet": UNet}


def inspection(net: str = "ResNet") -> Any:
    torch.manual_seed(20)
    model = randomize(NETS[net]())
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 8, 8))
        for module in model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.weight[1] = 0.0
    return truenorm.inspect(model.eval(), torch.randn(16, 3, 8, 8))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for net in NETS:
        inspection(net).save(folder / f"{net}.html")
    return {net: folder / f"{net}.html" for net in NETS}


def data_of(page: str) -> Any:
    packed = re.search(r'id="data">([^<]*)<', page)
    assert packed is not None
    return json.loads(gzip.decompress(b64decode(packed[1])))


def test_the_file(pages) -> None:
    text = pages["ResNet"].read_text(encoding="utf-8")
    # nothing is fetched: no address outside of what is packed, no src, no link
    visible = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|src=|<link|@import|url\(", visible)
    data, found = data_of(text), inspection()
    assert [layer["name"] for layer in data["layers"]] == [t.name for t in found.layers]
    for layer, table in zip(data["layers"], found.layers, strict=True):
        assert layer["channels"]["mean"] == pytest.approx(table.channels.mean, rel=1e-3)
        assert sum(layer["before"][2]) == sum(table.before.counts)
    assert sum(len(f["items"]) for f in data["findings"]) == len(found.findings) > 0
    for finding in found.findings:
        assert finding.text[1:].split("<")[0].replace("'", "&#39;") in text


def test_names_cannot_break_the_page(tmp_path) -> None:
    model = nn.ModuleDict({"<script>alert(1)</script>": nn.BatchNorm2d(3), "&": nn.BatchNorm2d(3)})
    found = truenorm.inspect(
        model, torch.randn(4, 3, 5, 5), call=lambda m, x: [layer(x) for layer in m.values()]
    )
    found.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_file_that_exists(tmp_path, monkeypatch) -> None:
    found, path = inspection(), tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"`path` \(='.*page.html'\) exists.*force=True"):
        found.save(path)
    assert path.read_text() == "mine"
    found.save(str(path), force=True)
    assert "<!DOCTYPE html>" in path.read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"the folder '.*none' does not exist, make it"):
        found.save(tmp_path / "none" / "page.html")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        found.save(tmp_path, force=True)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    # whole or not at all
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("os.link", full)
    for name, force in (("page.html", True), ("other.html", False)):
        with pytest.raises(OSError, match="No space left"):
            found.save(tmp_path / name, force=force)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_what_is_missing_is_named(monkeypatch, tmp_path) -> None:
    found = inspection()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r'needs plotly: pip install "truenorm\[report\]"'):
        found.save(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def errors(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    events = (json.loads(e["message"])["message"] for e in driver.get_log("performance"))
    sent = [e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [r["url"] for r in sent if not r["url"].startswith(("file:", "data:", "blob:"))]


@pytest.mark.parametrize("net", NETS)
def test_in_a_browser(net: str, pages: dict[str, Path], tmp_path: Path) -> None:
    with browser(1300, 900) as driver:
        open_page(driver, pages[net])
        data = data_of(pages[net].read_text(encoding="utf-8"))
        names = [layer["name"] for layer in data["layers"]]
        listed = driver.execute_script(
            "return [...document.querySelectorAll('#layers button')].map(b => b.textContent)"
        )
        assert [text.lstrip("●").split()[0] for text in listed] == names

        # the heat map shows the measure of each channel
        key = driver.execute_script("return document.getElementById('measure').value")
        z = driver.execute_script("return document.getElementById('heat').data[0].z")
        rows = [layer["channels"][key] for layer in data["layers"] if key in layer["channels"]]
        assert len(z) == len(rows)
        assert [sum(v is not None for v in row) for row in z] == [len(row) for row in rows]
        for shown, row in zip(z, rows, strict=True):
            assert [10**v for v in shown if v is not None] == pytest.approx(row, rel=1e-6)

        # hovering names the layer, the channel and the value
        cell = driver.execute_script(
            "const cells = document.querySelector('#heat .nsewdrag');"
            "cells.scrollIntoView({behavior: 'instant', block: 'center'});"
            "const box = cells.getBoundingClientRect();"
            "return [box.left + 3, box.top + 6]"
        )
        for x in (cell[0], cell[0] + 1):
            driver.execute_cdp_cmd(
                "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": cell[1]}
            )
        hover = wait_for(
            driver,
            "[...document.querySelectorAll('#heat .hovertext')].map(h => h.textContent).join()",
        )
        first = next(layer["name"] for layer in data["layers"] if key in layer["channels"])
        assert first in hover
        assert "channel 0" in hover

        # choosing a layer draws it
        driver.execute_script("document.querySelectorAll('#layers button')[2].click()")
        assert (
            driver.execute_script("return document.getElementById('name').textContent") == names[2]
        )
        bars = driver.execute_script(
            "return document.getElementById('distributions').data.map(t => t.y)"
        )
        assert bars == [data["layers"][2]["before"][2], data["layers"][2]["after"][2]]
        hidden = driver.execute_script("return document.getElementById('gap').hidden")
        assert hidden == ("running_mean" not in data["layers"][2]["channels"])

        # another measure
        driver.execute_script(
            "const m = document.getElementById('measure'); m.value = 'mean';"
            "m.dispatchEvent(new Event('change'))"
        )
        z = driver.execute_script("return document.getElementById('heat').data[0].z")
        assert z[0][0] == data["layers"][0]["channels"]["mean"][0]

        # the filter leaves what it names, in the list, the heat map and the findings
        word = names[-1]
        driver.find_element("id", "filter").send_keys(word)
        wait_for(driver, "document.getElementById('heat').data[0].z.length === 1")
        left = driver.execute_script(
            "return [...document.querySelectorAll('#layers li')].filter(l => !l.hidden).length"
        )
        assert left == sum(word in name for name in names) == 1
        shown = "return [...document.querySelectorAll('#cards > li')].filter(c => !c.hidden).length"
        kept = sum(names.index(word) in f["layers"] for f in data["findings"])
        assert driver.execute_script(shown) == kept < len(data["findings"])
        driver.execute_script(
            "const f = document.getElementById('filter'); f.value = '';"
            "f.dispatchEvent(new Event('input'))"
        )
        # and the chips take findings away by severity
        severity = data["findings"][0]["severity"]
        chip = driver.find_element("css selector", f".chip[data-severity={severity}]")
        driver.execute_script("arguments[0].click()", chip)
        others = sum(f["severity"] != severity for f in data["findings"])
        assert driver.execute_script(shown) == others

        # a finding leads to its layer
        driver.execute_script("arguments[0].click()", chip)
        link = driver.find_element("css selector", "#cards a.where")
        driver.execute_script("arguments[0].click()", link)
        assert (
            driver.execute_script("return document.getElementById('name').textContent") == link.text
        )
        screenshot(driver, tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 30_000
        assert errors(driver) == []
        assert requests(driver) == []


def test_dark_narrow_and_on_paper(pages: dict[str, Path]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with browser(390, 800, mobile=True) as driver:
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        open_page(driver, pages["UNet"])
        assert driver.execute_script("return " + background) == "rgb(20, 23, 29)"
        # of layers that have no room for their names, each has one of its own
        assert driver.execute_script(
            "const texts = [...document.querySelectorAll('#heat .ytick text')]"
            ".map((t) => t.textContent); return new Set(texts).size === texts.length"
        )
        # nothing is wider than the phone
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        driver.find_element("id", "theme").click()
        assert driver.execute_script("return " + background) == "rgb(252, 252, 250)"
        driver.find_element("id", "theme").click()
        closed = "document.querySelectorAll('details:not([open])').length"
        before = driver.execute_script(
            f"addEventListener('beforeprint', () => {{ window.left = {closed}; }}); return {closed}"
        )
        pdf = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
        assert b64decode(pdf)[:5] == b"%PDF-"
        # what is folded on the screen is open on paper
        assert before > 0
        assert driver.execute_script("return window.left") == 0
        assert driver.execute_script("return " + closed) == before
        # and it is dark again
        assert driver.execute_script("return " + background) == "rgb(20, 23, 29)"
        assert errors(driver) == []


class Deep(nn.Module):
    """A hundred layers, as deep networks name them, of as many channels as ResNet-101's."""

    def __init__(self) -> None:
        super().__init__()

        def stage() -> nn.ModuleDict:
            kinds = ("normalization_first", "normalization_second")
            blocks = [nn.ModuleDict({k: nn.BatchNorm2d(512) for k in kinds}) for _ in range(10)]
            return nn.ModuleDict({"layers": nn.ModuleList(blocks)})

        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stage() for _ in range(5))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                x = module(x) + 0.1
        return x


def test_the_page_of_a_hundred_layers(tmp_path: Path) -> None:
    path = tmp_path / "deep.html"
    torch.manual_seed(20)
    truenorm.inspect(randomize(Deep()).eval(), torch.randn(4, 512, 3, 3)).save(path)
    assert path.stat().st_size < 5_000_000
    with browser(1280, 900) as driver:
        open_page(driver, path)
        # how fast is measured by tools/measure_page.py
        assert driver.execute_script("return document.querySelectorAll('#layers li').length") == 100
        assert errors(driver) == []
    with browser(390, 800, mobile=True) as driver:
        open_page(driver, path)
        labels = driver.execute_script(
            "return document.getElementById('heat').layout.yaxis.ticktext"
        )
        assert len(set(labels)) == len(labels) > 40
        assert labels[-1] == "e.s.4.l.9.nor…irst"


FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

def plain():
    return nn.Sequential(nn.Conv2d(1, 6, 3))

def number():
    return 3

def broken():
    raise KeyError("weights")

model = build()
loader = [torch.randn(2, 3, 8, 8) for _ in range(3)]

def batches():
    yield from loader

def ends():
    yield loader[0]
    raise OSError("the disk is gone")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_this_test.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "nets_of_this_test", raising=False)
    return tmp_path


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    status = main(["report", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


NET = "nets_of_this_test:build"


@pytest.mark.parametrize("data", ["digits", "images.npz", "nets_of_this_test:batches"])
def test_the_command(here: Path, capsys: Any, data: str) -> None:
    numpy = pytest.importorskip("numpy")
    numpy.savez("images.npz", labels=numpy.arange(40), x=numpy.zeros((40, 3, 8, 8), "uint8"))
    argv = [NET, "--data", data, "--out", "net.html", "--json", "net.json", "--batches", "2"]
    status, out, err = run(
        capsys, *argv, *(["--shape", "3", "16", "16"] if data == "digits" else [])
    )
    assert (status, err) == (0, "")
    assert "Sequential: 1 normalization layers, 1 error" in out
    assert out.endswith("open net.html\n")
    found = json.loads(Path("net.json").read_text())
    assert found["batches"] == 2
    assert data_of(Path("net.html").read_text(encoding="utf-8"))["batches"] == 2
    shape = {"digits": [16, 6, 14, 14], "images.npz": [16, 6, 6, 6]}.get(data, [2, 6, 6, 6])
    assert found["layers"][0]["shape"] == shape


BAD = [
    (
        ["nets_of_this_test", "--data", "digits"],
        r"model \(='nets_of_this_test'\) must be module:factory",
    ),
    (["none:build", "--data", "digits"], r"module 'none' cannot be imported, ModuleNotFoundError"),
    (["nets_of_this_test:no", "--data", "digits"], r"module 'nets_of_this_test' has no 'no'"),
    (["nets_of_this_test:number", "--data", "digits"], r"gave int, not a torch.nn.Module"),
    (["nets_of_this_test:broken", "--data", "digits"], r"failed with KeyError: 'weights'"),
    (["nets_of_this_test:plain", "--data", "digits"], r"has no normalization layer"),
    ([NET, "--data", "digits"], r"failed on a batch of shape \(16, 1, 8, 8\).*--shape C H W"),
    ([NET, "--data", "digit"], r"--data \(='digit'\) is unknown: pass digits"),
    ([NET, "--data", "none.npz"], r"--data \(='none.npz'\) cannot be read: .*No such file"),
    ([NET, "--data", "text.npz"], r"--data \(='text.npz'\) cannot be read"),
    (
        [NET, "--data", "nets_of_this_test:ends"],
        r"--data is a loader that failed at batch 1 .*gone",
    ),
    ([NET, "--data", "digits", "--shape", "3"], r"--shape \(=3\) is of images: three sizes"),
    ([NET, "--data", "digits", "--batches", "0"], r"--batches \(=0\) must be at least 1"),
    ([NET, "--data", "digits", "--out", "mine.html"], r"--out \(='mine.html'\) exists.*--force"),
    ([NET, "--data", "digits", "--out", "no/r.html"], r"--out .* does not exist, make it first"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input(here: Path, capsys: Any, argv: list[str], message: str) -> None:
    (here / "mine.html").write_text("mine")
    (here / "text.npz").write_text("no archive")
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert re.search(message, err), err
    assert err.startswith("truenorm: ")
    assert err.count("\n") == 1
    assert (here / "mine.html").read_text() == "mine"
    assert not (here / "report.html").exists()
    assert str(here) not in sys.path


def test_force_replaces(here: Path, capsys: Any) -> None:
    (here / "report.html").write_text("mine")
    argv = ["nets_of_this_test:model", "--data", "nets_of_this_test:batches"]
    assert run(capsys, *argv)[0] == 2
    assert (here / "report.html").read_text() == "mine"
    assert run(capsys, *argv, "--force", "--training")[0] == 0
    assert data_of((here / "report.html").read_text(encoding="utf-8"))["training"] is True
