"""Triton's compiler without a GPU: specialisations -> cubins and their manifest."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from dit4dit.ops.aot.launch_record import function
from dit4dit.ops.aot.manifest import Compiled, Manifest, sources
from dit4dit.ops.aot.specialization import ALIGNED, Specialization
from dit4dit.ops.launch import interpreting

SCRATCH = 2
"""Pointers that Triton (3.6 to 3.8) passes behind the arguments: for global and for profiling memory."""
SIZES = {"*": 8, "i32": 4, "i64": 8, "fp32": 4}


def compiled(special: Specialization, capability: int) -> Any:
    """Triton's compiled kernel, as the just-in-time compiler would make it. RuntimeError: in a process that interprets."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreting():
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile")
    knobs.compilation.disable_line_info = True  # half the bytes, and they would name this machine's folders
    triton_function = function(special.kernel)
    names = triton_function.arg_names
    if {*special.arguments, *special.constants} != set(names):
        raise TypeError(f"{special.kernel}: takes {names}, launched with {[*special.arguments, *special.constants]}")
    kinds = {name: special.arguments.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds[name].endswith(ALIGNED)}
    signature = {name: kind.removesuffix(ALIGNED) for name, kind in kinds.items()}
    source = ASTSource(triton_function, signature, dict(special.constants), aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(special.options))


def resources(cubin: bytes) -> dict[str, int]:
    """registers, stack and local bytes a thread, from the machine code itself (the launcher's fields need a GPU)."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dump(cubin, "--dump-resource-usage")))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def parameters(cubin: bytes, entry: str) -> list[tuple[int, int]]:
    """(offset, bytes) of every parameter of a kernel, in order, from the machine code itself."""
    text = _dump(cubin, "--dump-elf").partition(f".nv.info.{entry}\n")[2]
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", text)
    return [(offset, size) for _, offset, size in sorted(tuple(int(n, 16) for n in row) for row in found)]


def layout(kinds: Iterable[str], scratch: int) -> list[tuple[int, int]]:
    """(offset, bytes) of every parameter as the launcher packs them: in order, each at a multiple of its size."""
    found, end = [], 0
    for size in [
        *(SIZES["*" if kind.startswith("*") else kind.removesuffix(ALIGNED)] for kind in kinds),
        *[8] * scratch,
    ]:
        offset = end + -end % size
        found.append((offset, size))
        end = offset + size
    return found


def describe(special: Specialization, kernel: Any, capability: int) -> Compiled:
    """The manifest's row of a compiled kernel. RuntimeError: it needs something that the launcher does not give."""
    about, where = kernel.metadata, f"{special.kernel} for sm_{capability}"
    wanted: dict[str, Any] = dict(num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0)
    wanted |= dict(profile_scratch_size=0, tensordesc_meta=[])
    for name, value in wanted.items():
        if getattr(about, name) != value:
            raise RuntimeError(f"{where}: {name}: the launcher expects {value}, Triton made {getattr(about, name)}")
    names = function(special.kernel).arg_names
    arguments = tuple((name, special.arguments[name]) for name in names if name in special.arguments)
    cubin = kernel.asm["cubin"]
    packed, found = layout((kind for _, kind in arguments), SCRATCH), parameters(cubin, about.name)
    if packed != found:
        raise RuntimeError(f"{where}: parameters: the launcher packs {packed}, the machine code reads {found}")
    digest = hashlib.sha256(cubin).hexdigest()
    return Compiled(
        kernel=special.kernel,
        arguments=arguments,
        constants=special.constants,
        options=special.options,
        entry=about.name,
        threads=32 * about.num_warps,
        shared=about.shared,
        scratch=SCRATCH,
        file=f"sm_{capability}/{special.kernel}-{digest[:16]}.cubin",
        sha256=digest,
    )


def build(folder: Path, wanted: Mapping[int, Iterable[Specialization]], jobs: int) -> Manifest:
    """Compile for each capability and write cubins and manifest into an empty `folder`, in `jobs` processes."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected an empty folder")
    kernels: dict[str, dict[str, Compiled]] = {}
    # not forked: torch's threads would be missing in the copies
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for capability, specials in wanted.items():
            (folder / f"sm_{capability}").mkdir()
            found = pool.map(_write, specials, repeat(capability), repeat(folder))
            kernels[f"sm_{capability}"] = {one.key: one for one in found}
    ptxas = {f"sm_{capability}": get_ptxas(capability).version for capability in wanted}
    manifest = Manifest(folder, triton.__version__, ptxas, sources(), kernels)
    manifest.write()
    return manifest


def _write(special: Specialization, capability: int, folder: Path) -> Compiled:
    kernel = compiled(special, capability)
    row = describe(special, kernel, capability)
    (folder / row.file).write_bytes(kernel.asm["cubin"])
    return row


def _dump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
