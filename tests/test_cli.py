"""The command line, as a subprocess: what people and programs see, and how mistakes end."""

import contextlib
import io
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.tiny import mapper_metadata, write_adapter, write_model

from pyps import errors
from pyps.cli.common import Group, Interrupt
from pyps.cli.main import main

TASK = "Which database should a small desktop app use?"
BRANCHES = ["--branch", "Argue for SQLite.", "--branch", "Argue for PostgreSQL."]
QUICK = ["--seed", "1", "--max-tokens", "24"]
PYPS = [sys.executable, "-m", "pyps.cli"]
Done = subprocess.CompletedProcess[str]


def pyps(
    *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYPS, *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        check=False,
    )


def test_plain_text_into_a_pipe() -> None:
    done = pyps("run", TASK, *BRANCHES, *QUICK, "--compare")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    parts = re.findall(r"^\[(branch-1|branch-2|answer|answer from text)\]", done.stdout, re.MULTILINE)
    assert parts == ["branch-1", "branch-2", "answer", "answer from text"]
    cache = r"^joined \d+ tokens in \d+ ms, read \d+; first token after \d+ ms, \d+\.\d s in all"
    text = r"\. From text: read \d+; first token after \d+ ms \(\d+\.\d times as long\)$"
    assert re.search(cache + text, done.stdout, re.MULTILINE)


def test_json_keeps_its_contract() -> None:
    done = pyps("run", TASK, *BRANCHES, *QUICK, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    timing = {"branches", "join", "again", "prefill", "ttft", "total"}
    tokens = {"joined", "prefilled", "generated", "again"}
    assert {"model", "adapter", "mode", "answer", "branches", "tokens", "timing_ms", "compare"} <= set(result)
    assert isinstance(result["model"], str)
    assert result["adapter"].endswith("smollm2-135m-instruct.gguf")
    assert result["mode"] == "cache"
    assert (result["tokens"]["again"], result["reading"]) == (0, "as the adapter was trained")
    assert isinstance(result["answer"], str)
    assert set(result["tokens"]) == set(result["compare"]["tokens"]) == tokens
    assert set(result["timing_ms"]) == set(result["compare"]["timing_ms"]) == timing
    assert all(isinstance(v, float) for v in result["timing_ms"].values())
    assert [b["prompt"] for b in result["branches"]] == BRANCHES[1::2]
    for branch in result["branches"]:
        assert set(branch) == {"name", "prompt", "text", "tokens", "finish_reason", "calls", "error"}
        assert branch["finish_reason"] in ("stop", "length")
    assert result["finish_reason"] in ("stop", "length")
    assert result["compare"]["finish_reason"] in ("stop", "length")
    alone = json.loads(pyps("run", TASK, *BRANCHES, *QUICK, "--json").stdout)
    assert alone["compare"] is None
    assert alone["answer"] == result["answer"]
    text = json.loads(pyps("run", TASK, *BRANCHES, *QUICK, "--json", "--mode", "text").stdout)
    assert (text["mode"], text["tokens"]["joined"], text["timing_ms"]["join"]) == ("text", 0, 0.0)
    assert text["answer"] == result["compare"]["answer"]


def test_the_task_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "task.txt"
    file.write_text(TASK + "\n")
    outputs = [
        pyps("run", *source, *BRANCHES, *QUICK, "--json", stdin=stdin)
        for source, stdin in (
            (["--file", str(file)], None),
            (["--file", "-"], TASK),
            (["-"], TASK),
            ([], TASK),
            ([TASK], None),
        )
    ]
    assert len({json.loads(o.stdout)["answer"] for o in outputs}) == 1


def test_samples_of_one_question() -> None:
    done = pyps("run", "Name an animal.", "--branches", "3", "--temperature", "1.5", *QUICK, "--json")
    assert len({b["text"] for b in json.loads(done.stdout)["branches"]}) > 1


def test_options_reach_their_place(tmp_path: Path, tiny_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(1), pyps__layout="paper", pyps__base__name="x")
    options = ["--model", str(tiny_path), "--adapter", str(adapter), "--system", "Be brief.", "--synthesize", "Decide."]
    options += ["--top-k", "0", "--top-p", "1", "--min-p", "0", "--repeat-penalty", "1", "--threads", "1"]
    options += ["--kv-type", "f32", "--ctx", "600", "--answer-tokens", "5", "--stop", "zzz"]
    done = pyps("run", TASK, *BRANCHES, *QUICK, *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["adapter"], result["layout"]) == (str(adapter), "paper")
    assert result["tokens"]["generated"] <= 5
    assert "trained on other weights (x) than this model's (tiny)" in done.stderr


def test_an_empty_branch_is_said() -> None:
    done = pyps("run", TASK, *BRANCHES, *QUICK, "--stop", "A", "--stop", "e", "--stop", " ", "--stop", "P")
    assert done.returncode == 0, done.stderr
    assert "said nothing: joined as empty" in done.stdout


def test_on_a_terminal() -> None:
    """Branches side by side, then the answer, then the line of savings."""
    screen = ""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="30")
        os.execv(PYPS[0], [*PYPS, "run", TASK, *BRANCHES, *QUICK])
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not data:
            break
        screen += data.decode("utf-8", "replace")
    else:
        os.kill(pid, signal.SIGKILL)  # or it would wait for somebody to read, and this for its end
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "\x1b[" in screen
    titles = [line for line in screen.splitlines() if "Argue for SQLite." in line and "Argue for PostgreSQL." in line]
    assert len(titles) > 2, "drawn again and again, side by side"
    assert "answer" in screen
    assert re.search(r"joined \d+ tokens in", screen)


