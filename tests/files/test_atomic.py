"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dit4dit.errors import CheckpointError, InputError
from dit4dit.files.atomic import check_file, check_folder, temp_name, whole_file, whole_folder, write_text

WAIT = 60.0
HINT = "free space"
KILLED = """
import os, signal, sys
from pathlib import Path
from dit4dit.errors import CheckpointError
from dit4dit.files.atomic import whole_file, whole_folder
whole = {"file": whole_file, "folder": whole_folder}[sys.argv[1]]
with whole(Path(sys.argv[2]), CheckpointError, "") as partial:
    (partial if sys.argv[1] == "file" else partial / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITER = """
import sys
from pathlib import Path
from dit4dit.files.atomic import whole_file
for i in range(200):
    with whole_file(Path(sys.argv[1])) as partial:
        partial.write_text(sys.argv[2] * 5000)
"""


class SafetensorError(Exception):
    """What the library of this name makes of a full disk."""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_there_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("one")
        assert not path.exists()
        assert partial.parent == path.parent, "another file system has no rename"
    assert path.read_text() == "one"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (OSError(28, "No space left on device"), CheckpointError),
        (SafetensorError("No space left on device"), CheckpointError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk", "safetensors", "bug", "Ctrl-C"],
)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path: Path, what: str, problem: BaseException, raised: type) -> None:
    path = tmp_path / "a"
    if what == "file":
        path.write_text("old")

    def fail() -> None:
        whole = {"file": whole_file, "folder": whole_folder}[what]
        with whole(path, CheckpointError, HINT) as partial:
            (partial if what == "file" else partial / "b").write_text("half")
            raise problem

    with pytest.raises(raised) as caught:
        fail()
    if raised is CheckpointError:
        reason = rf"No space left on device; \d+\.\d [GM]B free in {tmp_path}"
        assert re.fullmatch(rf"{path}: not written \({reason}\); free space", str(caught.value))
    assert names(tmp_path) == (["a"] if what == "file" else [])
    assert what == "folder" or path.read_text() == "old"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_process_that_is_killed_leaves_what_was_there(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    if what == "file":
        path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, what, path], check=False, timeout=WAIT)
    assert done.returncode == -signal.SIGKILL
    assert what == "folder" or path.read_text() == "old"
    left = [name for name in names(tmp_path) if name != "a"]
    assert len(left) == 1
    assert left[0].startswith(".a.")
    with whole_file(path) if what == "file" else whole_folder(path, CheckpointError, HINT) as partial:
        (partial if what == "file" else partial / "a").write_text("new")
    assert names(tmp_path) == [*left, "a"]


def test_two_processes_that_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1" * 5000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, word]) for word in "12"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(path.read_text())
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen | {path.read_text()} <= {"1" * 5000, "2" * 5000}
    assert names(tmp_path) == ["a"]


def test_a_folder_that_another_process_wrote_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write() -> None:
        with whole_folder(target, CheckpointError, HINT) as partial:
            (partial / "mine").write_text("")
            target.mkdir()
            (target / "theirs").write_text("")

    with pytest.raises(CheckpointError, match=r"a: not written \(.*not empty\); free space"):
        write()
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["a"]


def test_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with whole_folder(tmp_path / "a", CheckpointError, HINT) as partial:
        (partial / "b").write_text("")
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_appears_where_a_link_points(tmp_path: Path, there: bool) -> None:
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    target.parent.mkdir()
    if there:
        target.mkdir()
    link.symlink_to(target)
    with whole_folder(link, CheckpointError, HINT, durable=True) as partial:
        assert partial.parent == target.parent, "on the disk that it is to be on"
        (partial / "b").write_text("")
    assert link.is_symlink()
    assert names(target) == ["b"]
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_a_folder_that_has_no_name_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"not written .*give the new folder a name of its own"),
        whole_folder(Path(name), CheckpointError, HINT),
    ):
        pytest.fail("nothing may be written")
    assert not names(tmp_path)


def test_links_and_pipes_that_a_user_names_stay(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(WAIT)
    assert received == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(InputError, match="is a folder; give a file"):
        write_text(tmp_path, "")
    assert names(tmp_path) == ["link", "pipe", "target"]


def test_a_file_of_our_own_takes_the_place_of_a_link(tmp_path: Path) -> None:
    """A folder that was copied as links to another one, such as a run, does not write into that other one."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as partial:
        partial.write_text("new")
    assert not link.is_symlink()
    assert (target.read_text(), link.read_text()) == ("old", "new")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions(tmp_path: Path, umask: int) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    def build(partial: Path) -> None:
        assert mode(partial) == 0o700
        (partial / "below").mkdir(mode=0o500)
        (partial / "private").touch(mode=0o600)

    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "file") as partial:
            partial.write_text("")
        with whole_folder(tmp_path / "shared", CheckpointError, HINT, durable=True) as partial:
            build(partial)
        with whole_folder(tmp_path / "own", CheckpointError, HINT) as partial:
            build(partial)
    finally:
        after = os.umask(before)
    assert after == umask
    assert mode(tmp_path / "file") == 0o666 & ~umask
    shared = tmp_path / "shared"
    assert [mode(p) for p in (shared, shared / "below", shared / "private")] == [0o777 & ~umask] * 2 + [0o666 & ~umask]
    assert (mode(tmp_path / "own"), mode(tmp_path / "own" / "private")) == (0o700, 0o600)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    below = file / "deep" / "a"
    with pytest.raises(InputError, match=rf"^{below}: not written \(Not a directory\); choose another file$"):
        write_text(below, "")
    with (
        pytest.raises(CheckpointError, match=rf"^{below}: not written \(Not a directory\); {HINT}$"),
        whole_folder(below, CheckpointError, HINT),
    ):
        pass
    with pytest.raises(
        InputError, match=rf"^--out {below}: cannot be written \(Not a directory\); give another folder$"
    ):
        check_folder("--out", below)


def test_a_file_to_be_written_at_the_end_is_tried_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for good in (tmp_path / "file", tmp_path / "link", tmp_path / "new" / "a", Path("/dev/null")):
        check_file("--json", good)
    assert (tmp_path / "file").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == [], "nothing of the trial stays"
    for bad, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "a", r"cannot be written \(Not a directory\)")):
        with pytest.raises(InputError, match=rf"^--json {bad}: {why}; give "):
            check_file("--json", bad)


def test_the_file_that_could_not_be_copied_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with (
        pytest.raises(CheckpointError, match=rf"a: not written \({gone}: No such file or directory\)"),
        whole_folder(tmp_path / "a", CheckpointError, HINT),
    ):
        gone.read_bytes()


def test_temporary_names_are_hidden_and_new(tmp_path: Path) -> None:
    found = {temp_name(tmp_path / "a.json") for _ in range(100)}
    assert len(found) == 100
    assert all(path.parent == tmp_path and path.name.startswith(".a.json.") for path in found)
