"""`make bench`: both experiments beside plain torch, each in a process of its own, as one table of ratios; exit code 0 where both bars are met."""

import json
import pathlib
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

from research.benchmark import BUSY

BARS = {"shakespeare_char_cpu": 1.4, "mnist_cnn": 1.6}  # the most that our step may take, in steps of torch


def measured(experiment: str, arguments: list[str]) -> dict:
    """What `research.benchmark` says of this experiment."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "research.benchmark", f"experiment={experiment}", "peer=torch", f"json={file}", *arguments]
        if code := subprocess.run(command).returncode:
            raise SystemExit(code)  # it has said why
        return json.loads(file.read_text())


def verdict(result: dict) -> str:
    """Whether the bar is met; a machine that others use says nothing, whatever the ratio."""
    if (result["busy"] or 0.0) > BUSY:
        return "machine busy"
    return "met" if result["ratio"] <= BARS[result["experiment"]] else "MISSED"


def main(arguments: list[str]) -> int:
    results = [measured(experiment, arguments) for experiment in BARS]
    table = Table("ms per step", "ours", "torch", "ratio", "at most", "verdict", box=None, header_style="bold", pad_edge=False)
    for result in results:
        numbers = result["ms_per_step"], result["peer"]["ms_per_step"], result["ratio"], BARS[result["experiment"]]
        table.add_row(result["experiment"], *(f"{number:.2f}" for number in numbers), verdict(result))
    Console().print("", table)
    return int(any(verdict(result) != "met" for result in results))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
