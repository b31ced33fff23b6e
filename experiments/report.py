"""The report of a preset, from the files that its studies wrote: Markdown, and one HTML page made from it."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from experiments.findings import Finding, Study, find_all, load_studies
from experiments.metrics import check_local
from experiments.plots import draw_all

_HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Block-sparse attention: what reproduces</title>
<style>
:root { color-scheme: light dark; --soft: #8886; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.8rem; border-bottom: 1px solid var(--soft); padding-bottom: .3rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--soft); }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; background: #fff; border-radius: 6px; }
code { font-size: .9em; } details { margin: .6rem 0; } blockquote { opacity: .85; }
</style>
"""

# Figures of the studies that have more than one.
_IMAGES = {"comparison": ("comparison", "selection")}


def write_report(out: Path) -> Path:
    """Writes report.md, report.html and plots/ into a preset's directory, from the study.json files in it.

    Returns:
      The HTML page, which holds its images.

    Raises:
      ValueError: there is no study, or out is no local directory.
    """
    check_local(out, "out")
    studies = load_studies(out)
    if not studies:
        raise ValueError(f"out must hold studies (STUDY/study.json), got out={out}")
    plots = draw_all(studies, out / "plots")
    text = _markdown(find_all(studies), studies, plots)
    (out / "report.md").write_text(text, encoding="utf-8")
    body = MarkdownIt("commonmark").enable("table").render(text)
    for path in plots.values():
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="plots/{path.name}"', f'src="data:image/png;base64,{data}"')
    page = out / "report.html"
    page.write_text(_HEAD + body, encoding="utf-8")
    return page


def _markdown(findings: Sequence[Finding], studies: dict[str, Study], plots: dict[str, Path]) -> str:
    """The whole report. Words of findings and studies are escaped: `<` is no tag there."""
    preset = next(iter(studies.values()))["preset"]
    minutes = sum(study["seconds"] for study in studies.values()) / 60
    parts = [
        "# Block-sparse attention: what reproduces",
        f"Preset {preset}, {minutes:.0f} minutes of studies. A number is the mean over seeds, with the range in "
        "brackets. A difference counts if it exceeds the spread, which is the larger of the two ranges over seeds. "
        "Otherwise it is not shown, and a claim whose sign is wrong fails. Scales are small: directions are compared, "
        "not the paper's figures.",
    ]
    if "summary" in plots:
        parts.append(f"![Summary of the findings](plots/{plots['summary'].name})")
    parts.append(_table([("finding", "verdict", "ours"), *((f.title, f"**{f.verdict}**", f.ours) for f in findings)]))
    drawn: set[str] = set()
    for finding in findings:
        claim, ours, words = (html.escape(each, quote=False) for each in (finding.claim, finding.ours, finding.words))
        parts += [f"## {finding.title}: {finding.verdict}", f"> {claim}", f"**{ours}**", words]
        if finding.study in plots and finding.study not in drawn:
            drawn.add(finding.study)
            names = _IMAGES.get(finding.study, (finding.study,))
            parts += [f"![{finding.title}](plots/{plots[name].name})" for name in names]
        if finding.rows:
            parts += ["<details><summary>All numbers</summary>", _table(finding.rows), "</details>"]
        if finding.study in studies:
            study = studies[finding.study]
            parts += [html.escape(each, quote=False) for each in (study.get("setting", ""), _origin(study)) if each]
        parts.append(f"Again: `python -m experiments study {finding.study} --preset {preset}`")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table, head first."""
    lines = [
        "| " + " | ".join(html.escape(cell, quote=False).replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _origin(study: Study) -> str:
    """Where and when a study's numbers were made."""
    about = study["about"]
    changed = ", with uncommitted changes" if about["git_dirty"] else ""
    return (
        f"revision {str(about['git_revision'])[:12]}{changed}; {about['device']} ({about['cpu_count']} cores); "
        f"Python {about['python']}, jax {about['jax']}; {study['seconds'] / 60:.1f} minutes"
    )
