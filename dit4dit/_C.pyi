from collections.abc import Mapping, Sequence

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

_Limits = tuple[float, float, float, float, float]  # low, high, velocity, acceleration, jerk; infinite: unlimited

def stream_remove(name: str) -> None: ...

class StreamWriter:
    def __init__(
        self,
        name: str | None,
        robot: str,
        command_period_ns: int,
        interpolation: str,
        seam: tuple[str, int, float, float],  # kind, history, alpha, rows
        channels: Sequence[tuple[str, str, int, _Limits]],  # name, kind, group, limits
        groups: Sequence[tuple[str, str, str, str, int, int]],  # name, on_dry, on_stale, on_dead, max_age_ns, decay_ns
    ) -> None: ...
    def publish(
        self,
        values: Buffer,
        observed_at_ns: int,
        computed_at_ns: int,
        starts_at_ns: int,
        control_hz: float,
        now_ns: int,
    ) -> None: ...
    def heartbeat(self, now_ns: int) -> None: ...
    def close(self, now_ns: int) -> None: ...
    def estop(self, now_ns: int) -> None: ...
    def clear_estop(self) -> None: ...
    def feedback(self) -> tuple[int, int, int, int, int, int, list[float]] | None: ...
    def reader(self, driver: bool, dead_after_ns: int, loop_dead_after_ns: int) -> StreamReader: ...

class StreamReader:
    def __init__(
        self, name: str, driver: bool, dead_after_ns: int, loop_dead_after_ns: int, group: str | None
    ) -> None: ...
    def read(self, now_ns: int, out: Buffer) -> tuple[int, int, int, int]: ...  # chunk, row, status, age_ns
    def start_at(self, values: Buffer) -> None: ...
    def stop(self) -> None: ...
    def estop(self, now_ns: int) -> None: ...
    def clear_estop(self) -> None: ...
    def feedback(self) -> tuple[int, int, int, int, int, int, list[float]] | None: ...
    def described(self) -> dict[str, object]: ...
