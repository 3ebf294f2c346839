"""What the distributions say about themselves: the version and the page on the package index."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradcentral

ROOT = Path(__file__).parent.parent


def test_the_version_is_the_same_everywhere() -> None:
    """Only the code and CITATION.cff contain it; the newest section of the changelog with a date must be its own."""
    citation = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation == released[:1] == [gradcentral.__version__]


def test_the_page_of_the_package_index_has_absolute_links_to_files_that_exist() -> None:
    """The index shows README.md without the repository, so its pictures and links need the repository's address."""
    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "setup.py", "-q", "--long-description"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    repository = re.findall(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", page)
    assert any(picture for picture, _ in links)
    for picture, link in links:
        if not link.startswith(repository):
            assert re.match(r"https://|#", link), link
        else:
            folder = "raw" if picture else "blob"
            file = link.removeprefix(f"{repository}/{folder}/main/").partition("#")[0]
            assert (ROOT / file).exists(), link
