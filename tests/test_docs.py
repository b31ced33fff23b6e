"""The code on the pages of the documentation runs as a reader would type it, and prints what the page says."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())
# A comment behind a print that says what comes out: a shape, a number, True.
PROMISE = re.compile(r"^ *print\(.*\)  # ([(\d-].*|True|False)$", re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # some draw pictures
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    exec(compile(code, str(page), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out.splitlines()
    for promise in PROMISE.findall(code):
        assert promise in printed
