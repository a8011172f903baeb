"""The pictures of the layers' pages: `truenorm.explain`, drawn while the site is built."""

from __future__ import annotations

import hashlib
from pathlib import Path

import truenorm
from truenorm import nn

ROOT = Path(__file__).resolve().parents[2]

SUBJECTS = {
    "batch-norm.png": (nn.BatchNorm2d(3), (2, 3, 4, 5)),
    "instance-norm.png": (nn.InstanceNorm2d(3), (2, 3, 4, 5)),
    "group-norm.png": (nn.GroupNorm(2, 4), (2, 4, 4, 5)),
    "layer-norm.png": (nn.LayerNorm(5), (2, 3, 5)),
    "rms-norm.png": (nn.RMSNorm(5), (2, 3, 5)),
    "local-response-norm.png": (nn.LocalResponseNorm(3, alpha=0.5), (2, 4, 4, 5)),
}


def _state() -> str:
    """What the pictures depend on."""
    tools = ROOT / "src/truenorm/_tools"
    sources = [Path(__file__), tools / "palette.py", *sorted((tools / "explain").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def make(folder: Path) -> dict[str, Path]:
    """Each picture's name and file; drawn anew where the code that draws has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / name for name in SUBJECTS}
    stamp, state = folder / "made-from", _state()
    if stamp.is_file() and stamp.read_text() == state and all(p.is_file() for p in made.values()):
        return made
    for name, (layer, shape) in SUBJECTS.items():
        truenorm.explain(layer, shape).save_picture(made[name], force=True)
    stamp.write_text(state)
    return made
