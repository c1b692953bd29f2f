"""Writes the tables of measured numbers in README.md and docs/benchmarks.md from benchmarks/results/<device>/*.json.

python scripts/render_tables.py            # write
python scripts/render_tables.py --check    # exit code 1 when a table is not what would be written
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
NONE = "Nothing has been measured with this version yet: `benchmarks/results/` holds no file. `penstock bench all` makes them."


def main(arguments: list[str]) -> int:
    """Writes or checks both documents; returns the exit code."""
    documents = sorted((ROOT / RESULTS).glob("*/*.json"))
    files = [(path.relative_to(ROOT), json.loads(path.read_text())) for path in documents]
    files = [(path, content) for path, content in files if is_operator(content)]
    stale = 0
    for name, every_case in (("README.md", False), ("docs/benchmarks.md", True)):
        path = ROOT / name
        text = path.read_text()
        if BEGIN not in text or END not in text:
            raise SystemExit(f"error: {name} lacks the lines {BEGIN} and {END}")
        before, rest = text.split(BEGIN)
        up = "../" * name.count("/")
        wanted = f"{before}{BEGIN}\n\n{tables(files, every_case, up)}\n\n{END}{rest.split(END)[1]}"
        if wanted == text:
            continue
        stale += 1
        if "--check" in arguments:
            print(f"{name} is out of date; run `make docs`")
        else:
            path.write_text(wanted)
            print(f"wrote {name}")
    return 1 if stale and "--check" in arguments else 0


def is_operator(content: Any) -> bool:
    """Whether a file holds an operator's results, made in earnest."""
    if "results" not in content or "--quick" in content["command"]:
        return False
    return any(ours(result) for result in content["results"])


def tables(files: list[tuple[Path, Any]], every_case: bool, up: str) -> str:
    """One table for each device."""
    parts = []
    for folder in sorted({path.parent for path, _ in files}):
        here = [(path, content) for path, content in files if path.parent == folder]
        parts += [conditions([content for _, content in here]), table(here, every_case, up)]
    return "\n\n".join(parts) or NONE


def conditions(contents: list[Any]) -> str:
    """Where the numbers of one device come from."""
    environments = [content["environment"] for content in contents]
    facts = [environments[0]["device"]]
    for label, values in (
        ("driver", {environment.get("driver") for environment in environments}),
        ("torch", {environment["torch"] for environment in environments}),
        ("Triton", {environment["packages"].get("triton") for environment in environments}),
        ("threads", {str(environment.get("threads", "")) for environment in environments}),
        ("", {environment["date"][:10] for environment in environments}),
    ):
        known = sorted(value for value in values if value)
        if known:
            facts.append(f"{label} {' and '.join(known)}".strip())
    copies = sorted(round(content["ceilings"]["copy"] / 1e9) for content in contents)
    reached = " to ".join(str(copy) for copy in dict.fromkeys([copies[0], copies[-1]]))
    return f"{', '.join(facts)}; copy bandwidth reached in these runs {reached} GB/s."


def table(files: list[tuple[Path, Any]], every_case: bool, up: str) -> str:
    """One row for each operator, or for each of its cases."""
    rows = ["| operator | case | implementation | µs | of the floor | peer's time over ours |", "|---|---|---|---|---|---|"]
    for path, content in files:
        results = [result for result in content["results"] if ours(result)]
        if not every_case:
            # The largest case is the one least blurred by the cost of a launch.
            results = sorted(results, key=lambda result: result["floor_us"] or 0)[-1:]
        for result in results:
            best = min(ours(result), key=lambda entry: entry["median_us"])
            floor = f"{best['of_floor']:.0%}" if best["of_floor"] else "-"
            ratios = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in best["ratios"].items()) or "-"
            link = f"[`{result['operator']}`]({up}{path.as_posix()})"
            rows.append(f"| {link} | {result['case']} | {best['name']} | {best['median_us']:.1f} | {floor} | {ratios} |")
    return "\n".join(rows)


def ours(result: Any) -> list[Any]:
    """The implementations that got a number."""
    return [entry for entry in result["timed"] if entry["kind"] == "implementation"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
