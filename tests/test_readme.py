"""README.md is true: its code runs, its YAML constructs, its tables name what exists, its links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_gradconf import gradient_statistics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, each padded so that a traceback names README's own line."""
    fenced = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return ["\n" * README.count("\n", 0, match.start(1)) + match[1] for match in fenced]


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, str(ROOT / "README.md"), "exec"), namespace)
    assert "min_cosine" in capsys.readouterr().out


def test_yaml_constructs_the_callback():
    (block,) = blocks("yaml")
    (entry,) = yaml.safe_load(block)["trainer"]["callbacks"]
    module, name = entry["class_path"].rsplit(".", 1)
    getattr(importlib.import_module(module), name)(**entry["init_args"])


def test_tables_name_exactly_the_statistics_that_exist():
    rows = re.findall(r"^\| `(gradient_confusion/)?(\w+)` \|", README, re.MULTILINE)
    gram, labels = torch.eye(3), torch.tensor([0, 0, 1])
    assert {name for prefix, name in rows if prefix} == set(gradient_statistics(gram))
    assert {name for _, name in rows} == set(gradient_statistics(gram, "all", labels=labels))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_into_the_repository(target):
    assert (ROOT / target).is_file()
