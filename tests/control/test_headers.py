"""The C++ headers as installed: where they are, and that a user's compiler takes them with the flags that users have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dit4dit

HEAVY = {"numpy", "torch", "tyro", "yaml"}
LIBRT = {"shm_open", "shm_unlink", "timer_create", "timer_delete", "timer_settime", "timer_gettime", "mq_open"}
"""Of what programs for real time call, the part that glibc before 2.34 has in librt; of clock_* that was before 2.17."""
PAIR = ("exact_begin.h", "exact_end.h")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")


def asked(*options: str, cwd: Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """python -m dit4dit.control OPTIONS, away from the source tree."""
    command = [sys.executable, *python, "-m", "dit4dit.control", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = asked("--include-dir", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.rstrip("\n"))


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("--include-dir", ["dit4dit/action_stream.h", "dit4dit/layout.h", "dit4dit/reader.h", "dit4dit/writer.h"]),
        ("--cmake-dir", ["dit4ditConfig.cmake", "dit4ditConfigVersion.cmake"]),
    ],
)
def test_it_prints_one_folder_and_nothing_else(option: str, wanted: list[str], tmp_path: Path) -> None:
    done = asked(option, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    folder = Path(line)
    assert folder.is_absolute()
    assert not [name for name in wanted if not (folder / name).is_file()]


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    script = """
import runpy, sys
sys.argv[1:] = ["--cmake-dir"]
try:
    runpy.run_module("dit4dit.control", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "dit4dit" in names
    assert not names & HEAVY


@pytest.mark.parametrize(
    ("present", "says"),
    [
        ([], "start elsewhere, or pip install -e ."),
        (["_C.so"], "the installation is incomplete: pip install --force-reinstall dit4dit"),
    ],
    ids=["source tree", "no headers"],
)
@pytest.mark.parametrize("option", ["--include-dir", "--cmake-dir"])
def test_without_headers_it_says_what_to_do(
    option: str, present: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    source = Path(dit4dit.__file__).parent
    for name in ("__init__.py", "control/__init__.py", "control/__main__.py"):
        (tmp_path / "dit4dit" / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / name, tmp_path / "dit4dit" / name)
    for name in present:
        (tmp_path / "dit4dit" / name).touch()
    done = asked(option, cwd=tmp_path, python=("-S",))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("python -m dit4dit.control: error: ")
    assert done.stderr.endswith(f"{says}\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("--include-dir", "include/dit4dit/action_stream.h"), ("--cmake-dir", "cmake/dit4ditConfig.cmake")],
)
def test_from_the_source_tree_it_finds_the_installed_package(
    option: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """examples/cpp_controller/README.md asks from there."""
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in (source, site):
        for name in ("__init__.py", "control/__init__.py", "control/__main__.py"):
            (folder / "dit4dit" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(dit4dit.__file__).parent / name, folder / "dit4dit" / name)
    for name in ("_C.so", wanted):
        (site / "dit4dit" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "dit4dit" / name).touch()
    monkeypatch.setenv("PYTHONPATH", str(site))
    done = asked(option, cwd=source, python=("-S",))
    assert (done.stderr, done.stdout) == ("", f"{site / 'dit4dit' / wanted.partition('/')[0]}\n")


def test_every_header_that_is_included_is_installed(include: Path) -> None:
    headers = [*(include / "dit4dit").glob("*.h")]
    assert len(headers) >= 8
    for header in headers:
        for name in re.findall(r'^#include "(.+)"', header.read_text(), re.MULTILINE):
            assert (header.parent / name).is_file(), f"{header.name} includes {name}"


# -- compilers -------------------------------------------------------------------------------------
# Two files that both include everything: what is not inline is there twice then, and what differs between them shows.
ONE = """
#include <dit4dit/action_stream.h>
std::size_t dims_of(const dit4dit::Reader& reader);
int main() {
    dit4dit::Options options;
    options.name = "/dit4dit.there-is-no-such-stream";
    const auto reader = dit4dit::Reader::open(options);
    if (reader) return static_cast<int>(dims_of(*reader));
    return reader.error().find(options.name) == std::string::npos ? 2 : 0;
}
"""
OTHER = """
#include <dit4dit/action_stream.h>
std::size_t dims_of(const dit4dit::Reader& reader);
std::size_t dims_of(const dit4dit::Reader& reader) { return reader.dims() + sizeof(dit4dit::Writer); }
"""


@pytest.fixture(params=["g++", "clang++"])
def compiler(request: pytest.FixtureRequest) -> str:
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"no {request.param} on PATH")
    return found


def compiled(compiler: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [compiler, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})


def test_two_files_of_one_program(compiler: str, include: Path, tmp_path: Path) -> None:
    (tmp_path / "one.cpp").write_text(ONE)
    (tmp_path / "other.cpp").write_text(OTHER)
    program = tmp_path / "program"
    done = compiled(
        compiler,
        "-std=c++17",
        *WARNINGS,
        f"-I{include}",
        tmp_path / "one.cpp",
        tmp_path / "other.cpp",
        "-o",
        program,
        "-pthread",
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert subprocess.run([program], check=False).returncode == 0, "no such stream, and the message names it"

    listed = subprocess.run(["nm", "-uC", program], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert "mmap" in needed
    assert not needed & LIBRT, "dit4ditConfig.cmake would have to link librt"


@pytest.mark.parametrize(
    "flags",
    [
        ("-std=c++17", "-O2", "-fno-rtti", "-fno-exceptions"),
        ("-std=c++20", "-O2"),
        ("-std=gnu++17", "-O3", "-march=native"),
        ("-std=c++17", "-O2", "-Wconversion", "-Wsign-conversion", "-Wold-style-cast", "-Wdouble-promotion"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_flags_that_users_have(flags: tuple[str, ...], compiler: str, include: Path, tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text(OTHER)
    done = compiled(
        compiler, *flags, *WARNINGS, f"-I{include}", "-c", tmp_path / "other.cpp", "-o", tmp_path / "other.o"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_each_header_stands_alone(compiler: str, include: Path, tmp_path: Path) -> None:
    for header in sorted({*(include / "dit4dit").glob("*.h")} - {include / "dit4dit" / name for name in PAIR}):
        alone = tmp_path / f"{header.stem}.cpp"
        alone.write_text(f"#include <dit4dit/{header.name}>\n#include <dit4dit/{header.name}>\n")
        done = compiled(compiler, "-std=c++17", *WARNINGS, f"-I{include}", "-fsyntax-only", alone)
        assert done.returncode == 0, f"{header.name}: {done.stderr}"


def test_the_exact_pair_changes_nothing_behind_it(include: Path) -> None:
    """Who has the one has the other: code of a user behind our headers is compiled by the user's flags."""
    for header in (include / "dit4dit").glob("*.h"):
        found = re.findall(r'^#include "(exact_\w+\.h)"', header.read_text(), re.MULTILINE)
        assert found in ([], list(PAIR)), header.name


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
def test_fast_math_is_refused(flag: str, compiler: str, include: Path, tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text(OTHER)
    # the preprocessor alone: what is wrong shows before anything else could
    done = compiled(compiler, "-std=c++17", flag, f"-I{include}", "-E", tmp_path / "other.cpp", "-o", tmp_path / "out")
    assert done.returncode != 0
    assert "compile this file without" in done.stderr
    allowed = compiled(
        compiler, "-std=c++17", "-O2", f"-I{include}", "-E", tmp_path / "other.cpp", "-o", tmp_path / "out"
    )
    assert allowed.returncode == 0, allowed.stderr
