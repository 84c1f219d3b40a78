"""Every kernel that may be launched before its inputs are there (ops/programmatic.py) waits for them first, in source and code.

That each Triton kernel's code does, for every GPU, is in test_triton_compiles.py, which compiles them all.
"""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from compiled import ROOT, needs_nvcc
from dit4dit.benchmarks import kernels

from dit4dit.ops import launch

KERNELS = ROOT / "kernels"


def jitted(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Top-level functions under @triton.jit, with or without arguments."""

    def is_jit(decorator: ast.expr) -> bool:
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        return ast.unparse(name) in ("triton.jit", "jit")

    return {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef) and any(map(is_jit, f.decorator_list))}


def called(tree: ast.Module) -> set[str]:
    """Last names of what is called anywhere in a file."""
    names = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {ast.unparse(name).rpartition(".")[2] for name in names}


def first_statement(function: ast.FunctionDef) -> str:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return ast.unparse(body[0])


def late(sources: dict[str, str]) -> set[str]:
    """file.function of each kernel, one that no other function calls, that does not wait first."""
    trees = {file: ast.parse(text) for file, text in sources.items()}
    helpers = set().union(*map(called, trees.values()))
    found = {
        f"{file}.{name}": f for file, tree in trees.items() for name, f in jitted(tree).items() if name not in helpers
    }
    assert len(found) >= 12
    return {name for name, function in found.items() if first_statement(function) != "wait_for_inputs()"}


def sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in KERNELS.glob("*.py")}


def test_every_triton_kernel_waits_first():
    assert not late(sources())


def test_every_kernel_that_is_launched_is_among_them():
    """A kernel that another one calls too would not be looked at."""
    helpers = set().union(*(called(ast.parse(text)) for text in sources().values()))
    launched = {step.kernel.rpartition(".")[2] for _, step in kernels.launches(90)}
    assert len(launched) >= 12
    assert not launched & helpers


@pytest.mark.parametrize("instead", ["", "zero = 0\n    wait_for_inputs()"])
def test_one_that_does_not_is_found(instead):
    given = sources()
    assert given["adaln"].count("    wait_for_inputs()\n") == 1
    given["adaln"] = given["adaln"].replace("    wait_for_inputs()\n", f"    {instead}\n")
    assert late(given) == {"adaln.adaln"}


WAIT = "griddepcontrol.launch_dependents;\n griddepcontrol.wait;\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (f"ld.param.b64 %rd1, [p];\n{WAIT} ld.global.b32 %r1, [%rd1];", "first"),
        (f"@%p5 tcgen05.alloc.cta_group::1.b32 [%r1], 128;\n bar.sync 0;\n ld.shared.b32 %r2, [%r1];\n{WAIT}", "first"),
        ("ld.global.b32 %r1, [%rd1];", "no"),
        (f"ld.global.b32 %r1, [%rd1];\n{WAIT}", "late"),
        (f"@%p1 ld.global.nc.b32 %r1, [%rd1];\n{WAIT}", "late"),
        (f"ld.b32 %r1, [%rd1];\n{WAIT}", "late"),  # of any memory
        (f"@!%p1 st.global.b32 [%rd1], %r1;\n{WAIT}", "late"),
        (f"cp.async.cg.shared.global [%r1], [%rd1], 16;\n{WAIT}", "late"),
        (f"cp.async.bulk.shared::cluster.global.mbarrier [%r1], [%rd1], 16, [%r2];\n{WAIT}", "late"),
        (f"red.global.add.f32 [%rd1], %r1;\n{WAIT}", "late"),
        (f"atom.global.add.u32 %r1, [%rd1], 1;\n{WAIT}", "late"),
        (f"@%p1 bra $L1;\n{WAIT} $L1:\n", "late"),  # around it
        (f"$L1:\n{WAIT}", "late"),
        (f"griddepcontrol.launch_dependents;\n tcgen05.alloc.b32 [%r1], 128;\n{WAIT}", "late"),
        (f"{WAIT} tcgen05.alloc.b32 [%r1], 128;", "late"),
        ("griddepcontrol.launch_dependents;\n ld.global.b32 %r1, [%rd1];", "late"),
        ("griddepcontrol.wait;\n ld.global.b32 %r1, [%rd1];", "late"),  # then nothing after it begins early
    ],
)
def test_what_counts_as_waiting_first(body, found):
    assert kernels.waits(f".visible .entry adaln()\n{{\n {body}\n ret;\n}}") == found


def test_one_kernel_of_several_is_enough():
    first, none = (f".entry {name}()\n{{\n {body} ret;\n}}\n" for name, body in (("a", WAIT), ("b", "")))
    assert kernels.waits(first * 2) == "first"
    assert kernels.waits(first + none) == kernels.waits(none + first) == "late"


@pytest.mark.kernels
@pytest.mark.skipif(launch.interpreting(), reason="a process with TRITON_INTERPRET=1 cannot compile")
def test_triton_compiles_the_same_code_for_such_a_launch():
    """So that one cubin serves both, and the manifest knows nothing of it."""
    pytest.importorskip("triton")
    from dit4dit.aot_build.compiler import compiled
    from dit4dit.ops.aot.specialization import Specialization

    steps = {step.kernel: step for _, step in kernels.launches(90) if step.kernel in ("adaln", "euler_step")}
    assert len(steps) == 2
    for step in steps.values():
        plain = Specialization.of(step)
        early = Specialization(plain.kernel, plain.arguments, plain.constants, {**plain.options, "launch_pdl": True})
        kernel, other = compiled(plain, 90), compiled(early, 90)
        assert (kernel.metadata.launch_pdl, other.metadata.launch_pdl) == (False, True)
        assert kernel.asm["cubin"] == other.asm["cubin"]


CUDA = ["preprocess.cu", "self_attention.cu"]


def test_no_other_cuda_kernel_is_launched_so():
    assert sorted(path.name for path in KERNELS.glob("*.cu") if "launch_kernel(" in path.read_text()) == CUDA


@pytest.mark.parametrize("source", CUDA)
@pytest.mark.parametrize("architecture", ["80", "89", "90a", "100", "120"])
class TestCuda:
    pytestmark = needs_nvcc

    def test_the_code_waits_first(self, source: str, architecture: str, tmp_path: Path) -> None:
        ptx = tmp_path / "kernel.ptx"
        command = ["nvcc", "-std=c++17", "--fmad=false", "-ptx", f"-arch=compute_{architecture}"]
        command += [f"-I{ROOT / 'csrc'}", f"-I{KERNELS}", "-o", str(ptx), str(KERNELS / source)]
        subprocess.run(command, check=True)
        assert kernels.waits(ptx.read_text()) == ("no" if architecture in ("80", "89") else "first")
