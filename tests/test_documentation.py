"""What the README says is there is there."""

import re
from pathlib import Path

import evaluate
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_flag_is_documented_and_every_documented_flag_exists():
    for script, parser in (("train.py", train.get_parser()), ("evaluate.py", evaluate.get_parser())):
        flags = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        flags = {flag for flag in flags if not flag.startswith("--no-") and flag != "--help"}
        documented = set(re.findall(r"^\| `(--[\w-]+)", README.split(f"### {script}")[1].split("\n#")[0], re.M))
        shared = set(re.findall(r"^\| `(--[\w-]+)", README.split("### Both")[1].split("\n#")[0], re.M))
        assert flags == documented | shared, script


def test_linked_files_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
