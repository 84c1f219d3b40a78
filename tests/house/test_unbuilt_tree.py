"""A source tree that was never built: the model is plain PyTorch there; what needs the compiled module says so when called."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dit4dit

PACKAGE = Path(dit4dit.__file__).parent


@pytest.fixture(scope="module")
def run_unbuilt(tmp_path_factory):
    """Runs a script with a copy of the package that has no `_C`."""
    folder = tmp_path_factory.mktemp("unbuilt")
    shutil.copytree(PACKAGE, folder / "dit4dit", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    # -S: without the hook of an editable install, which would find the built package first
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])

    def run(script: str) -> str:
        command = [sys.executable, "-S", "-c", script]
        given = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_model_runs_and_loads_no_other_room(run_unbuilt):
    """No op, kernel, engine or compiled module: `model` is the definition that they are compared with."""
    loaded = run_unbuilt("""
import sys
import torch
from dit4dit.model.dit4dit import DiT4DiT
from dit4dit.presets import preset

config = preset("tiny").model
model = DiT4DiT(config, with_text=False).eval()
z, frames, size = config.vae.z_dim, config.latent_frames, config.latent_size(32, 32)
with torch.no_grad():
    context = model.context(torch.randn(1, 8, config.text.embed_width))
    state = torch.randn(1, 1, config.head.state_dim)
    noise = torch.randn(1, z, 1, *size), torch.randn(1, z, frames, *size)
    action = torch.randn(1, config.head.action_horizon, config.head.action_dim)
    actions = model.sample(torch.rand(1, 3, 32, 32), context, state, *noise, action, steps=2)
assert actions.shape == action.shape and actions.isfinite().all()
print(*(name for name in sys.modules if name.partition(".")[0] == "dit4dit"))
""").split()
    others = {name for name in loaded if name != "dit4dit.model" and not name.startswith("dit4dit.model.")}
    assert "dit4dit.model.dit4dit" in loaded
    assert others == {
        "dit4dit",
        "dit4dit.config",
        "dit4dit.errors",
        "dit4dit.noise",
        "dit4dit.presets",  # the script's own
        "dit4dit.types",
    }


def test_the_first_call_that_needs_the_compiled_module_says_what_to_do(run_unbuilt):
    message = run_unbuilt("""
import torch
from dit4dit import ops
from dit4dit.ops import native

image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
assert ops.preprocess([image], (4, 4), "cv2_area", torch.float32, backend="torch").shape == (1, 3, 4, 4)
for call in (native.compiled, lambda: ops.preprocess([image], (4, 4), "cv2_area", torch.float32)):
    try:
        call()
    except ImportError as error:
        print(error)
""").splitlines()
    assert len(message) == 2
    for line in message:
        assert line.startswith("dit4dit._C is not built for ")
        assert line.endswith("start elsewhere, or pip install -e .")


def imports_compiled(node: ast.AST) -> bool:
    """Whether `_C` is imported when the module is: in a `try` or a class too, but not in a function or for a type checker."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return False
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return any(map(imports_compiled, node.orelse))
    if isinstance(node, ast.ImportFrom):
        return node.module == "dit4dit._C" or (node.module == "dit4dit" and "_C" in {name.name for name in node.names})
    if isinstance(node, ast.Import):
        return "dit4dit._C" in {name.name for name in node.names}
    return any(map(imports_compiled, ast.iter_child_nodes(node)))


def test_no_module_imports_the_compiled_module_when_it_is_imported():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert not [path for path in files if imports_compiled(ast.parse(path.read_text()))]


@pytest.mark.parametrize(
    "code,wrong",
    [
        ("from dit4dit import _C", True),
        ("from dit4dit._C import VERSION", True),
        ("try:\n    from dit4dit import _C\nexcept ImportError:\n    _C = None", True),
        ("class A:\n    import dit4dit._C", True),
        ("if TYPE_CHECKING:\n    from dit4dit import _C\nelse:\n    from dit4dit import _C", True),
        ("if TYPE_CHECKING:\n    from dit4dit import _C", False),
        ("class A:\n    def f(self):\n        from dit4dit import _C", False),
    ],
)
def test_that_it_would_be_seen(code, wrong):
    assert imports_compiled(ast.parse(code)) == wrong
