"""Breaks the implementation on purpose, one line at a time, and sees whether the tests notice: `make mutants`.

A test that cannot fail shows nothing. Each mutant is one changed line in a copy of the repository that has an
environment of its own; the tests named with it must fail there, and pass while all lines are as they are. With
arguments: only the mutants in whose names they occur.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    """A line of a file, what it is changed to, and the tests that must notice."""

    name: str
    file: str
    line: str  # as it is, or several
    wrong: str
    tests: tuple[str, ...]


ROTATION = "tests/test_join.py::test_contents_after_rotation_and_mapping"
MOVED = "tests/test_join.py::test_a_moved_span_is_what_llama_cpp_computes_there"
TRIED = "tests/test_join.py::test_which_layers_have_positions_is_found_by_trying"
ORACLE = "tests/test_oracle.py"
SYNTHESIS = "tests/test_train_synthesis.py"
KERNELS = "tests/test_kernels.py"

MUTANTS = [
    Mutant(
        "the rotation has the wrong sign",
        "native/plan.cpp",
        "shift.insert(shift.end(), part.n_cells, part.delta);",
        "shift.insert(shift.end(), part.n_cells, -part.delta);",
        (ROTATION, TRIED),
    ),
    Mutant(
        "the Hadamard matrices are skipped",
        "native/layer_graph.cpp",
        "    if (!matrix) {",
        "    if (matrix || !matrix) {",
        ("tests/test_join.py::test_contents_of_quantised_caches", f"{ORACLE}[llama-64-q8_0-flash_attn-equal-lora]"),
    ),
    Mutant(
        "V is left unmapped",
        "native/layer_graph.cpp",
        "    return mapped(v, p, &Affine::a_v, &Affine::b_v);",
        "    (void) p; return v;",
        (ROTATION, f"{ORACLE}[llama-f32-prefix-equal-mapped-lora]"),
    ),
    Mutant(
        "the mapper's layer is off by one",
        "native/plan.h",
        "data[span * n_layers + layer]",
        "data[span * n_layers + (layer + 1) % n_layers]",
        (ROTATION, f"{ORACLE}[llama-f32-prefix-equal-mapped-lora]"),
    ),
    Mutant(
        "in one graph for all, spans are mapped as the first one",
        "native/layer_graph.cpp",
        "const Affine & first = coefficients_.at(p.first_span + i, from_.number);",
        "const Affine & first = coefficients_.at(p.first_span, from_.number);",
        (ROTATION,),
    ),
    Mutant(
        "global layers are turned by the sliding window's RoPE base",
        "native/llama_cache.cpp",
        "model.get_rope_freq_base(cp, il)",
        "model.get_rope_freq_base(cp, 0)",
        ("tests/test_join.py::test_both_caches_of_a_sliding_window_model",),
    ),
    Mutant(
        "YaRN's magnitude is applied twice",
        "native/layer_graph.cpp",
        "r.ext_factor == 0.0f ? 1.0f : 1.0f / (1.0f + 0.1f * logf(1.0f / r.freq_scale));",
        "1.0f;",
        (f"{MOVED}[llama-yarn]", f"{ORACLE}[gpt-oss-f32-prefix-equal-mapped-lora]"),
    ),
    Mutant(
        "layers without positions are turned",
        "pyps/engine/positions.py",
        "rotated.append(False)",
        "rotated.append(True)",
        (TRIED, "tests/test_join.py::test_every_layer_is_turned_by_its_own_rope"),
    ),
    Mutant(
        "keys that RoPE does not explain are accepted",
        "pyps/engine/positions.py",
        "elif _same(moved, k1):",
        "elif True:",
        ("tests/test_join.py::test_models_that_cannot_be_joined_are_refused_by_name",),
    ),
    Mutant(
        "what is queued is not carried out first",
        "native/join.cpp",
        "    src.settle();\n    dst.settle();",
        "",
        (
            "tests/test_join.py::test_a_queued_copy_does_not_overwrite_joined_cells",
            "tests/test_interference.py::test_a_past_changes_nothing",
        ),
    ),
    Mutant(
        "what an aborted join has written stays",
        "native/join.cpp",
        "            job.dst.zero(job.reservation);",
        "",
        ("tests/test_join.py::test_an_aborted_join_leaves_the_destination_as_it_was",),
    ),
    Mutant(
        "contexts with other RoPE settings are accepted",
        "native/join.cpp",
        "if (!(from[i].rope == to[i].rope)) {",
        "if (false) {",
        (
            "tests/test_join.py::test_long_rope_does_not_mix",
            "tests/test_join.py::test_contexts_that_encode_positions_differently_are_refused",
        ),
    ),
    Mutant(
        "cells are taken in the order of the cache, not of positions",
        "native/plan.cpp",
        "            p.src.push_back(c);",
        "            p.src.insert(std::upper_bound(p.src.begin(), p.src.end(), c, by_index), c);",
        ("tests/test_join.py::test_any_joins_do_what_the_model_says",),
    ),
    Mutant(
        "training turns the branches the wrong way",
        "pyps/data/tokens.py",
        "            delta += [to - len(self.prefix) - len(prompt)] * n",
        "            delta += [len(self.prefix) + len(prompt) - to] * n",
        (f"{SYNTHESIS}::test_it_computes_what_the_oracle_computes[llama]",),
    ),
    Mutant(
        "spans in order all begin at the branch point",
        "pyps/forkjoin/synthesis.py",
        "[branch_point + sum(lengths[:i]) + sum(before[: i + 1]) for i in range(len(lengths))]",
        "[branch_point] * len(lengths)",
        ("tests/test_forkjoin.py::test_an_adapter_is_used_by_the_synthesizer_only[True]",),
    ),
    Mutant(
        "no gradient reaches the mapper",
        "pyps/train/synthesis.py",
        "            a_k, b_k, a_v, b_v = _columns(table[:, i][span])",
        "            a_k, b_k, a_v, b_v = _columns(table[:, i][span].detach())",
        (f"{SYNTHESIS}::test_gradients_through_the_join",),
    ),
    Mutant(
        "kept K and V change places",
        "pyps/train/encoded.py",
        "        k, v = cells.view(2, layers, heads, -1, head_dim)",
        "        v, k = cells.view(2, layers, heads, -1, head_dim)",
        ("tests/test_train.py::test_a_disk_without_room_for_what_is_kept",),
    ),
    Mutant(
        "a resumed run begins its learning rate anew",
        "pyps/train/trainer.py",
        '        self._schedule.load_state_dict(state["schedule"])',
        "        pass",
        ("tests/test_train.py::test_an_interrupted_run_ends_as_one_that_was_not",),
    ),
    Mutant(
        "rows of q and k stay as they are",
        "convert/lora.py",
        "        return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)",
        "        return b",
        ("tests/test_convert.py::test_peft_directories[llama]",),
    ),
    Mutant(
        "rsLoRA is taken for LoRA",
        "convert/peft.py",
        '        scaling = module_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)',
        "        scaling = module_alpha / rank",
        ("tests/test_convert.py::test_ranks_and_alphas_that_differ_between_layers[config2]",),
    ),
    Mutant(
        "a mapper's file may hold a program",
        "convert/peft.py",
        '        state = torch.load(path, map_location="cpu", weights_only=True)',
        '        state = torch.load(path, map_location="cpu", weights_only=False)',
        ("tests/test_convert.py::test_no_program_in_a_checkpoint_is_run",),
    ),
    Mutant(
        "KL divergence the other way round",
        "pyps/forkjoin/comparison.py",
        "(np.exp(reference) * (reference - other)).sum(-1)",
        "(np.exp(other) * (other - reference)).sum(-1)",
        ("tests/test_evaluate.py::test_measures_are_those_of_pytorch[shared]",),
    ),
    Mutant(
        "V is written to disk as it lies in the cache",
        "native/rows.cpp",
        "        transpose(v, channels.data(), l.n_embd_v, run.n, size);",
        "        std::memcpy(v, channels.data(), channels.size());",
        ("tests/test_slots.py::test_every_cell_survives[off-llama-f16]",),
    ),
    Mutant(
        "the hash of a file is not looked at",
        "pyps/forkjoin/slots.py",
        "_hash(path, size) != _tail(path)",
        "False",
        ("tests/test_slots.py::test_the_command_line",),
    ),
    Mutant(
        "branches of one context are mapped as those of another",
        "pyps/forkjoin/synthesis.py",
        "None if coefficients is None else coefficients[branch_of_span]",
        "None if coefficients is None else coefficients[: len(branch_of_span)]",
        ("tests/test_joins_of_joins.py::test_its_caches_are_the_oracles[qwen2]",),
    ),
    Mutant(
        "what is left out of a branch leaves a gap",
        "pyps/forkjoin/synthesis.py",
        "        n += end - first\n",
        "        n += end - first + 1\n",
        ("tests/test_agent.py::test_what_is_joined[generated]",),
    ),
    Mutant(
        "one sequence's failure ends all",
        "pyps/engine/generate.py",
        "                member.fail(error)\n",
        "                raise error\n",
        (
            "tests/test_lock_step.py::test_a_failure_ends_its_sequence_only",
            "tests/test_lock_step.py::test_a_branch_that_fails_leaves_the_others",
        ),
    ),
    Mutant(
        "a branch with a task of its own forks from the whole prefix",
        "pyps/forkjoin/run.py",
        "            if branch.fork_point < len(plan.prefix):",
        "            if False:",
        ("tests/test_forkjoin.py::test_a_branch_of_its_own_reads_what_it_is_told",),
    ),
    Mutant(
        "unsigned weights are not corrected",
        "native/kernels/product.h",
        "columns.offset[at] = -product.offset * (first + second);",
        "columns.offset[at] = 0 * (first + second);",
        (f"{KERNELS}::test_products_of_any_size[Q8_0]", f"{KERNELS}::test_the_default_model_says_what_it_says_without"),
    ),
    Mutant(
        "the second half of a block has the first one's scale",
        "native/kernels/product.h",
        "L::mul(scale, L::load(panel.scale[i * groups + g]))",
        "L::mul(scale, L::load(panel.scale[i * groups]))",
        (f"{KERNELS}::test_products_of_any_size[Q6_K]",),
    ),
    Mutant(
        "the weights' minimum is left out",
        "native/kernels/product.h",
        "sum[j] = L::fma(L::load(panel.minimum[i]), L::set(columns.sum[at + j]), sum[j]);",
        "",
        (f"{KERNELS}::test_products_of_any_size[Q4_K]", f"{KERNELS}::test_products_of_any_size[Q5_1]"),
    ),
    Mutant(
        "what is no number becomes one",
        "native/kernels/product.h",
        'scale = __builtin_nanf("");',
        "scale = 0.0f;",
        (f"{KERNELS}::test_zeros_great_and_small_values_and_what_is_no_number[Q8_0-avx2]",),
    ),
    Mutant(
        "what attention has summed is not scaled down",
        "native/kernels/attention.h",
        "            partial.sum *= factor;",
        "",
        (f"{KERNELS}::test_attention_of_any_size", f"{KERNELS}::test_attention_is_exact_but_for_rounding"),
    ),
    Mutant(
        "hidden cells are read",
        "native/kernels/attention.h",
        "            s            = L::hide(L::fma(m, L::set(slope), s), m);",
        "            s            = L::fma(m, L::set(slope), s);",
        (f"{KERNELS}::test_what_lies_in_hidden_cells_does_not_matter",),
    ),
    Mutant(
        "the last tokens are taken for those of a full share",
        "native/kernels/attention_node.cpp",
        "std::min(cut.tokens, n_tokens - i_tokens * cut.tokens) * cut.group",
        "cut.tokens * cut.group",
        (f"{KERNELS}::test_attention_of_any_size",),
    ),
    Mutant(
        "the variable is not looked at",
        "pyps/engine/kernels.py",
        "use(choice or best)",
        "use(best)",
        (f"{KERNELS}::test_names_that_there_are_not", f"{KERNELS}::test_the_variable_and_the_doctor"),
    ),
    Mutant(
        "what is read again is read in the wrong order",
        "native/decode_at.cpp",
        "return a.pos < b.pos;",
        "return a.pos > b.pos;",
        (f"{ORACLE}[llama-f32-prefix-mapped]",),
    ),
    Mutant(
        "what an aborted reading has written stays",
        "native/llama_cache.cpp",
        "            caches_[c].release(reservations[c]);",
        "            (void) c;",
        ("tests/test_decode_at.py::test_an_aborted_one_leaves_the_sequence_as_it_was",),
    ),
    Mutant(
        "reading again forgets the logits of the last decode",
        "native/llama_cache.cpp",
        "    outputs = before;",
        "    (void) before;",
        ("tests/test_decode_at.py::test_an_aborted_one_leaves_the_sequence_as_it_was",),
    ),
    Mutant(
        "keys are corrected where they stand",
        "native/layer_graph.cpp",
        "            k = turned(k, p.back);",
        "            (void) 0;",
        (f"{ORACLE}[llama-f32-prefix-mapped]", f"{ORACLE}[gemma3-64-f16-prefix-mapped]"),
    ),
    Mutant(
        "V is left uncorrected",
        "native/layer_graph.cpp",
        "            v = corrected(v, correction_->a_v, correction_->b_v);",
        "            (void) 0;",
        (f"{ORACLE}[llama-f32-prefix-mapped]",),
    ),
    Mutant(
        "what was written half-way stays beside the file",
        "pyps/files.py",
        "partial.unlink(missing_ok=True)",
        "pass",
        ("tests/test_files.py::test_a_failure_leaves_the_old_file_and_nothing_else",),
    ),
    Mutant(
        "control tokens in data are control tokens",
        "pyps/engine/model.py",
        '        return self._control.sub(lambda match: f"\\ue001{match[0]}\\ue002", text)',
        "        return text",
        (
            "tests/test_layout.py::test_control_tokens_in_data_stay_text",
            "tests/test_agent.py::test_tool_results_stay_data",
        ),
    ),
]


class Workshop:
    """An environment with a pyps of its own, built from a copy of the repository, in which lines can be changed.

    A line of Python is changed where it is installed; only one of native/ needs a build, which compiles what changed.
    """

    def __init__(self, folder: Path) -> None:
        self._source, self._tests, venv = folder / "source", folder / "tests", folder / "venv"
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listing.split():
            for copy in (self._source, self._tests):
                # tests run without these sources, which they would import instead of what was built from them
                if copy == self._source or not name.startswith("pyps/"):
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        self._python = venv / "bin" / "python"
        # everything but pyps comes from here; a path in a .pth file does not bring our editable pyps along
        words = [str(self._python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self._installed = Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())
        (self._installed / "parent.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
        # beside pyps, as its libraries expect
        (self._installed / "llama_cpp").symlink_to(Path(sysconfig.get_path("purelib"), "llama_cpp"))
        # where they stay for the next build: a build environment of pip's own is another one each time
        self._pip("--ignore-installed", "scikit-build-core>=0.11", "nanobind>=2.4", "cmake", "ninja")
        self._build()

    def _pip(self, *words: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self._python), "install", "--quiet"]
        subprocess.run([*pip, *words], check=True, env=self._env)

    @property
    def _env(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self._python.parent}{os.pathsep}{os.environ['PATH']}"}

    def _build(self) -> None:
        # without bytecode, which could outlive the line it was compiled from
        self._pip("--no-deps", "--force-reinstall", "--no-build-isolation", "--no-compile", str(self._source))

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Change the line for as long as the block takes."""
        native = mutant.file.startswith("native/")
        folder = self._source if native else self._installed
        path = folder / (f"pyps/{mutant.file}" if mutant.file.startswith("convert/") else mutant.file)
        text = path.read_text(encoding="utf-8")
        assert text.count(mutant.line) == 1, f"{mutant.file} does not have this once: {mutant.line}"
        path.write_text(text.replace(mutant.line, mutant.wrong), encoding="utf-8")
        try:
            if native:
                self._build()
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def failures(self, tests: Sequence[str]) -> list[str]:
        """Return those of the tests that fail. "file.py[case]" is a case of the file's only test."""
        failed = []
        for test in tests:
            words = [test]
            if "[" in test and "::" not in test:
                file, case = test.removesuffix("]").split("[")
                words = [file, "-m", "exact or not exact", "-k", f"[{case}]"]
            done = subprocess.run(
                [self._python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words],
                cwd=self._tests,
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            )
            # 1: tests have failed. Negative: the process died, which is noticed, too. Others: pytest could not run them
            if done.returncode == 1 or done.returncode < 0:
                failed.append(test)
            elif done.returncode:
                raise SystemExit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
        return failed


def main() -> None:
    chosen = [m for m in MUTANTS if all(word in m.name for word in sys.argv[1:])]
    chosen.sort(key=lambda m: m.file.startswith("native/"))  # last, so that Python's run on the code as it is
    tests = tuple(dict.fromkeys(t for m in chosen for t in m.tests))
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        if failed := workshop.failures(tests):
            raise SystemExit(f"fail without a mutant: {', '.join(failed)}")
        print(f"{len(tests)} tests pass on the code as it is", flush=True)
        for mutant in chosen:
            with workshop.changed(mutant):
                failed = workshop.failures(mutant.tests)
            print(mutant.name, *(f"  {'caught by' if t in failed else 'NOT BY'} {t}" for t in mutant.tests), sep="\n")
            sys.stdout.flush()
            if len(failed) < len(mutant.tests):
                survived.append(mutant.name)
    if survived:
        raise SystemExit(f"not noticed: {'; '.join(survived)}")
    print(f"{len(chosen)} mutants, all noticed")


if __name__ == "__main__":
    main()
