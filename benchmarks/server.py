"""Measure the whole job, from the task to the answer's last token, against llama.cpp's own server: `make bench-server`.

    python benchmarks/server.py LLAMA_SERVER [--branches 4,8] [--tokens 128] [other options of llama-server]

pyps     the branches in one batch, and the answer from their caches (the "ours" of `pyps bench`)
server   llama-server with a slot for each branch: the requests of all branches at once, which it batches, then one
         request with all their texts. Each prompt, the answer's too, goes to a slot that keeps what it has read.

Both have the same file, prompts, samplers and number of threads, and begin with nothing but the model in memory: the
server's slots are erased before each round. Its cache of former prompts in RAM is off, because nothing of it could be
used within a job, and it takes time to fill. It runs once for each of SETTINGS, and the best is compared, for each
number of branches. All sides run in turn; a server that has nothing to do sleeps.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyps import ForkJoin, Sampling
from pyps.engine.context import round_up
from pyps.engine.find import find_model
from pyps.engine.positions import why_not_joinable
from pyps.engine.tuned import tuned
from pyps.errors import InputError
from pyps.forkjoin.plan import Plan, Setting, make_plan
from pyps.forkjoin.request import Request
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.job import BRANCHES, TASK

# one cache for all slots (--kv-unified) is slower with both
SETTINGS = {
    "flash attention": ("--flash-attn", "on"),
    "no flash attention": ("--flash-attn", "off"),
}
SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")  # in this order, as in pyps


class Server:
    """A llama-server that does the job of a plan. Use it with `with`: it ends with the block, whatever happens."""

    def __init__(self, binary: Path, model: Path, plan: Plan, threads: int, options: Sequence[str]) -> None:
        assert plan.answer is not None
        self._plan, self._answer = plan, plan.answer
        texts = [""] * len(plan.branches)
        pasted = len(plan.prefix) + len(plan.layout.pasted([branch.name for branch in plan.branches], texts))
        outputs = sum(branch.max_output for branch in plan.branches)
        # of each slot; a text may have a few more tokens when it is read than when it was written
        cells = round_up(pasted + outputs * 5 // 4 + self._answer.assignment.sampling.max_tokens)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._exit = ExitStack()
        folder = self._exit.enter_context(tempfile.TemporaryDirectory())
        self._log = Path(folder, "log")
        self._command = [
            *(str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(self._port), "--offline"),
            *("--parallel", str(len(plan.branches)), "--ctx-size", str(cells * len(plan.branches))),
            *("--threads", str(threads), "--threads-batch", str(threads), "--cache-prompt", "--cache-ram", "0"),
            *("--slot-save-path", folder),  # else slots cannot be erased
            *options,
        ]

    def __enter__(self) -> "Server":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        try:
            log = self._exit.enter_context(self._log.open("wb"))
            # in a session of its own, so that Ctrl-C is for this process only, which then ends the server
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._exit.callback(_end, process)
            self._wait(process)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait until the model is loaded."""
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            try:
                if self._request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.1)
        last = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
        sys.exit(f"{' '.join(self._command)}\ndoes not come up:\n{last}")

    def job_ms(self) -> float:
        """Return the milliseconds of all requests, those of the branches at once."""
        plan = self._plan
        for slot in range(len(plan.branches)):
            self._post(f"/slots/{slot}?action=erase", {})
        with ThreadPoolExecutor(len(plan.branches)) as pool:
            began = time.perf_counter()
            prompts = [plan.prefix + branch.prompt for branch in plan.branches]
            samplings = [branch.assignment.sampling for branch in plan.branches]
            texts = list(pool.map(self._complete, range(len(prompts)), prompts, samplings))
            pasted = plan.layout.pasted([branch.name for branch in plan.branches], texts)
            self._complete(0, plan.prefix + pasted, self._answer.assignment.sampling, len(plan.prefix))
            return (time.perf_counter() - began) * 1e3

    def _complete(self, slot: int, prompt: list[int], sampling: Sampling, cached: int = 0) -> str:
        """Return what a slot continues a prompt with, of which it has read at least some tokens before."""
        answer = self._post(
            "/completion",
            {
                "prompt": prompt,
                "id_slot": slot,
                "cache_prompt": True,
                "n_predict": sampling.max_tokens,
                "ignore_eos": sampling.ignore_eos,
                "samplers": SAMPLERS,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_penalty": sampling.repeat_penalty,
                "seed": sampling.seed,
            },
        )
        timings = answer["timings"]
        # it goes on until a character is whole
        assert 0 <= timings["predicted_n"] - sampling.max_tokens < 4, timings
        assert timings["cache_n"] >= cached, timings
        assert timings["cache_n"] + timings["prompt_n"] == len(prompt), timings
        return str(answer["content"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self._request("POST", path, json.dumps(body))
        if status != 200:
            sys.exit(f"llama-server refuses {path}: {answer}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def _request(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8")
        finally:
            connection.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    finally:  # after another Ctrl-C, too
        process.kill()  # nothing, if it has ended
        process.wait()


def ours_ms(fj: ForkJoin, request: Request) -> float:
    """Return the milliseconds of a run of pyps."""
    began = time.perf_counter()
    result = fj.run(request.task, branches=list(request.branches), sampling=request.sampling, answer=request.answer)
    took = (time.perf_counter() - began) * 1e3
    assert {branch.finish_reason for branch in result.branches} == {result.finish_reason} == {"length"}
    return took


def measure(fj: ForkJoin, request: Request, plan: Plan, arguments: argparse.Namespace, options: list[str]) -> None:
    """Run all sides in turn, and print a row."""
    threads = tuned(fj.model).threads
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                Server(arguments.server, find_model(arguments.model), plan, threads, [*setting, *options])
            )
            for name, setting in SETTINGS.items()
        }
        for i in range(arguments.repeat + 1):
            print(f"{len(plan.branches)} branches, round {i} of {arguments.repeat}", file=sys.stderr, flush=True)
            took = ours_ms(fj, request)
            found = {name: server.job_ms() for name, server in servers.items()}
            if i:  # the first warms up
                ours.append(took)
                for name, value in found.items():
                    theirs[name].append(value)
    best = min(theirs, key=lambda name: statistics.median(theirs[name]))
    for name, times in theirs.items():
        if name != best:
            print(f"   {name}: {_spread(times)}", file=sys.stderr)
    ratios = [server / pyps for server, pyps in zip(theirs[best], ours, strict=True)]
    size = f"{len(plan.branches)} x {arguments.tokens}"
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{size:>12}{_spread(ours):>26}{_spread(theirs[best]):>26}{ratio:>22}  {best}", flush=True)


