"""Draws docs/run.svg: the end of a real `pyps run --compare`, as a terminal shows it.

python tools/picture.py
"""

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from pyps import Done, ForkJoin, Sampling
from pyps.cli.display import LiveDisplay, summary

TASK = "How can I sleep better?"
BRANCHES = ["Talk about food and drink.", "Talk about light and screens.", "Talk about exercise."]
COMMAND = f'$ pyps run "{TASK}" --compare --temperature 0.3 --seed 1 --max-tokens 90 \\\n    ' + " ".join(
    f'-b "{b}"' for b in BRANCHES
)


def main() -> None:
    live = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=112, height=60), BRANCHES)
    sampling = Sampling(temperature=0.3, seed=1, max_tokens=90)
    with ForkJoin.from_pretrained("smollm2") as fj:
        fj.run(TASK, BRANCHES, sampling=sampling, compare=True)  # warm
        for event in fj.stream(TASK, BRANCHES, sampling=sampling, compare=True):
            if isinstance(event, Done):
                result = event.result
            live.show(event)
    paper = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    paper.print(Text(COMMAND, style="bold"))
    paper.print(live.panels(whole=True))
    paper.rule("answer", align="left")
    paper.print(Text(result.answer.strip() + "\n"))
    assert result.compare is not None
    paper.rule("answer from text", align="left")
    paper.print(Text(result.compare.answer.strip() + "\n"))
    paper.print(Text(summary(result), style="bold"))
    svg = paper.export_svg(title="pyps", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # the reader's own fonts, nothing from elsewhere
    (Path(__file__).parent.parent / "docs" / "run.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
