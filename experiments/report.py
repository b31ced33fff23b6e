"""The report of a preset, as Markdown and as one HTML page, from the files that its studies left."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from experiments.findings import Finding, Study, find_all, load_studies
from experiments.metrics import check_local
from experiments.plots import draw_all

_STYLE = """
:root { color-scheme: light dark; --soft: #8886; --holds: #2e7d4f; --fails: #b3392f; --open: #94690e; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.8rem; border-bottom: 1px solid var(--soft); padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--soft); }
img { max-width: 100%; background: #fff; border-radius: 6px; } code { font-size: .9em; }
.verdict { font-weight: 600; white-space: nowrap; } .holds { color: var(--holds); } .fails { color: var(--fails); }
.not { color: var(--open); } .missing { opacity: .6; } details { margin: .6rem 0; } blockquote { opacity: .85; }
"""

# Figures of the studies that have more than one.
_IMAGES = {"comparison": ("comparison", "selection")}


def write_report(out: Path) -> Path:
    """Writes report.md, report.html and plots/ into a preset's directory, from the study.json files in it.

    Returns:
      The HTML page.

    Raises:
      ValueError: there is no study, or out is no local directory.
    """
    check_local(out, "out")
    studies = load_studies(out)
    if not studies:
        raise ValueError(f"out must hold studies (STUDY/study.json), got out={out}")
    findings, plots = find_all(studies), draw_all(studies, out / "plots")
    (out / "report.md").write_text(_markdown(findings, studies, plots), encoding="utf-8")
    page = out / "report.html"
    page.write_text(_page(findings, studies, plots), encoding="utf-8")
    return page


def _preset(studies: dict[str, Study]) -> str:
    return next(iter(studies.values()))["preset"]


def _origin(study: Study) -> str:
    """Where and when a study's numbers were made."""
    about = study["about"]
    changed = ", with uncommitted changes" if about["git_dirty"] else ""
    return (
        f"revision {str(about['git_revision'])[:12]}{changed}; {about['device']} ({about['cpu_count']} cores); "
        f"Python {about['python']}, jax {about['jax']}; {study['seconds'] / 60:.1f} minutes"
    )


def _command(finding: Finding, studies: dict[str, Study]) -> str:
    return f"python -m experiments study {finding.study} --preset {_preset(studies)}"


def _intro(studies: dict[str, Study]) -> str:
    minutes = sum(study["seconds"] for study in studies.values()) / 60
    return (
        f"Preset {_preset(studies)}, {minutes:.0f} minutes of studies. A number is the mean over seeds, with the range "
        "in brackets. A difference counts if it exceeds the spread, which is the larger of the two ranges over seeds; "
        "otherwise it is called not shown, and a claim whose sign is wrong fails. Scales are small: directions are "
        "compared, not the paper's figures."
    )


def _markdown(findings: Sequence[Finding], studies: dict[str, Study], plots: dict[str, Path]) -> str:
    def table(rows: Sequence[Sequence[str]]) -> list[str]:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], ""]

    parts = ["# Block-sparse attention: what reproduces", "", _intro(studies), ""]
    if "summary" in plots:
        parts += [f"![Summary](plots/{plots['summary'].name})", ""]
    parts += table([("finding", "verdict", "ours"), *((f.title, f"**{f.verdict}**", f.ours) for f in findings)])
    drawn: set[str] = set()
    for finding in findings:
        parts += [
            f"## {finding.title}: {finding.verdict}",
            "",
            f"> {finding.claim}",
            "",
            finding.ours,
            "",
            finding.words,
            "",
        ]
        if finding.study in plots and finding.study not in drawn:
            drawn.add(finding.study)
            for name in _IMAGES.get(finding.study, (finding.study,)):
                parts += [f"![{finding.title}](plots/{plots[name].name})", ""]
        if finding.rows:
            parts += ["<details><summary>All numbers</summary>", "", *table(finding.rows), "</details>", ""]
        if finding.study in studies:
            study = studies[finding.study]
            parts += [*([study["setting"], ""] if "setting" in study else []), _origin(study), ""]
        parts += [f"Again: `{_command(finding, studies)}`", ""]
    return "\n".join(parts)


def _page(findings: Sequence[Finding], studies: dict[str, Study], plots: dict[str, Path]) -> str:
    escape = html.escape

    def image(name: str, text: str) -> str:
        data = base64.b64encode(plots[name].read_bytes()).decode()
        return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'

    def table(rows: Sequence[Sequence[str]]) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'

    def verdict(finding: Finding) -> str:
        return f'<span class="verdict {finding.verdict.split()[0]}">{finding.verdict}</span>'

    summary = "".join(
        f'<tr><td><a href="#finding{number}">{escape(finding.title)}</a></td><td>{verdict(finding)}</td>'
        f"<td>{escape(finding.ours)}</td></tr>"
        for number, finding in enumerate(findings)
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Block-sparse attention: what reproduces</title><style>{_STYLE}</style>",
        f"<h1>Block-sparse attention: what reproduces</h1><p>{escape(_intro(studies))}</p>",
        image("summary", "Summary of the findings") if "summary" in plots else "",
        f'<div class="wide"><table><tr><th>finding</th><th>verdict</th><th>ours</th></tr>{summary}</table></div>',
    ]
    drawn: set[str] = set()
    for number, finding in enumerate(findings):
        parts.append(f'<h2 id="finding{number}">{escape(finding.title)}: {verdict(finding)}</h2>')
        parts.append(f"<blockquote>{escape(finding.claim)}</blockquote><p><b>{escape(finding.ours)}</b></p>")
        parts.append(f"<p>{escape(finding.words)}</p>")
        if finding.study in plots and finding.study not in drawn:
            drawn.add(finding.study)
            parts += [image(name, finding.title) for name in _IMAGES.get(finding.study, (finding.study,))]
        if finding.rows:
            parts.append(f"<details><summary>All numbers</summary>{table(finding.rows)}</details>")
        if finding.study in studies:
            study = studies[finding.study]
            parts.append(f"<p>{escape(study.get('setting', ''))}</p><p><small>{escape(_origin(study))}</small></p>")
        parts.append(f"<p><small>Again: <code>{escape(_command(finding, studies))}</code></small></p>")
    return "\n".join(parts)