def _spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times):,.0f} ({min(times):,.0f} to {max(times):,.0f})"


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", type=Path, help="the program llama-server")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--branches", default="4,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    arguments, options = parser.parse_known_args()
    # a SIGTERM (of `timeout`, say) must not leave servers behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ForkJoin.from_pretrained(arguments.model) as fj:
        print(
            f"{fj.model.name}, an answer of {arguments.answer} tokens; medians of {arguments.repeat} in milliseconds, "
            f"and their spread"
        )
        print(f"{'branches':>12}{'pyps':>26}{'server':>26}{'server / pyps':>22}  the server's best setting", flush=True)
        for branches in map(int, arguments.branches.split(",")):
            request = Request(
                task=TASK,
                branches=[BRANCHES[i % len(BRANCHES)] for i in range(branches)],
                sampling=Sampling(max_tokens=arguments.tokens, seed=1, ignore_eos=True),
                answer=Sampling(max_tokens=arguments.answer, seed=1, ignore_eos=True),
                compare=True,  # text synthesis must fit the model, too
            )
            setting = Setting(
                model=fj.model,
                adapter=fj.adapter,
                layout=fj.layout,
                options=ContextOptions(kv_type="f16", threads=None),
                n_ctx=None,
                why_not_joinable=why_not_joinable(fj.model),
            )
            try:
                plan = make_plan(request, setting, 1)
            except InputError as error:
                sys.exit(str(error))
            measure(fj, request, plan, arguments, options)


if __name__ == "__main__":
    main()
