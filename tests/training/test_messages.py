"""A message of `dit4dit train` names options that `dit4dit train` has."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from dit4dit.commands.train import Flags, options_here
from dit4dit.training import published
from dit4dit.training.recipes import recipe

SOURCE = Path(__file__).parents[2] / "dit4dit"
OWN = [*sorted((SOURCE / "training").glob("*.py")), SOURCE / "commands" / "train.py"]
BELOW = [
    file
    for room in ("checkpoints", "data", "files", "model", "robots")
    for file in sorted((SOURCE / room).glob("*.py"))
]
OPTION = re.compile(r"(?<![\w.-])--([a-z][\w.-]*\w)")
OF_OTHERS = {
    "no-python", "nproc-per-node", "standalone",  # torchrun's, in the help
    "robot", "skip-bad", "root",  # of `data check`, `stats` and `eval openloop`, which the messages name
    "safe_serialization", "tag",  # of DeepSpeed's zero_to_fp32.py
    "config_yaml", "trainer.max_train_steps", "wandb_entity",  # of published files and scripts
    "a.b", "a.b.c", "c", "d",  # placeholders
}  # fmt: skip


def options_in(file: Path) -> set[str]:
    """Options that a file's strings name, as `dit4dit train` words them."""
    nodes = ast.walk(ast.parse(file.read_text()))
    strings = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {name for text in strings for name in OPTION.findall(options_here(text))}


def known() -> set[str]:
    """Flags, and every key of a configuration, groups too."""
    out = {"help"} | {field.name.replace("_", "-") for field in dataclasses.fields(Flags)}
    todo = [("", recipe("libero").to_dict())]
    while todo:
        before, node = todo.pop()
        for name, value in node.items():
            out.add(before + name)
            if isinstance(value, dict):
                todo.append((f"{before}{name}.", value))
    return out


def test_every_option_in_a_message_exists() -> None:
    found = {(file.name, option) for file in (*OWN, *BELOW) for option in options_in(file)}
    assert ("preflight.py", "run.out") in found
    assert ("resume.py", "weights.checkpoint") in found
    assert ("checkpoint.py", "weights.backbone") in found
    assert ("catalogue.py", "data.robots") in found
    wrong = sorted((file, option) for file, option in found if option not in known() | OF_OTHERS)
    # of `dit4dit data check` and `eval openloop`, as these messages say
    assert wrong == [("lerobot.py", "modality"), ("robot.py", "robots")]


def test_what_is_to_be_used_instead_of_a_published_option_exists() -> None:
    ours = {name for name in published.INSTEAD.values() if name.split(".")[0] not in published.ROOTS}
    assert ours == {"config", "resume"}
    assert ours <= known()
