"""Whole-or-nothing writing: what is on the disk before and after, whatever happens in between."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyps.engine.gguf_file import open_gguf, writing
from pyps.errors import InputError, MachineError
from pyps.files import check_writable, whole, whole_folder


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with whole(target) as partial:
        partial.write_text("new")
        assert not target.exists()
        assert partial.parent == tmp_path
        assert partial.suffix == ".txt"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    other = tmp_path / "a.txt.part"
    other.write_text("somebody else's")
    with pytest.raises(KeyError), whole(target) as partial:
        partial.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert other.read_text() == "somebody else's"
    assert sorted(tmp_path.iterdir()) == [target, other]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_the_mode_stays(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(mode)
    with whole(target) as partial:
        partial.write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with whole(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "real")
    with whole(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "real").read_text() == "new"


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 120 + ".json")
    with whole(target) as partial:
        partial.write_text("{}")
    assert target.read_text() == "{}"


def test_several_writers_at_once_all_write_whole_files(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pyps.files import whole\n"
        "for _ in range(50):\n"
        "    with whole(Path(sys.argv[1])) as partial:\n"
        "        partial.write_text(sys.argv[2] * 10000)\n"
    )
    target = tmp_path / "a"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(target), letter]) for letter in "xyz"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    text = target.read_text()
    assert len(text) == 10000
    assert len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same OSError at the same place."""
    program = (
        "import signal, resource, sys; from pathlib import Path; from pyps.files import whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with whole(Path(sys.argv[1])) as partial:\n"
        "    partial.write_bytes(bytes(5000))\n"
    )
    target = tmp_path / "a"
    target.write_text("old")
    process = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=False)
    assert "MachineError" in process.stderr
    assert "cannot be written: File too large" in process.stderr
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be written"), whole(tmp_path / "nowhere" / "a"):
        raise AssertionError("nothing is done")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with whole_folder(target) as partial:
        (partial / "a").write_text("content")
        assert not target.exists()
        assert partial.parent == target.parent
    assert (target / "a").read_text() == "content"
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    with pytest.raises(MachineError, match="folder: cannot be written"), whole_folder(tmp_path / "folder") as partial:
        raise OSError("the disk fails")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path, message in ((tmp_path, "exists"), (tmp_path / "file", "exists"), (tmp_path / "file" / "a", "cannot be")):
        with pytest.raises(InputError, match=message), whole_folder(path):
            raise AssertionError("nothing is done")
    assert (tmp_path / "file").read_text() == "old"


def test_a_gguf_file_at_once_or_piece_by_piece(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    at_once, by_pieces = tmp_path / "a.gguf", tmp_path / "b.gguf"
    with writing(at_once, "llama") as writer:
        for name in ("one", "two"):
            writer.add_tensor(name, values)
        assert not at_once.exists()
    with writing(by_pieces, "llama") as writer:
        for name in ("one", "two"):
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _ in range(2):
            writer.write_tensor_data(values)
        assert not by_pieces.exists()
    assert at_once.read_bytes() == by_pieces.read_bytes()
    with open_gguf(at_once, "model") as reader:
        assert [tensor.name for tensor in reader.tensors] == ["one", "two"]
        assert (reader.tensors[1].data == values).all()


def test_a_sealed_gguf_file(tmp_path: Path) -> None:
    def seal(file: Path) -> None:
        assert file.read_bytes()[:4] == b"GGUF"
        with file.open("ab") as end:
            end.write(b"seal")

    with writing(tmp_path / "a.gguf", "llama", seal=seal):
        pass
    assert (tmp_path / "a.gguf").read_bytes().endswith(b"seal")
    with pytest.raises(KeyError), writing(tmp_path / "b.gguf", "llama", seal=seal):
        raise KeyError
    assert list(tmp_path.iterdir()) == [tmp_path / "a.gguf"]


def test_an_unwritable_place_is_reported_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        check_writable(tmp_path / "nowhere" / "a")
    check_writable(tmp_path / "a")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="not writable"):
            check_writable(tmp_path / "a")
