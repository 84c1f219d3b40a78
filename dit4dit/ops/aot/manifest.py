"""What was compiled ahead of time: manifest.json, beside the cubins that it names, one folder an architecture."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dit4dit
from dit4dit.ops.aot.specialization import Specialization

FOLDER = Path(dit4dit.__file__).parent / "cubins"
"""Where a wheel has them (CMakeLists.txt)."""
FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Compiled:
    """One cubin.

    Attributes:
        kernel, arguments, constants, options: the specialisation; `arguments` are [name, kind] in the kernel's own order.
        entry: name of the function in the cubin.
        threads: of a thread block.
        shared: bytes of dynamic shared memory.
        scratch: pointers that Triton adds behind the arguments; always null, as no kernel here asks for such memory.
        file: below the manifest's folder; sha256: of its bytes.
    """

    kernel: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    entry: str
    threads: int
    shared: int
    scratch: int
    file: str
    sha256: str

    @property
    def key(self) -> str:
        """Of the specialisation (`Specialization.key`)."""
        return Specialization(self.kernel, dict(self.arguments), self.constants, self.options).key


@dataclass(frozen=True)
class Manifest:
    """All cubins of one build.

    Attributes:
        folder: where its files are.
        triton: version of the compiler.
        ptxas: "sm_90" -> CUDA version of the assembler; a driver must be of that major version or later.
        sources: file name -> sha256 of every Triton kernel's source.
        kernels: "sm_90" -> key -> cubin.
    """

    folder: Path
    triton: str
    ptxas: Mapping[str, str]
    sources: Mapping[str, str]
    kernels: Mapping[str, Mapping[str, Compiled]]

    def write(self) -> None:
        """manifest.json in its folder."""
        data = {"format": FORMAT, "triton": self.triton, "ptxas": dict(self.ptxas), "sources": dict(self.sources)}
        data["kernels"] = {chip: [asdict(found[key]) for key in sorted(found)] for chip, found in self.kernels.items()}
        (self.folder / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """OSError, ValueError, KeyError or TypeError: it is not there, or not whole."""
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"{folder / FILE}: expected format {FORMAT}, got {data['format']!r}")
        kernels = {}
        for chip, rows in data["kernels"].items():
            found = [Compiled(**{**row, "arguments": tuple(map(tuple, row["arguments"]))}) for row in rows]
            kernels[chip] = {one.key: one for one in found}
        return cls(folder, data["triton"], data["ptxas"], data["sources"], kernels)

    def image(self, compiled: Compiled) -> bytes:
        """The machine code. ValueError: not what the manifest was written for. OSError: not readable."""
        path = self.folder / compiled.file
        image = path.read_bytes()
        found = hashlib.sha256(image).hexdigest()
        if found != compiled.sha256:
            raise ValueError(f"{path}: expected sha256 {compiled.sha256}, got {found}; reinstall dit4dit")
        return image


def sources() -> dict[str, str]:
    """File name -> sha256 of every Triton kernel's source as it is installed."""
    spec = importlib.util.find_spec("dit4dit.kernels")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    paths = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.py"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@functools.cache
def installed(folder: Path = FOLDER) -> Manifest | str:
    """The manifest of this installation, or why there is none that can be used."""
    if not (folder / FILE).is_file():
        return "this build of dit4dit has no kernels compiled ahead of time"
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / FILE} cannot be read ({type(error).__name__}: {error}); reinstall dit4dit"
    found = sources()
    changed = sorted(name for name in {*found, *manifest.sources} if found.get(name) != manifest.sources.get(name))
    if changed:
        return f"the kernels have changed since they were compiled ahead of time ({', '.join(changed)})"
    return manifest
