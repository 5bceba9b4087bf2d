"""What the README says is there is there, and the examples of docs/data.md run."""

import re
import textwrap
from pathlib import Path

from test_layouts import folders

import evaluate
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def flags_of(parser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def test_every_flag_has_a_text_and_every_documented_flag_exists():
    parsers = {"train.py": train.get_parser(), "evaluate.py": evaluate.get_parser()}
    for script, parser in parsers.items():
        for action in parser._actions:
            assert action.help, (script, action.dest)
        assert "0x" not in parser.format_help()
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    others |= {"--logdir", "--help"}
    flags = set.union(others, *(flags_of(parser) for parser in parsers.values()))
    text = README.split("## Cityscapes")[1].split("## What context is worth")[0]
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags


def test_linked_files_exist():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_examples_with_torchs_data_loader_run(tmp_path, monkeypatch, capsys):
    folders(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", (ROOT / "docs/data.md").read_text(), re.MULTILINE)
    (example,) = (textwrap.dedent(block) for block in blocks if "DataLoader" in block)
    exec(example.replace("(513, 513)", "(24, 32)").replace("num_workers=2", "num_workers=0"), {})
    assert capsys.readouterr().out.count("torch.Size([2, 3, 24, 32])") == 3
