from collections.abc import Sequence

_View = tuple[int, tuple[int, ...], tuple[int, ...], str, str]  # address, shape, strides in elements, dtype, device

cuda_architectures: tuple[str, ...]

class Kernel:
    @property
    def entry(self) -> str: ...
    def launch(self, grid: Sequence[int], stream: int, arguments: Sequence[int | float]) -> None: ...

class Driver:
    def __init__(self, library: str = "libcuda.so.1") -> None: ...
    @property
    def version(self) -> int: ...
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

def build_info() -> dict[str, object]: ...
def preprocess(views: Sequence[_View], widths: Sequence[int], out: _View, filter: str) -> None: ...
def preprocess_cuda(views: Sequence[_View], widths: Sequence[int], out: _View, filter: str, stream: int) -> None: ...
