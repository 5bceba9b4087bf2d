"""The packages of the scripts (networks, dataset, utils) in a wheel: within criss_cross_attention.

There they are criss_cross_attention, criss_cross_attention.dataset and criss_cross_attention.utils, since many projects
have modules called utils or dataset. A checkout, and an editable installation of it, has them under their own names.
"""

import re
from pathlib import Path

from setuptools.command.build_py import build_py

NAME = "criss_cross_attention"
FOLDERS = {NAME: "networks", f"{NAME}.dataset": "dataset", f"{NAME}.utils": "utils"}
FILES = {f"{NAME}.dataset": ["tables/*.toml"]}
# What they need beside PyTorch: extra "networks".
REQUIREMENTS = ("numpy", "opencv-python", "pillow", "tomli")

_IMPORT = re.compile(rf"^( *from )({'|'.join(FOLDERS.values())})(?=[. ])", re.MULTILINE)
_NEW = {folder: package for package, folder in FOLDERS.items()}


class BuildPackages(build_py):
    """setuptools' command, which also puts the new names into the imports of these packages."""

    def run(self) -> None:
        super().run()
        for path in Path(self.build_lib, NAME).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            path.write_text(_IMPORT.sub(lambda match: match[1] + _NEW[match[2]], source), encoding="utf-8")


def requirements(lines: list[str]) -> list[str]:
    """Those of requirements.txt that these packages need."""
    return [line.strip() for line in lines if line.startswith(REQUIREMENTS)]
