from collections.abc import Mapping, Sequence

_View = tuple[int, tuple[int, ...], tuple[int, ...], str, str]  # address, shape, strides in elements, dtype, device

class DeviceLost(RuntimeError): ...

cuda_architectures: tuple[str, ...]

def build_info() -> dict[str, object]: ...
def preprocess(views: Sequence[_View], widths: Sequence[int], out: _View, filter: str) -> None: ...
def preprocess_cuda(views: Sequence[_View], widths: Sequence[int], out: _View, filter: str, stream: int) -> None: ...
def action_ode_cuda(
    tensors: Mapping[str, _View],
    numbers: Mapping[str, int],
    buffers: Sequence[tuple[int, int]],
    max_guidance: float,
    limit_ns: int,
    stream: int,
) -> None: ...
def self_attention_cuda(
    qkv: _View,
    norm_q: _View | None,
    norm_k: _View | None,
    rotary: _View | None,
    out: _View,
    heads: int,
    eps: float,
    queries: int,
    stream: int,
) -> None: ...
def action_ode_facts(device: int, shared_bytes: int) -> dict[str, int]: ...
