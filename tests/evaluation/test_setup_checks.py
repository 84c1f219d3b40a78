"""`dit4dit eval setup` says what is missing before it installs anything, and what it is doing meanwhile."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from sim_environment import libero_environment

from dit4dit import cli
from dit4dit.errors import ConfigError, SimulatorError
from dit4dit.evaluation import libero_assets, setup_checks, simulator_setup, simulators
from dit4dit.evaluation.simulators import Simulator

PYTHON = "3.11"


@pytest.fixture
def machine(monkeypatch) -> SimpleNamespace:
    """A machine that has all that is needed; a test takes something away. `asked` are the programs that were run."""
    here = SimpleNamespace(asked=[], free=50e9, wrong={}, libraries=True, git="/usr/bin/git", hub=None)

    def last_words(words):
        here.asked.append(" ".join(map(str, words)))
        return next((said for part, said in here.wrong.items() if part in here.asked[-1]), None)

    def download(*_, **options):
        assert options["allow_patterns"] is not None, "one file is enough"
        if here.hub is not None:
            raise here.hub

    def never(*words, **_):
        raise AssertionError(f"something is installed: {words}")

    monkeypatch.setattr(setup_checks, "last_words", last_words)
    monkeypatch.setattr(setup_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=here.free))
    monkeypatch.setattr(setup_checks.shutil, "which", lambda name: here.git)
    monkeypatch.setattr(setup_checks, "_loads", lambda file: here.libraries)
    monkeypatch.setattr(simulators, "version_of", lambda python: here.wrong.get("version", PYTHON))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(simulators, "run", never)
    monkeypatch.setattr(simulator_setup, "run", never)
    return here


def standin_assets(folder: Path) -> Path:
    """The assets with which the real simulator is tested."""
    path = Path(__file__).parents[1] / "sim" / "libero_assets.py"
    spec = importlib.util.spec_from_file_location("standin_assets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    module.write(folder)
    return folder


def libero(folder: Path, **options) -> str:
    """What the setup says before it installs anything."""
    with pytest.raises((ConfigError, AssertionError)) as caught:
        simulator_setup.setup_libero(Simulator.at("libero", folder / "sim"), "egl", lambda line: None, **options)
    return str(caught.value)


def test_everything_that_is_missing_is_said_at_once(machine, tmp_path) -> None:
    machine.free, machine.libraries, machine.hub = 1.5e9, False, OSError("no route to host")
    machine.wrong = {"pip --disable": "ERROR: No matching distribution found for termcolor"}
    said = libero(tmp_path, torch="torch.whl").splitlines()
    assert said[0] == "libero: nothing was installed; to be put right first (5):"
    for line, part in zip(
        said[1:],
        (
            "needs 3 GB, 1.5 GB are free",
            "package index: termcolor==",
            "egl: libEGL.so.1 is not",
            "lerobot/libero-assets cannot be downloaded (no route to host)",
            "--torch torch.whl: no such file",
        ),
        strict=True,
    ):
        assert part in line
    assert "libegl1" in said[3]
    assert "hf download lerobot/libero-assets --repo-type dataset --local-dir FOLDER" in said[4]
    assert not (tmp_path / "sim").exists()


def test_the_interpreter_is_looked_at_first(machine, tmp_path) -> None:
    machine.wrong = {"ensurepip": "No module named ensurepip"}
    assert "has no venv with pip (Debian's package: python3-venv)" in libero(tmp_path)
    machine.wrong = {"version": "3.9"}
    assert "libero needs Python 3.11 or 3.12 and none is on PATH" in libero(tmp_path)
    machine.wrong = {"-m pip --version": "No module named pip"}
    assert "something is installed" in libero(tmp_path), "the new environment brings a pip of its own"


def test_a_place_that_cannot_be_used(machine, tmp_path) -> None:
    (tmp_path / "sim").mkdir()
    (tmp_path / "sim" / "thesis.tex").touch()
    assert "is there and is no Python environment" in libero(tmp_path)
    shutil.rmtree(tmp_path / "sim")
    (tmp_path / "sim").touch()
    assert "is a file; choose another folder with --path" in libero(tmp_path)


def test_gr1_asks_for_git_and_its_repositories(machine, tmp_path) -> None:
    def gr1() -> str:
        with pytest.raises((ConfigError, AssertionError)) as caught:
            simulator_setup.setup_gr1(Simulator.at("gr1", tmp_path / "sim"), "osmesa", lambda line: None)
        return str(caught.value)

    machine.git, machine.libraries = None, False
    said = gr1()
    assert "to be put right first (2)" in said
    assert "git: not installed" in said
    assert "osmesa: libOSMesa.so.8 is not installed; Debian's packages: libosmesa6; or draw with --graphics egl" in said
    machine.git, machine.libraries, machine.wrong = "git", True, {"ls-remote": "fatal: unable to access"}
    said = gr1()
    for name, (url, _) in simulator_setup.REPOSITORIES.items():
        assert f"{name}: {url} cannot be reached (fatal: unable to access)" in said
    machine.wrong = {}
    assert "something is installed" in gr1()
    assert not (tmp_path / "sim").exists()


@pytest.mark.parametrize("lacking", [*libero_assets.FILES, "textures", "turbosquid_objects"])
def test_assets_are_looked_into(lacking, machine, tmp_path) -> None:
    assets = standin_assets(tmp_path / "all" / "assets")
    assert libero_assets.missing(assets, "--assets") == []
    shutil.rmtree(assets / lacking) if (assets / lacking).is_dir() else (assets / lacking).unlink()
    said = libero(tmp_path, assets=assets)
    assert f"missing: {lacking}; fetch all of it: hf download" in said


def test_folders_that_are_no_assets_say_what_to_do(machine, tmp_path) -> None:
    standin_assets(tmp_path / "all" / "assets")
    assert f"did you mean {tmp_path / 'all' / 'assets'}?" in libero(tmp_path, assets=tmp_path / "all")
    assert "no such folder; fetch LIBERO's assets there first: hf download" in libero(tmp_path, assets=tmp_path / "no")
    (tmp_path / "file").touch()
    assert "is a file" in libero(tmp_path, assets=tmp_path / "file")
    assert not any("huggingface" in asked for asked in machine.asked)


def test_assets_are_linked_and_stay(machine, tmp_path) -> None:
    simulator, said, assets = libero_environment(tmp_path / "sim"), [], standin_assets(tmp_path / "assets")
    place = simulator.packages / "libero" / "libero" / "assets"
    assert libero_assets.place(simulator) is None
    for _ in range(2):
        libero_assets.link(simulator, assets, said.append)
        assert place.resolve() == assets.resolve()
    libero_assets.link(simulator, None, said.append)
    assert place.resolve() == assets.resolve(), "what is linked stays"
    simulator_setup.write_libero_config(simulator)
    assert str(place) in (simulator.folder / "libero" / "config.yaml").read_text()
    (assets / "scenes" / "libero_floor_base_style.xml").unlink()
    assert "missing: scenes/libero_floor_base_style.xml" in libero(tmp_path), "an earlier link is looked into too"
    place.unlink()
    place.mkdir()
    standin_assets(assets)
    assert "is a folder of its own; remove it first" in libero(tmp_path, assets=assets)


def test_a_program_shows_its_lines_and_keeps_them(tmp_path, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, log = Terminal(), tmp_path / "setup.log"
    monkeypatch.setattr(sys, "stderr", stream)
    words = "print('Downloading mujoco-3.8.1.whl (7 MB)', flush=True)"
    simulators.run([sys.executable, "-c", words], "pip install", log=log)
    assert "pip install" in stream.getvalue()
    assert "Downloading mujoco-3.8.1.whl (7 MB)" in stream.getvalue()
    with pytest.raises(SimulatorError, match=re.escape(f"failed with exit code 3: 1 | 2; all of it is in {log}")):
        simulators.run([sys.executable, "-c", "print(1); print(2); raise SystemExit(3)"], "pip install", log=log)
    assert log.read_text().count("$ ") == 2
    with pytest.raises(ConfigError, match="pip install: no-such-program is not installed"):
        simulators.run(["no-such-program"], "pip install", log=log)


def test_last_words() -> None:
    def ends(code: str) -> str | None:
        return setup_checks.last_words([sys.executable, "-c", code])

    assert ends("print('fine')") is None
    assert ends("import sys; sys.exit('one\\ntwo')") == "two"
    assert ends("raise SystemExit(4)") == "exit code 4"
    assert "No such file" in str(setup_checks.last_words(["/nowhere/git"]))


def test_the_command_ends_with_the_list(machine, tmp_path, capsys) -> None:
    machine.libraries = False
    words = ["eval", "setup", "libero", "--path", str(tmp_path / "sim"), "--assets", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--graphics", "egl"])
    found = capsys.readouterr()
    assert end.value.code == 2
    assert found.out == ""
    assert "to be put right first (2)" in found.err
    assert "Traceback" not in found.err
