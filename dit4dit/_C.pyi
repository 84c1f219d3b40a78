from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Buffer

_View = tuple[int, tuple[int, ...], tuple[int, ...], str, str]  # address, shape, strides in elements, dtype, device

# on the CPU also a NumPy array, or another object that lends its memory
_Views = Sequence[_View | Buffer]

cuda_architectures: tuple[str, ...]

class Kernel:
    @property
    def entry(self) -> str: ...
    def launch(
        self, grid: Sequence[int], stream: int, arguments: Sequence[int | float], programmatic: bool = False
    ) -> None: ...

class Driver:
    def __init__(self, library: str = "libcuda.so.1") -> None: ...
    @property
    def version(self) -> int: ...
    @property
    def programmatic(self) -> bool: ...
    def load(
        self,
        image: bytes,
        entry: str,
        device: int,
        threads: int,
        shared: int,
        arguments: Sequence[tuple[str, str]],
        scratch: int,
    ) -> Kernel: ...

def segment_snapshot(name: str) -> dict[str, Any]: ...
def segment_names() -> list[str]: ...
def build_info() -> dict[str, object]: ...
def preprocess(views: _Views, widths: Sequence[int], out: _View | Buffer, filter: str) -> None: ...
def preprocess_cuda(
    views: Sequence[_View], widths: Sequence[int], out: _View, filter: str, stream: int, programmatic: bool = False
) -> None: ...
def action_ode_cuda(
    tensors: Mapping[str, _View],
    numbers: Mapping[str, int],
    buffers: Sequence[tuple[int, int, int]],
    max_guidance: float,
    limit_ns: int,
    stream: int,
) -> None: ...
def self_attention_cuda(
    q: _View, k: _View, v: _View, out: _View, queries: int, stream: int, programmatic: bool = False
) -> None: ...
def action_ode_facts(device: int, shared_bytes: int) -> dict[str, int]: ...
