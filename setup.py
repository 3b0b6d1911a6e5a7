"""What pyproject.toml cannot say: the emulated CUDA driver's library has a name that no import takes for a module."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

EMULATOR = "cuda_emulator"
FILE = "cuda_emulator.library"  # as vmem_kv/testing/emulator.py looks for it


class BuildExtensions(build_ext):
    """Builds the libraries that pyproject.toml lists."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return where a library goes, counted from the folder that holds the packages."""
        path = super().get_ext_filename(fullname)
        return str(Path(path).with_name(FILE)) if fullname.split(".")[-1] == EMULATOR else path


setup(cmdclass={"build_ext": BuildExtensions})
