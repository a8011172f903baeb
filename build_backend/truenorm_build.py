"""The build backend: scikit-build-core, asking for torch only where there is none to build with.

The native core uses torch's stable ABI, so the headers and library of any torch >= 2.11 will do.
pip builds in an environment of its own, and torch listed as a build requirement would be
downloaded there a second time, often as another build of several GB. So the torch of the
environment that truenorm is being installed into is used when it is new enough; only otherwise is
torch a build requirement.

Run as a program, this file prints the folder of the torch to build with: CMakeLists.txt does that.
"""

import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

OLDEST_TORCH = (2, 11)


def find_torch():
    """The folder of a torch >= 2.11, or None. torch itself is not imported."""
    installed_into = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for distribution in distributions(name="torch", path=[*sys.path, *installed_into]):
        version = tuple(int(part) for part in distribution.version.split(".")[:2])
        folder = Path(distribution.locate_file("torch"))
        if version >= OLDEST_TORCH and (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def _and_torch(requirements):
    return requirements if find_torch() else [*requirements, "torch>=2.11"]


if __name__ == "__main__":
    print(find_torch() or "")
else:
    from scikit_build_core import build as _backend
    from scikit_build_core.build import *  # noqa: F403

    def get_requires_for_build_wheel(config_settings=None):
        """What a wheel needs to be built."""
        return _and_torch(_backend.get_requires_for_build_wheel(config_settings))

    def get_requires_for_build_editable(config_settings=None):
        """What an editable install needs to be built."""
        return _and_torch(_backend.get_requires_for_build_editable(config_settings))
