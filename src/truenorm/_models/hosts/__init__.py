"""Libraries that find layers by their exact classes are told of truenorm's, once they are imported.

One file for each library: what its own registry says of a class of torch's it then says of
truenorm's. A layer that does more than torch's, by an option that such a library knows nothing of,
is refused there in words: it would be taken for what it is not.
"""

from __future__ import annotations

from ..._core import imports
from . import captum, opacus, thop, torch_ao, torch_fx

imports.after_import("opacus", "Opacus", opacus.register)
imports.after_import("captum.attr._core.lrp", "Captum's LRP", captum.register)
imports.after_import("thop.profile", "thop", thop.register)
imports.after_import(
    "torch.ao.quantization.quantization_mappings", "torch.ao.quantization", torch_ao.register
)
imports.after_import("torch.fx.experimental.optimization", "torch.fx's fuse", torch_fx.register)
