"""Where pickles that hold a name of a file that has moved since find it."""

import sys

from .. import _models
from . import fusing, swap
from .fusing import classes

sys.modules |= {
    "truenorm._fuse": fusing,
    "truenorm._fuse.classes": classes,
    "truenorm._model": _models,
    "truenorm._model.swap": swap,
}
