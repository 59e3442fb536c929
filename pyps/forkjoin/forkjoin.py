"""ForkJoin: what programs use. A request becomes a plan (plan.py), and the plan is run (run.py)."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
from typing_extensions import Unpack

from pyps.adapters.adapter import Adapter
from pyps.engine.context import split_kv_type
from pyps.engine.find import AUTO, DEFAULT_MODEL, Progress, find_adapter, find_model, no_progress
from pyps.engine.generate import Stopped, complete, never
from pyps.engine.model import Model
from pyps.engine.positions import why_not_joinable
from pyps.engine.sampling import Sampling, draw_seed
from pyps.errors import InputError
from pyps.forkjoin.branches import Branches, as_list
from pyps.forkjoin.calibration import Calibration, calibration_of
from pyps.forkjoin.events import Completion, Done, Event, Result
from pyps.forkjoin.plan import Plan, Setting, make_plan
from pyps.forkjoin.reading import Read, Reading, check_read
from pyps.forkjoin.request import Branch, Options, Request
from pyps.forkjoin.run import Run, finish_reason
from pyps.forkjoin.slots import load_slots, read_slots, write_slots
from pyps.forkjoin.synthesis import ContextOptions
from pyps.prompts.layout import Message

_PATIENCE = 60.0  # seconds that measuring a model may take before its first run

# for a model that could not be measured, or not in that time
UNMEASURED = Reading(share=1.0, labels=True, auto=True, why="this model was not measured: see pyps doctor")


class ForkJoin:
    """Runs fork-joins on one model.

    Args:
        model: An open Model, which is closed with this object; `from_pretrained` takes names and paths.
        llama: Instead, an existing `llama_cpp.Llama`, whose model is used and which is left alone.
        adapter: Path of an adapter for the synthesizer; its mapper and LoRA are used.
        layout: "shared" or "paper"; None for the adapter's, or "shared".
        kv_type: Type of K and V: "f16", "bf16", "f32"; "q8_0" or "q4_0", smaller and, on a CPU, slower; or one of each,
            "q8_0/f16".
        n_ctx: Most cells that any sequence may need; None for what the model was trained on, and what a job needs.
        threads: Threads of each context; None for what suits the model on this machine.
        read: What synthesizers read again (Request.read), unless a run says otherwise.
        progress: Called while the model is measured, once, before its first fork-join without an adapter.

    Attributes:
        model: The model.
        adapter: The opened adapter, or None.
        layout: The prompt layout that is used.

    Raises:
        InputError: Any of these is wrong.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        llama: llama_cpp.Llama | None = None,
        adapter: str | Path | None = None,
        layout: str | None = None,
        kv_type: str = "f16",
        n_ctx: int | None = None,
        threads: int | None = None,
        read: Read = "auto",
        progress: Progress = no_progress,
    ) -> None:
        if model is None and llama is not None:
            model = Model.borrow(llama)
        elif model is None or llama is not None:
            raise InputError("give ForkJoin a model or a llama, one of the two")
        if n_ctx is not None and n_ctx < 1:
            raise InputError(f"n_ctx must be positive, not {n_ctx}")
        split_kv_type(kv_type)
        check_read(read)
        self.model = model
        self.adapter = Adapter(adapter, self.model) if adapter is not None else None
        self.layout = layout or (self.adapter.layout if self.adapter else None) or "shared"
        if self.adapter and self.adapter.layout not in (None, self.layout):
            self.adapter.warnings.append(
                f"{self.adapter.path.name} was trained for the {self.adapter.layout} layout, not for {self.layout}: "
                f"answers may be poor"
            )
        self._options = ContextOptions(kv_type=kv_type, threads=threads)
        self._n_ctx = n_ctx
        self._read, self._progress = read, progress
        self._calibration: Calibration | None = None
        self._calibration_failed = False

    @classmethod
    def from_pretrained(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        progress: Progress | None = None,
        adapter: str | Path | None = AUTO,
        layout: str | None = None,
        kv_type: str = "f16",
        n_ctx: int | None = None,
        threads: int | None = None,
        read: Read = "auto",
    ) -> "ForkJoin":
        """Open a ForkJoin on a GGUF file, on "smollm2", or on "hf:OWNER/REPO:FILE-or-QUANT".

        Args:
            name: The model.
            progress: Called while a model is fetched, prepared or measured.
            adapter: Path of an adapter; "auto" for the one that comes with pyps for this model, if there is one; None
                for none.
            layout: As ForkJoin takes it.
            kv_type: As ForkJoin takes it.
            n_ctx: As ForkJoin takes it.
            threads: As ForkJoin takes it.
            read: As ForkJoin takes it.

        Raises:
            InputError, MachineError: As find_model and ForkJoin.
        """
        check_read(read)
        split_kv_type(kv_type)  # a mistake is said before a model is loaded
        model = Model.load(find_model(name, progress) if progress else find_model(name))
        try:
            return cls(
                model,
                adapter=find_adapter(adapter, name),
                layout=layout,
                kv_type=kv_type,
                n_ctx=n_ctx,
                threads=threads,
                read=read,
                progress=progress or no_progress,
            )
        except BaseException:
            model.close()
            raise

    def __enter__(self) -> "ForkJoin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the adapter and the model; a borrowed model is left alone."""
        if self.adapter:
            self.adapter.close()
        self.model.close()

    def run(
        self, task: str | Sequence[Message], branches: Sequence[str | Branch] = (), **options: Unpack[Options]
    ) -> Result:
        """Run branches and synthesizer to the end, and return the result.

        Args:
            task: What the job is about: a text, or messages (Request.task).
            branches: Instructions, or Branch objects.
            options: join, system, synthesize, mode, compare, read, sampling, answer, save, keep, room, tools, limits
                and stopped, as Request describes them.

        Raises:
            InputError: Something is wrong or does not fit; found before any work is done.
            EngineError: llama.cpp failed.
        """
        for event in self.stream(task, branches, **options):
            if isinstance(event, Done):
                return event.result
        raise AssertionError("a stream ends with Done")

    def stream(
        self, task: str | Sequence[Message], branches: Sequence[str | Branch] = (), **options: Unpack[Options]
    ) -> Generator[Event, None, None]:
        """Run branches and synthesizer, and yield events as it goes; the last one is Done.

        Takes the same arguments and raises the same exceptions as `run`. What is wrong with the request is raised at
        once, before the first event is asked for.
        """
        request = Request(task=task, branches=branches, **options)
        return Run(self._plan(request), request.stopped).events()

    def fork(
        self,
        task: str | Sequence[Message],
        branches: Sequence[str | Branch],
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        stopped: Stopped = never,
    ) -> Branches:
        """Run branches alone, and return them with their caches.

        They can be joined by `run(…, join=…)`, as often as one likes, or saved.

        Args:
            task: As `run` takes it.
            branches: As `run` takes them.
            system: The system message, or None.
            sampling: Of the branches, or None for the defaults.
            stopped: Asked at every token; once true, the branches stay as far as they are.

        Raises:
            InputError, EngineError: As `run`.
        """
        request = Request(task=task, branches=branches, system=system, synthesize="", sampling=sampling)
        return Run(self._plan(request, answer=False), stopped).fork()

    def reading(self, read: Read | None = None, stopped: Stopped = never) -> Reading:
        """Return what a synthesizer reads again (Request.read).

        Without an adapter, a model that has never been asked for it is measured first, which takes up to a minute; the
        result is kept on disk.

        Args:
            read: A share of the tokens, 0 to 1; or "auto"; None for what this ForkJoin was made with.
            stopped: Asked while the model is measured; once true, it is not.

        Raises:
            InputError: `read` is neither.
            EngineError: llama.cpp failed.
        """
        read = self._read if read is None else read
        check_read(read)
        if read == 0:
            return Reading(why="as asked for")
        if self.adapter:
            trained = Reading(why="as the adapter was trained")
            return trained if read == "auto" else replace(trained, share=read, why="as asked for")
        if read == 1:  # which needs nothing to be known
            return Reading(share=1.0, labels=True)
        calibration = self._calibrate(stopped)
        reading = calibration.reading if calibration else UNMEASURED
        return reading if read == "auto" else replace(reading, share=float(read), auto=False, why="as asked for")

    def _calibrate(self, stopped: Stopped) -> Calibration | None:
        if self._calibration is None and not self._calibration_failed:
            self._calibration = calibration_of(
                self.model, self._options, report=self._progress, patience=_PATIENCE, stopped=stopped
            )
            self._calibration_failed = self._calibration is None and not stopped()
        return self._calibration

    def _plan(self, request: Request, *, answer: bool = True) -> Plan:
        check_read(self._read if request.read is None else request.read)
        setting = Setting(
            model=self.model,
            adapter=self.adapter,
            layout=self.layout,
            options=self._options,
            n_ctx=self._n_ctx,
            why_not_joinable=why_not_joinable(self.model),
        )
        seed = draw_seed()
        plan = make_plan(request, setting, seed, answer=answer)
        if plan.answer is None or plan.answer.mode == "text":
            return plan
        # what is wrong has been said before a model is measured, which takes its time
        reading = self.reading(request.read, request.stopped)
        return make_plan(request, replace(setting, reading=reading), seed)

    def generate(
        self,
        prompts: Sequence[str],
        n: int = 1,
        *,
        chat: bool = False,
        sampling: Sampling | None = None,
        stopped: Stopped = never,
    ) -> list[Completion]:
        """Return n completions of each prompt, many in one batch: far faster than one after the other.

        No adapter is used.

        Args:
            prompts: Texts to continue.
            n: Completions of each.
            chat: The prompts are what a user says, and the completions are answers.
            sampling: Of all; seeds count up from its own, prompt after prompt.
            stopped: Asked at every token; once true, the completions stay as far as they are.

        Returns:
            The n completions of the first prompt, then those of the second, …

        Raises:
            InputError: A prompt is empty, or does not fit.
            EngineError: llama.cpp failed.
        """
        self.model.check_generates()
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise InputError("prompts must be a list of texts")
        if n < 1:
            raise InputError(f"n must be at least 1, not {n}")
        sampling = sampling or Sampling()
        most = self._n_ctx or self.model.n_ctx_train
        tokens = []
        for prompt in prompts:
            if chat:
                prompt = self.model.render_chat([{"role": "user", "content": self.model.as_data(prompt)}])
            tokens.append(self.model.tokenize(prompt, start=True))
            if not tokens[-1]:
                raise InputError("a prompt is empty: there is nothing to continue")
            if (size := len(tokens[-1]) + sampling.max_tokens) > most:
                raise InputError(f"a prompt and its completion may need {size:,} tokens; {most:,} are possible")
        generations = complete(
            self.model,
            [t for t in tokens for _ in range(n)],
            sampling,
            draw_seed() if sampling.seed is None else sampling.seed,
            kv_type=self._options.kv_type,
            threads=self._options.threads,
            stopped=stopped,
        )
        return [
            Completion(g.text, len(g.tokens), finish_reason(g.finish_reason), str(g.error) if g.error else None)
            for g in generations
        ]

    def save(self, path: str | Path, branches: Branches | Sequence[Branches]) -> None:
        """Write branches, with their caches, into one file, whole or not at all. Raises InputError and MachineError."""
        write_slots(Path(path), as_list(branches))

    def load(self, path: str | Path) -> Branches:
        """Return the branches of a file, to be joined.

        Raises InputError if the file is damaged, or was written with another model.
        """
        return load_slots(read_slots(Path(path)), self.model, self._options.threads)
