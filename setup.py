"""Builds csrc/ into the package where FASTKV_BUILD_CSRC=1 asks for it; all else is in pyproject.toml."""

import os
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

BUILDS_CSRC = os.environ.get("FASTKV_BUILD_CSRC") == "1"


class BuildWithCsrc(build_py):
    """Python files, then the CUDA library beside them."""

    def run(self) -> None:
        super().run()
        root = Path(__file__).parent.resolve()
        package = root if self.editable_mode else Path(self.build_lib).resolve()
        build = root / "build" / "csrc"
        for command in (
            ["cmake", "-S", root / "csrc", "-B", build, f"-DCMAKE_INSTALL_PREFIX={package / 'fastkv_vllm/kernels'}"],
            ["cmake", "--build", build],
            ["cmake", "--install", build],
        ):
            subprocess.run(command, check=True)


class DistributionWithCsrc(Distribution):
    """A wheel for this platform alone."""

    def has_ext_modules(self) -> bool:
        return True


if BUILDS_CSRC:
    setup(cmdclass={"build_py": BuildWithCsrc}, distclass=DistributionWithCsrc)
else:
    setup()
