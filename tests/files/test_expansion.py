"""YAML that stands for more than it says: aliases of aliases, interpolations of interpolations."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting import lines_run

from dit4dit.errors import CheckpointError, ConfigError
from dit4dit.files.keys import read_plain_yaml, read_yaml


def doubled(first: str, line: str, times: int = 40) -> str:
    """A first line, and as many that name the one before twice."""
    return "\n".join([first, *(line.format(i=i, before=i - 1) for i in range(1, times))]) + "\n"


LISTS = doubled("a0: &a0 [x, x]", "a{i}: &a{i} [*a{before}, *a{before}]")
TEXTS = doubled("a0: xx", "a{i}: ${{a{before}}}${{a{before}}}")
NODES = doubled("a0: [x]", "a{i}: ['${{a{before}}}', '${{a{before}}}']")
RELATIVE = "top:\n" + doubled("  a0: xx", "  a{i}: ${{.a{before}}}${{..top[a{before}]}}")
SELECTED = doubled("a0: xx", "a{i}: ${{oc.select:a{before}}}${{oc.select:a{before},x}}")


@pytest.mark.parametrize(
    "text", [TEXTS, NODES, RELATIVE, SELECTED, LISTS], ids=["texts", "nodes", "relative", "selected", "lists"]
)
@pytest.mark.parametrize("keep_unset", [False, True])
def test_a_published_config_is_bounded(text: str, keep_unset: bool, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)

    def refused() -> None:
        with pytest.raises(CheckpointError, match=r"config\.yaml: not readable YAML"):
            read_yaml(file, keep_unset=keep_unset)

    refused()
    assert lines_run(refused) < 300_000


def test_a_user_s_file_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "robots.yaml"
    for text, reason in ((LISTS, "stands for more than 100000 values"), ("a: &a [*a]", "holds itself")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_plain_yaml(file)
    file.write_text("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: 1}}\n")
    assert read_plain_yaml(file) == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": 1}}


@pytest.mark.parametrize("text", ["a: " + "9" * 5000, "a: " + "[" * 2000 + "]" * 2000, "a: 2026-99-99"])
def test_what_the_parser_cannot_take_is_the_file_s_fault(text: str, tmp_path: Path) -> None:
    file = tmp_path / "robots.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"robots\.yaml: not readable YAML"):
        read_plain_yaml(file)
    if "2026" not in text:  # a text to OmegaConf
        with pytest.raises(CheckpointError, match=r"robots\.yaml: not readable YAML"):
            read_yaml(file)


def test_interpolations_as_configs_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT", "/runs")
    file = tmp_path / "config.yaml"
    file.write_text(
        "run: {root: '${oc.env:ROOT}', id: a, folder: '${.root}/${run.id}'}\nlist: [1, '${run.id}']\nagain: ${list}\n"
        "third: ${list[1]}\nself: ${self}\n"
    )
    data = read_yaml(file, keep_unset=True)
    assert data["run"]["folder"] == "/runs/a"
    assert data["again"] == [1, "a"]
    assert data["third"] == "a"
    with pytest.raises(ConfigError, match=r"self: '.{self}' has no value"):
        read_yaml(file)
    file.write_text("a: b\nb: c\nd: ${${a}}\n")
    with pytest.raises(CheckpointError, match="d: an interpolation inside another's key"):
        read_yaml(file)
