"""The report of a finished training run, from its log: report.md, and report.png with the curves."""

import json
from pathlib import Path
from typing import Any

import yaml

from pyps.files import whole
from pyps.measure.plot import draw_training, save

REPORT, PLOT = "report.md", "report.png"


def write_report(folder: Path, log: Path) -> None:
    """Write both files of the report, from the folder's config.yaml and the log.

    Raises:
        MachineError: The disk is full or fails.
    """
    steps, held_out = read_log(log)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    save(draw_training(steps, held_out, int(config["batch_size"])), folder / PLOT)
    lines = ["# Training report", "", f"![Losses]({PLOT})", ""]
    if held_out:
        names = {
            "kl": "KL to text synthesis, nats a token",
            "kl_first": "KL on the first token, nats",
            "ce": "cross-entropy of the target, nats a token",
            "agreement": "the same most likely token",
        }
        marks = sorted({0, len(held_out) // 2, len(held_out) - 1})
        head = [f"{held_out[i]['step']:,} steps" for i in marks]
        lines += [f"| held-out examples, after | {' | '.join(head)} |", "| --- |" + " --- |" * len(marks)]
        for key, name in names.items():
            values = [f"{held_out[i]['held_out'][key]:.{'1%' if key == 'agreement' else '3f'}}" for i in marks]
            lines.append(f"| {name} | {' | '.join(values)} |")
        lines.append("")
    lines += ["```yaml", yaml.safe_dump(config, sort_keys=False).strip(), "```", ""]
    with whole(folder / REPORT) as partial:
        partial.write_text("\n".join(lines))


def read_log(log: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the entries of steps, and of measurements on held-out examples.

    After a power cut steps are done again: then the later entry counts.
    """
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            (held_out if "held_out" in entry else steps)[entry["step"]] = entry
        except (ValueError, TypeError, KeyError):
            continue  # a line that was being written when the power went
    return list(steps.values()), list(held_out.values())
