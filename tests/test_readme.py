"""The front pages are true: their code runs, YAML constructs, tables name what exists, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_gradconf import gradient_statistics

ROOT = Path(__file__).parent.parent
README, START, READING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md", "docs/reading.md")
)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, each padded so that a traceback names the page's own line."""
    fenced = re.finditer(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return ["\n" * page.count("\n", 0, match.start(1)) + match[1] for match in fenced]


@pytest.mark.parametrize(("name", "least"), [("README.md", 1), ("docs/index.md", 4)])
def test_python_blocks_run_in_order(name, least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / name).read_text(encoding="utf-8")
    namespace = {"__name__": "readme"}
    assert len(blocks(page, "python")) >= least
    for block in blocks(page, "python"):
        exec(compile(block, str(ROOT / name), "exec"), namespace)
    if name != "README.md":
        assert "min_cosine" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*(many workers|LeafSpec|logging interval)")
@pytest.mark.parametrize("name", ["callback", "gram", "metric", "plots"])
def test_examples_of_the_api_print_and_draw_what_their_page_shows(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api" / f"{name}.md").read_text(encoding="utf-8")
    namespace = {"__name__": "api"}
    for block in blocks(page, "python"):
        exec(compile(block, f"{name}.md", "exec"), namespace)
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    shown = [line for text in blocks(page, "text") for line in text.splitlines() if line and "$" not in text]
    # Numbers depend on the machine by their last digits, and with them which pair is the worst.
    assert [re.sub(r"[-\d.]+", "0", line) for line in printed] == [re.sub(r"[-\d.]+", "0", line) for line in shown]
    for picture in re.findall(r'savefig\("(.+)"\)', page):
        assert (tmp_path / picture).stat().st_size > 1000
        assert (ROOT / "docs" / "images" / picture).is_file()
        assert f"../images/{picture}" in page


def test_yaml_constructs_the_callback():
    (block,) = blocks(START, "yaml")
    (entry,) = yaml.safe_load(block)["trainer"]["callbacks"]
    module, name = entry["class_path"].rsplit(".", 1)
    getattr(importlib.import_module(module), name)(**entry["init_args"])


def test_tables_name_exactly_the_statistics_that_exist():
    more = READING.partition("## More statistics")[2]
    rows = re.findall(r"^\| `(gradient_confusion/)?(\w+)` \|", README + more, re.MULTILINE)
    gram, labels = torch.eye(3), torch.tensor([0, 0, 1])
    assert {name for prefix, name in rows if prefix} == set(gradient_statistics(gram))
    assert {name for _, name in rows} == set(gradient_statistics(gram, "all", labels=labels))


LINKS = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\"#]*)(#[^)\"]+)?[)\"]", README)


@pytest.mark.parametrize(("target", "anchor"), sorted(set(LINKS)))
def test_links_into_the_repository(target, anchor):
    page = ROOT / (target or "README.md")
    assert page.is_file()
    if anchor:  # made of a heading, as GitHub and mkdocs make it
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor[1:] in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_pypi_gets_absolute_links():
    """PyPI shows README.md without the repository around it: setup.py makes every link and picture absolute."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--long-description"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\]\(https://github.com|src=\"https://github.com", done.stdout)) >= len(LINKS)
    assert not re.search(r"\]\((?!https?:|#)|src=\"(?!https?:)", done.stdout)
