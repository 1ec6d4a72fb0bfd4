"""The results of benchmarks/on_gpu.sh: one table, one JSON file.

    python benchmarks/on_gpu_summary.py FOLDER

Reads FOLDER/steps.tsv (name, status, seconds and reason of each step), logs/NAME.log and
json/NAME.json; writes summary.txt and results.json. Ends with exit code 1 if a step failed.
"""

import json
import sys
from pathlib import Path
from typing import Any


def read_steps(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: status ("passed", "FAILED" or "skipped"), seconds, detail, figures if any."""
    steps = {}
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds, reason = line.split("\t")
        figures, said = folder / "json" / f"{name}.json", ""
        if status != "skipped":
            said = last_line(folder / "logs" / f"{name}.log")
        steps[name] = {
            "status": status,
            "seconds": int(seconds),
            "detail": ": ".join(filter(None, (reason, said))),
            "figures": json.loads(figures.read_text()) if figures.exists() else None,
        }
    return steps


def last_line(log: Path) -> str:
    """What a step said at the end, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def table(steps: dict[str, dict[str, Any]]) -> str:
    """One line a step, then one of counts."""
    width = max(len(name) for name in steps)
    lines = [
        f"{name:{width}}  {step['status']:7} {step['seconds']:5} s  {step['detail']}"
        for name, step in steps.items()
    ]
    counts = {
        status: sum(step["status"] == status for step in steps.values())
        for status in ("passed", "FAILED", "skipped")
    }
    seconds = sum(step["seconds"] for step in steps.values())
    lines.append(", ".join(f"{n} {status}" for status, n in counts.items()) + f" in {seconds} s")
    return "\n".join(lines)


def main() -> int:
    folder = Path(sys.argv[1])
    steps = read_steps(folder)
    text = table(steps)
    (folder / "summary.txt").write_text(text + "\n")
    (folder / "results.json").write_text(json.dumps(steps, indent=1) + "\n")
    print(text)
    return int(any(step["status"] == "FAILED" for step in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
