"""`make mutants` takes minutes; that each mutant still finds the line that it breaks takes none."""

from support.mutants import MUTANTS, ROOT


def test_every_mutant_finds_its_line() -> None:
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.line) == 1, mutant.name
        assert mutant.wrong != mutant.line
