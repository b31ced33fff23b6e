"""What follows from a report of `experiments.kernels.verify`: what is wrong, what is right, and what is fastest."""

from typing import Any

NAMES = "reference", "xla", "pallas", "mosaic"
PARTS = "route", "forward", "gradients"
PASSES = "forward", "forward and backward"


def wrong(report: dict[str, Any]) -> list[str]:
    """What is wrong, in words: wrong numbers, other bits at the second run, a crash, a hang, an error.

    XLA adds up gradients on an accelerator in no fixed order, so there other bits are no fault of its.
    """
    lines = []
    is_cpu = report["about"].get("platform") == "cpu"
    if "failed" in report["about"]:
        lines.append(f"JAX: {report['about']['failed']}")
    for check in report["checks"]:
        what = f"{check['implementation']}, {check['case']}, {check['part']}"
        if "failed" in check:
            lines.append(f"{what}: {check['failed']}")
        for name, error in check.get("errors", {}).items():
            if not error <= (0 if name == "choice" else 1):  # NaN is wrong
                unit = "wrong choices" if name == "choice" else "times what rounding allows"
                lines.append(f"{what}: {name} off by {error:.3g} {unit}")
        is_kernel = check["implementation"] in ("pallas", "mosaic")
        if not check.get("same_bits", True) and (is_cpu or is_kernel):
            lines.append(f"{what}: other bits at the second run")
    for measured in report["times"]:
        if "failed" in measured and measured["implementation"] != "dense":
            what = f"{measured['implementation']}, {measured['tokens']} tokens, {measured['pass']}"
            lines.append(f"{what}: {measured['failed']}")
    return lines


def right_names(report: dict[str, Any]) -> list[str]:
    """Implementations of which every part was compared at small and, if they were tried, at real sizes; none wrong."""

    def sizes(checks: list[dict[str, Any]]) -> set[tuple[str, bool]]:
        return {(check["part"], check["case"].startswith("small")) for check in checks}

    wrong_names = {line.partition(",")[0] for line in report["wrong"]}
    tried = sizes(report["checks"])
    return [
        name
        for name in NAMES
        if name not in wrong_names
        and tried
        and sizes([c for c in report["checks"] if c["implementation"] == name and "errors" in c]) == tried
    ]


def fastest(report: dict[str, Any]) -> str | None:
    """The right implementation that took the least time, forward and backward, at the longest length measured."""
    right = set(right_names(report))
    times = [t for t in report["times"] if "seconds" in t and t["implementation"] in right and t["pass"] == PASSES[1]]
    if not times:
        return None
    longest = max(measured["tokens"] for measured in times)
    best = min((t for t in times if t["tokens"] == longest), key=lambda measured: measured["seconds"])
    return str(best["implementation"])


def supports(report: dict[str, Any], device_kind: str, name: str) -> bool:
    """Whether a report is evidence that None may take that implementation on that kind of device."""
    is_there = report["about"].get("device_kind") == device_kind
    return is_there and not report["wrong"] and report["implementation"] == name


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    checks, times = report["checks"], report["times"]
    rows = [["is it right?", *NAMES]]
    for case in dict.fromkeys(check["case"] for check in checks):
        parts = [[c for c in checks if (c["case"], c["implementation"]) == (case, name)] for name in NAMES]
        rows.append([case, *(_verdict(each, report["wrong"]) for each in parts)])
    costs = [["ms, temporary MiB", *NAMES, "dense"]]
    for tokens, which in dict.fromkeys((t["tokens"], t["pass"]) for t in times):
        row = {t["implementation"]: t for t in times if (t["tokens"], t["pass"]) == (tokens, which)}
        costs.append([f"{tokens}, {which}", *(_cost(row.get(name, {})) for name in costs[0][1:])])
    refusals = {
        f"{each['implementation']} refuses: {each['refused']}" for each in (*checks, *times) if "refused" in each
    }
    use = report["implementation"]
    last = f"Fastest of what is right: write implementation={use!r}" if use else "Nothing that is right was timed."
    about = ", ".join(f"{name} {value}" for name, value in report["about"].items())
    parts = [
        [about],
        _align(rows),
        sorted(refusals),
        _align(costs),
        [f"WRONG: {line}" for line in report["wrong"]],
        [last],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _verdict(checks: list[dict[str, Any]], wrong: list[str]) -> str:
    bad = [c["part"] for c in checks if any(line.startswith(_what(c)) for line in wrong)]
    if bad:
        return f"WRONG: {', '.join(bad)}"
    done = [check["part"] for check in checks if "errors" in check]
    refused = [check["part"] for check in checks if "refused" in check]
    if len(done) == len(PARTS):
        return "right" if all(check["same_bits"] for check in checks) else "right, other bits"
    return f"{', '.join(done)} right" if done else "refused" if refused else "left out"


def _what(check: dict[str, Any]) -> str:
    return f"{check['implementation']}, {check['case']}, {check['part']}:"


def _cost(measured: dict[str, Any]) -> str:
    if "seconds" in measured:
        return f"{1e3 * measured['seconds']:.1f}, {measured['bytes'] / 2**20:.0f}"
    return next((word for word in ("refused", "failed", "left_out") if word in measured), "-").replace("_", " ")