def _default_signals() -> None:
    # a shell that runs the tests in the background has Ctrl-C ignored, and nohup SIGHUP, and so would their children
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PYPS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        preexec_fn=_default_signals,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Until a line on stderr says so."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_ends_with_what_there_is(as_json: bool) -> None:
    # any token at all is as likely as any other: the end of a turn will not come by chance
    endless = ["--max-tokens", "3000", "--temperature", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
    arguments = ["run", TASK, *BRANCHES, *endless]
    process = start(*arguments, *(["--json"] if as_json else []), PYPS_LOG="1")
    wait_for(process, "constructing llama_context")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    if as_json:
        result = json.loads(output)
        assert result["interrupted"] is True
        assert len(result["branches"]) == 2
    else:
        assert "interrupted: this is what there is" in output
        assert "[branch-2]" in output


def test_ctrl_c_while_the_model_is_prepared(tmp_path: Path) -> None:
    process = start("run", TASK, *BRANCHES, PYPS_CACHE=str(tmp_path))
    wait_for(process, "preparing")  # llama.cpp is at it, and calls back
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert output == ""
    assert not list(tmp_path.rglob("*.gguf")), "no half model is left"


TINY_RUN = ["--read", "0", "--max-tokens", "4", "--temperature", "0"]


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_a_chat_answers_whatever_is_said(tiny_path: Path, encoding: str) -> None:
    """Every line is answered, if there is something in it."""
    lines = [b"caf\xe9?", b"And then?", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"a\0b", b"\tx\r", b"\xf0\x9f"]
    command = [*PYPS, "run", "Talk.", "-b", "a", *TINY_RUN, "-m", str(tiny_path), "--chat"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    conversations = []
    for typed in (lines, [b"\r", b"", *lines, b"  "]):
        done = subprocess.run(command, input=b"\n".join(typed), capture_output=True, timeout=60, check=False, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        conversations.append(done.stdout.split(b" s in all\n")[1])
    assert conversations[0] == conversations[1]
    assert conversations[0].count(b"\n\n") >= len(lines)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"caf\xe9?\nAnd?\n", ["caf\ufffd?", "And?"]),
        (b"\xff\xfe\nx", ["\ufffd\ufffd", "x"]),
        (b"\xf0\x9f\n", ["\ufffd"]),
        (b"\xed\xa0\x80\xc0\x80\n", ["\ufffd" * 5]),
        ("é日\r\n".encode(), ["é日"]),
        (b"a" * 65_536 + b"\nb", ["a" * 65_536, "b"]),
        (b"a" * 65_537 + b"\nb\n", [None, "b"]),
        (b"a" * 200_000, [None]),
        (b"a" * 200_000 + b"\n\nb", [None, "", "b"]),
        (b"", []),
    ],
)
def test_lines_of_standard_input(data: bytes, lines: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """None stands for a line that is refused."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict"))
    assert main.callback
    main.callback()
    read: list[str | None] = []
    with Interrupt() as interrupt:
        while len(read) <= len(lines):
            try:
                line = interrupt.read_line("")
            except errors.InputError:
                read.append(None)
                continue
            if line is None:
                break
            read.append(line)
    assert read == lines


def test_a_chat_goes_on_after_a_line_that_does_not_fit(tiny_path: Path) -> None:
    lines = ["word " * 3000, "w" * 70_000, "x" * (3 << 16), "short"]
    command = ["run", "Talk.", "-b", "a", *TINY_RUN, "-m", str(tiny_path), "--chat"]
    done = pyps(*command, stdin="\n".join(lines))
    alone = pyps(*command, stdin="short")
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr
    first, second, third = done.stderr.splitlines()
    assert "may need" in first
    assert second == third == "pyps: this line has more than 65,536 characters: it is left out"
    assert done.stdout.split(" s in all\n")[1] == alone.stdout.split(" s in all\n")[1]


@pytest.mark.parametrize(
    ("words", "redirection", "exit_code", "message"),
    [
        ("-b x", "<&-", 2, "give a task"),
        ("- -b x", "<&-", 2, "give a task"),
        ("-f - -b x", "<&-", 2, "give a task"),
        ("-b x", "</dev/null", 2, "give a task"),
        ("-b x --chat", "</dev/null", 2, "give a task"),
        ("-b x", "0>/dev/null", 2, "the task cannot be read"),
        ("-b x", "</dev/zero", 2, "the task has more than 16,777,216 characters"),
        ("-f /dev/zero -b x", "", 2, "the task has more than 16,777,216 characters"),
        ("-b x --chat", "<README.md", 2, "--chat reads what you say from standard input"),
        ("Talk. -b x --chat -m TINY", "<&-", 0, ""),
        ("Talk. -b x --chat -m TINY", "0>/dev/null", 1, "Bad file descriptor"),
        ("Talk. -b x -m TINY", "<&-", 0, ""),
    ],
)
def test_standard_input_that_is_not_there(
    tiny_path: Path, words: str, redirection: str, exit_code: int, message: str
) -> None:
    arguments = words.replace("TINY", str(tiny_path))
    script = f"{sys.executable} -m pyps.cli run {arguments} {' '.join(TINY_RUN)} {redirection}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]
ENDLESS = ["--max-tokens", "3000", "--temperature", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"]


@pytest.mark.parametrize(("number", "exit_code"), SIGNALS)
def test_signals_end_with_what_there_is(number: signal.Signals, exit_code: int) -> None:
    process = start("run", TASK, *BRANCHES, *ENDLESS, "--json", PYPS_LOG="1")
    wait_for(process, "constructing llama_context")
    time.sleep(1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    assert json.loads(output)["interrupted"] is True


def test_sigterm_while_the_model_is_prepared(tmp_path: Path) -> None:
    process = start("run", TASK, *BRANCHES, PYPS_CACHE=str(tmp_path))
    wait_for(process, "preparing")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (143, ""), errors
    assert errors.endswith("pyps: terminated\n")
    assert not list(tmp_path.rglob("*.gguf")), "no half model is left"


def test_sigterm_while_a_chat_waits(tiny_path: Path) -> None:
    command = [*PYPS, "run", "Talk.", "-b", "a", *TINY_RUN, "-m", str(tiny_path), "--chat"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_default_signals
    )
    try:
        assert process.stdout
        while " s in all" not in process.stdout.readline():
            pass
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.communicate()


WORK = """
import os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import click
from pyps.cli.common import Group, Interrupt
from pyps.files import whole

@click.command()
def work():
    with tempfile.TemporaryDirectory(dir=".") as folder, whole(Path("saved.pyps")) as partial:
        child = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            INNER
        finally:
            child.kill()

Group("pyps", commands=[work])(["work"])
"""
WAIT = """
            print("ready", flush=True)
            time.sleep(100)"""
POLL = """
            with Interrupt() as interrupt:
                print("ready", flush=True)
                while not interrupt.requested():
                    time.sleep(0.01)
            interrupt.exit_if_requested()"""
DEAF = """
            with Interrupt() as interrupt:
                print("ready", flush=True)
                while not interrupt.requested():
                    time.sleep(0.01)
                print("goes on", flush=True)
                time.sleep(100)"""


@contextlib.contextmanager
def working(inner: str, folder: Path, **handlers: signal.Handlers) -> Iterator[subprocess.Popen[str]]:
    """Run WORK until it is ready, with all signals as a terminal's shell leaves them, but for some."""

    def prepare() -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(signal.Signals[name], handlers.get(name, signal.SIG_DFL))

    process = subprocess.Popen(
        [sys.executable, "-c", WORK.replace("INNER", inner)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("inner", [WAIT, POLL, DEAF], ids=["waits", "asks", "does not ask"])
@pytest.mark.parametrize(
    ("number", "exit_code", "ignored"),
    [*((*pair, ignored) for pair in SIGNALS for ignored in (False, True)), (signal.SIGINT, 130, False)],
)
def test_signals_clean_up(tmp_path: Path, inner: str, number: signal.Signals, exit_code: int, ignored: bool) -> None:
    """Temporary folders, half files and children are gone as after Ctrl-C, also where that is ignored."""

    ctrl_c = signal.SIG_IGN if ignored else signal.SIG_DFL
    with working(inner, tmp_path, SIGINT=ctrl_c) as process:
        process.send_signal(number)
        if inner is DEAF:
            assert process.stdout
            assert process.stdout.readline() == "goes on\n"
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_signals_that_are_ignored_stay_ignored(tmp_path: Path, name: str) -> None:
    """A run under nohup does not end with its terminal."""
    with working(WAIT.replace("100", "1"), tmp_path, **{name: signal.SIG_IGN}) as process:
        process.send_signal(signal.Signals[name])
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_handlers_of_a_program_come_back() -> None:
    """A program that calls a command has its own signals afterwards."""
    outer = [signal.signal(number, signal.SIG_DFL) for number, _ in SIGNALS]
    try:
        during: list[object] = []
        look = click.Command("look", callback=lambda: during.extend(signal.getsignal(number) for number, _ in SIGNALS))
        CliRunner().invoke(Group("pyps", commands=[look]), ["look"])
        assert [signal.getsignal(number) for number, _ in SIGNALS] == [signal.SIG_DFL] * 2
        assert len(during) == 2
        assert all(map(callable, during))
    finally:
        for (number, _), handler in zip(SIGNALS, outer, strict=True):
            signal.signal(number, handler)


def test_a_server_is_stopped_by_sigterm(tmp_path: Path, tiny_path: Path) -> None:
    (tmp_path / "server.py").write_text(
        "import os, signal, time\nopen('pid', 'w').write(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\ntime.sleep(1000)\n"
    )
    (tmp_path / "w.yaml").write_text(
        f"steps: [{{name: a, task: x, branches: [{{prompt: x, tools: [{{mcp: [{sys.executable}, server.py]}}]}}]}}]\n"
    )
    process = start("run", str(tmp_path / "w.yaml"), "-m", str(tiny_path), "--read", "0")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):  # nobody asks while a server starts: the second one ends it
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.gguf").write_text("This is not a model.")
    (folder / "empty.gguf").write_bytes(b"")
    whole = tiny_path.read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "header.gguf").write_bytes(whole[:300])
    write_adapter(folder / "qwen3.gguf", arch="qwen3")
    write_adapter(folder / "wide.gguf", n_embd=128)
    write_adapter(folder / "mapper.gguf", mapper={**mapper_metadata(1), "pyps.mapper.b2": [1.0]})
    adapter = write_adapter(folder / "good.gguf").read_bytes()
    (folder / "cut-adapter.gguf").write_bytes(adapter[: len(adapter) - 500])
    write_model(folder / "mamba.gguf", "mamba")
    (folder / "latin1.txt").write_bytes(b"\xe9t\xe9")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("TASK BRANCHES --model nowhere.gguf", "nowhere.gguf: no such model file"),
        ("TASK BRANCHES --model text.gguf", "text.gguf: not a GGUF file"),
        ("TASK BRANCHES --model empty.gguf", "empty.gguf: not a GGUF file"),
        ("TASK BRANCHES --model cut.gguf", "cut.gguf: llama.cpp cannot load this model"),
        ("TASK BRANCHES --model header.gguf", "header.gguf: llama.cpp cannot load this model"),
        ("TASK BRANCHES --model mamba.gguf", "'mamba' models cannot be joined: it keeps a recurrent state"),
        ("TASK BRANCHES --model hf:nobody", "write hf:OWNER/REPO:FILE.gguf"),
        ("TASK BRANCHES --model TINY --adapter nowhere.gguf", "nowhere.gguf: no such adapter file"),
        ("TASK BRANCHES --model TINY --adapter text.gguf", "text.gguf: not a GGUF file"),
        ("TASK BRANCHES --model TINY --adapter cut-adapter.gguf", "cut-adapter.gguf: the file is"),
        ("TASK BRANCHES --model TINY --adapter qwen3.gguf", "made for 'qwen3' models"),
        ("TASK BRANCHES --model TINY --adapter wide.gguf", "cannot use this LoRA"),
        ("TASK BRANCHES --model TINY --adapter mapper.gguf", "pyps.mapper.b2"),
        ("TASK", "there are no branches"),
        ("TASK --branches 0", "at least 1"),
        ("TASK --branches 300 --model TINY", "300 branches are too many"),
        ("TASK BRANCHES --branches 2", "not both"),
        ("BRANCHES", "give a task"),
        ("TASK --file latin1.txt BRANCHES", "not both"),
        ("--file latin1.txt BRANCHES", "cannot be read"),
        ("--file nowhere.txt BRANCHES", "cannot be read"),
        ("EMPTY BRANCHES --model TINY", "the task is empty"),
        ("TASK BRANCHES --model TINY --ctx 100", "may need"),
        ("TASK BRANCHES --model TINY --ctx 0", "n_ctx must be positive"),
        ("TASK BRANCHES --model TINY --max-tokens 5000", "was trained on 2,048"),
        ("TASK BRANCHES --model TINY --max-tokens 0", "max_tokens must be at least 1"),
        ("TASK BRANCHES --model TINY --threads 0", "threads must be between"),
        ("TASK BRANCHES --model TINY --kv-type q2_k", "'q2_k' is not supported: choose one of f16"),
        ("TASK BRANCHES --model TINY --kv-type q8_0", "tiny.gguf cannot have q8_0 keys"),
        ("TASK BRANCHES --model TINY --temperature -1", "temperature must be"),
        ("TASK BRANCHES --model TINY --seed -5", "seed must be"),
        ("TASK BRANCHES --model TINY --mode text --compare", "compare"),
        ("TASK BRANCHES --no-such-option", "No such option"),
    ],
)
def test_mistakes_end_with_one_clear_line(files: Path, tiny_path: Path, arguments: str, message: str) -> None:
    words: list[str] = []
    for word in arguments.split():
        expanded = {"TASK": [TASK], "BRANCHES": BRANCHES, "TINY": [str(tiny_path)], "EMPTY": [" "]}.get(word, [word])
        words += [str(files / w) if w.endswith((".gguf", ".txt")) and "/" not in w else w for w in expanded]
    done = pyps("run", *words, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_network_is_no_mistake_of_the_user() -> None:
    done = pyps("run", TASK, *BRANCHES, "--model", "hf:nobody/nothing:Q8_0", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1, done.stderr
    assert "cannot be fetched from the hub" in done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_that_are_not_text() -> None:
    """Bytes that are not UTF-8 end up as question marks, not as an exception."""
    command: list[str | bytes] = [*PYPS, "run", b"caf\xe9 or tea?", "--branch", b"x\xff", *QUICK]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()


def test_help_and_version() -> None:
    assert "run" in pyps("--help").stdout
    text = pyps("run", "--help").stdout
    for option in (
        "--branch",
        "--branches",
        "--file",
        "--system",
        "--synthesize",
        "--model",
        "--adapter",
        "--mode",
        "--layout",
        "--compare",
        "--ctx",
        "--threads",
        "--kv-type",
        "--seed",
        "--json",
    ):
        assert option in text
    assert re.match(r"pyps, version \d+\.\d+\.\d+", pyps("--version").stdout)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.InputError("it is wrong"), 2),
        (errors.RefusedError("it is wrong"), 2),
        (errors.MachineError("it is wrong"), 1),
        (errors.EngineError("it is wrong"), 1),
        (OSError("it is wrong"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_failure_ends_with_its_exit_code(error: BaseException, exit_code: int) -> None:
    """One line on stderr, from commands and from commands of groups alike."""

    def fail() -> None:
        raise error

    group, inner = Group("pyps"), click.Group("inner")
    group.add_command(click.Command("fail", callback=fail))
    group.add_command(inner)
    inner.add_command(click.Command("fail", callback=fail))
    for words in (["fail"], ["inner", "fail"]):
        result = CliRunner().invoke(group, words)
        assert result.exit_code == exit_code
        assert result.stderr.startswith("pyps: ")
        assert result.stderr.count("\n") == 1
        assert not result.stdout
        assert "it is wrong" in result.stderr or isinstance(error, (MemoryError, KeyboardInterrupt))


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PYPS, "new", "compare", str(tmp_path / "w.yaml")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),  # of any one file; more fails
        check=False,
    )
    assert done.returncode == 1
    assert "w.yaml: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    nowhere = pyps("new", "compare", str(tmp_path / "no" / "w.yaml"))
    assert nowhere.returncode == 2
    assert "there is no folder" in nowhere.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "w.yaml", "--set", "x"], "Invalid value for '--set': 'x' is not of the form NAME=VALUE"),
        (
            ["convert", "a", "-o", "b", "--weights", "1,y"],
            "Invalid value for '--weights': '1,y' is not a list of numbers",
        ),
        (["convert", "a", "-o", "b", "--weights", ""], "Invalid value for '--weights': '' is not a list of numbers"),
    ],
)
def test_values_that_cannot_be_read(words: list[str], message: str) -> None:
    done = pyps(*words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    done = pyps("bench", "--plot", "x.png", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "no matplotlib here" in done.stderr
    assert "pip install 'pyps-llama[plot]'" in done.stderr
    assert "pip install '.[plot]'" in done.stderr
