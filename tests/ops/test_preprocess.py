"""preprocess: the golden bits of OpenCV, torch's bilinear, and every implementation against the reference."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dit4dit import _C
from dit4dit.errors import BackendError, InputError
from dit4dit.ops import preprocess
from dit4dit.ops.preprocess import reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cv2_area.npz")
CASES = sorted(name for name in GOLDEN.files if name.startswith(("whole_", "sha256_")))
IMPLEMENTATIONS = ["torch", "cpp", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (sizes of the views, size of each in the result): every way of resizing, odd, tiny and mixed
GEOMETRIES = [
    ([(32, 40)], (28, 35)),
    ([(31, 17), (64, 96), (9, 9)], (16, 24)),
    ([(48, 48), (96, 24), (30, 30)], (24, 12)),
    ([(7, 5), (1, 1)], (13, 11)),
    ([(40, 12)], (25, 19)),
    ([(1, 1)], (1, 1)),
    ([(20, 30), (20, 7)], None),
    ([(10, 10), (10, 30)], (10, 20)),  # the same sum of widths with and without resizing
]


def device_of(implementation: str) -> str:
    if implementation != "cuda":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _C.cuda_architectures:
        pytest.skip("this build has no CUDA kernels")
    return "cuda"


def images(sizes: list[tuple[int, int]], batch: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(sizes) * 1000 + sizes[0][0])
    return [
        torch.randint(0, 256, (batch, h, w, 3), dtype=torch.uint8, generator=generator).to(device) for h, w in sizes
    ]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def golden_input(height: int, width: int) -> np.ndarray:
    """As in golden/make_cv2_area.py."""
    generator = np.random.Generator(np.random.PCG64([height, width]))
    return generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def golden_sizes(case: str) -> tuple[int, ...]:
    found = re.fullmatch(r"\w+_(\d+)x(\d+)_to_(\d+)x(\d+)", case)
    assert found is not None
    return tuple(map(int, found.groups()))


def as_uint8(x: torch.Tensor) -> np.ndarray:
    """[1, 3, h, w] in [-1, 1] -> the whole numbers 0..255 it was scaled from, [h, w, 3]."""
    values = (x[0].permute(1, 2, 0).double().cpu() + 1) * 127.5
    assert (values - values.round()).abs().max() < 1e-4
    return values.round().numpy().astype(np.uint8)


def test_golden_covers_every_way_of_resizing():
    sizes = [golden_sizes(case) for case in CASES]
    assert len(sizes) >= 25
    assert any(h > H and w > W for H, W, h, w in sizes)
    assert any((h > H) != (w > W) for H, W, h, w in sizes)
    assert any(2 * h == H and 2 * w == W for H, W, h, w in sizes)
    assert any(3 * h == H and 3 * w == W for H, W, h, w in sizes)
    assert (256, 256, 224, 224) in sizes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cv2_area_gives_the_bits_of_opencv(implementation, case):
    device = device_of(implementation)
    H, W, h, w = golden_sizes(case)
    view = torch.from_numpy(golden_input(H, W))[None].to(device)
    got = as_uint8(preprocess([view], (h, w), "cv2_area", torch.float32, backend=implementation))
    if case.startswith("whole_"):
        np.testing.assert_array_equal(got, GOLDEN[case])
    else:
        corner = GOLDEN[case.replace("sha256_", "corner_")]
        np.testing.assert_array_equal(got[-corner.shape[0] :, -corner.shape[1] :], corner)
        assert hashlib.sha256(got.tobytes()).hexdigest() == str(GOLDEN[case])


@pytest.mark.parametrize(("source", "target"), [((257, 311), (224, 225)), ((31, 300), (97, 101)), ((3, 4), (1, 9))])
def test_bilinear_is_torch_interpolate(source, target):
    (view,) = images([source], batch=2)
    x = torch.nn.functional.interpolate(view.permute(0, 3, 1, 2).float(), target, mode="bilinear", align_corners=False)
    got = preprocess([view], target, "bilinear", torch.float32, backend="torch")
    torch.testing.assert_close(got, 2 * (x / 255) - 1, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sizes", "size"), GEOMETRIES)
@pytest.mark.parametrize("resize", ["cv2_area", "bilinear"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_same_bits_as_the_reference(implementation, dtype, resize, sizes, size):
    device = device_of(implementation)
    want = reference(images(sizes, batch=3), size, resize, dtype)
    got = preprocess(images(sizes, batch=3, device=device), size, resize, dtype, backend=implementation)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_value_of_a_pixel(implementation, dtype):
    device = device_of(implementation)
    view = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3).to(device)
    got = preprocess([view], None, "cv2_area", dtype, backend=implementation)
    want = (2 * (torch.arange(256, dtype=torch.float64) / 255) - 1).to(dtype)
    torch.testing.assert_close(got[0, :, 0].cpu(), want.expand(3, 256), rtol=0, atol=torch.finfo(dtype).eps / 2)
    assert got.min() == -1
    assert got.max() == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_of_larger_buffers(implementation):
    """Crops, steps, channels first: strides of every kind, read where they lie."""
    device = device_of(implementation)
    (big,) = images([(40, 60)], batch=3, device=device)
    (channels_first,) = images([(21, 33)], batch=3, device=device)
    channels_first = channels_first.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    views = [big[:, 3:33, 5:50], big[:, ::2, ::3], channels_first, big[:1, 7:30].expand(3, -1, -1, -1)]
    want = reference([v.cpu().contiguous() for v in views], (20, 18), "cv2_area", torch.float32)
    got = preprocess(views, (20, 18), "cv2_area", torch.float32, backend=implementation)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("resize", ["cv2_area", "bilinear"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_writes_all_of_a_poisoned_output_and_nothing_else(implementation, resize):
    device = device_of(implementation)
    views = images([(32, 40), (17, 16)], batch=2, device=device)
    buffer = torch.full((2, 5, 14, 26), float("nan"), dtype=torch.bfloat16, device=device)
    out = buffer[:, 1:4, 2:12, 3:23]
    got = preprocess(views, (10, 10), resize, torch.bfloat16, backend=implementation, out=out)
    assert got is out
    assert torch.equal(out, preprocess(views, (10, 10), resize, torch.bfloat16, backend=implementation))
    assert buffer.isnan().sum() == buffer.numel() - out.numel()


@pytest.mark.parametrize("channels", [3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_channels_last_with_zeros_behind_the_third(implementation, dtype, channels):
    """As the first convolution takes it; what the memory held before is not there any more."""
    device = device_of(implementation)
    views = images([(32, 40), (17, 16)], batch=2, device=device)
    planes = preprocess(views, (10, 11), "cv2_area", dtype, backend=implementation)
    poisoned = torch.full((2, 10, 22, channels), float("nan"), dtype=dtype, device=device).permute(0, 3, 1, 2)
    for out in (None, poisoned):
        got = preprocess(views, (10, 11), "cv2_area", dtype, channels=channels, backend=implementation, out=out)
        assert got.shape == (2, channels, 10, 22)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(bits(got[:, :3]), bits(planes))
        assert torch.equal(bits(got[:, 3:]), torch.zeros_like(bits(got[:, 3:]))), "zeros, and no minus among them"


@pytest.mark.gpu
@pytest.mark.capture
def test_cuda_runs_on_the_current_stream_and_in_a_graph():
    device = device_of("cuda")
    views = images([(256, 256), (256, 256)], batch=1, device=device)
    out = torch.empty(1, 3, 224, 448, dtype=torch.bfloat16, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        preprocess(views, (224, 224), "cv2_area", torch.bfloat16, backend="cuda", out=out)
    for view in views:
        view.copy_(255 - view)
    out.fill_(float("nan"))
    graph.replay()
    want = reference([view.cpu() for view in views], (224, 224), "cv2_area", torch.bfloat16)
    assert torch.equal(out.cpu(), want)


def test_views_are_joined_from_left_to_right():
    black, white = torch.zeros(1, 4, 6, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    got = preprocess([black, white], (4, 5), "cv2_area", torch.float32)
    assert got.shape == (1, 3, 4, 10)
    assert (got[..., :5] == -1).all()
    assert (got[..., 5:] == 1).all()


IMAGE = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(views=[IMAGE.float()]), r"views\[0\]: expected uint8 in 0\.\.255, got torch\.float32"),
        (dict(views=[]), "expected at least one view"),
        (dict(channels=2), "channels: expected None or a whole number from 3, got 2"),
        (dict(channels="8"), "channels: expected None or a whole number from 3, got '8'"),
        (dict(channels=8.0), "channels: expected None or a whole number from 3, got 8.0"),
        (dict(channels=4, out=torch.zeros(2, 3, 4, 4)), r"out: expected shape \[2, 4, 4, 4\], got \[2, 3, 4, 4\]"),
        (dict(views=[IMAGE, IMAGE[0]]), r"views\[1\]: expected \[batch, height, width, 3\], got \[8, 8, 3\]"),
        (dict(views=[IMAGE[..., :1]]), r"got \[2, 8, 8, 1\]"),
        (dict(views=[IMAGE[:, :0]]), r"got \[2, 0, 8, 3\]"),
        (dict(views=[IMAGE, IMAGE[:1]]), r"views\[1\]: expected a batch of 2 as in views\[0\], got 1"),
        (dict(views=[IMAGE, IMAGE[:, :7]], size=None), r"views\[1\].*share its height: expected 8.*got 7"),
        (dict(resize="cv2_aera"), "did you mean 'cv2_area'"),
        (dict(resize=None), "resize: expected cv2_area or bilinear, got None"),
        (dict(size=(0, 4)), "size: expected .height, width."),
        (dict(size=(4, 4, 3)), "size: expected .height, width."),
        (dict(dtype=torch.float64), "dtype: expected one of .*got torch.float64"),
        (dict(out=torch.zeros(2, 3, 4, 5)), r"out: expected shape \[2, 3, 4, 4\], got \[2, 3, 4, 5\]"),
        (dict(out=torch.zeros(2, 3, 4, 4).half()), "out: expected dtype torch.float32, got torch.float16"),
        (dict(out=torch.zeros(2, 3, 4, 4, device="meta")), "out: expected device cpu, got meta"),
        (dict(views=[IMAGE, IMAGE.to("meta")]), r"views\[1\]: expected device cpu, got meta"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    given = dict(views=[IMAGE], size=(4, 4), resize="cv2_area", dtype=torch.float32)
    with pytest.raises(InputError, match=message):
        preprocess(**{**given, **arguments})


def test_an_explicit_wish_for_cuda_raises_on_the_cpu():
    with pytest.raises(BackendError, match=r"preprocess: 'cuda' refused: views\[0\] is on cpu"):
        preprocess([IMAGE], (4, 4), "cv2_area", torch.float32, backend="cuda")


def buffer(array: np.ndarray, dtype: str | None = None) -> tuple:
    strides = tuple(s // array.itemsize for s in array.strides)
    return array.ctypes.data, array.shape, strides, dtype or array.dtype.name, "cpu"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(views=[]), ValueError, "views: expected at least one view, got none"),
        (dict(widths=[4, 4]), ValueError, r"widths: expected 1 numbers, one per view, got \[4, 4\]"),
        (dict(widths=[0]), ValueError, r"widths: expected positive numbers"),
        (dict(widths=[5]), ValueError, r"out: expected shape \[-1, 3, -1, 5\] .*got \[2, 3, 4, 4\]"),
        (dict(filter="area"), ValueError, "filter: expected 'cv2_area' or 'bilinear', got 'area'"),
        (dict(views=[(1, 2)]), TypeError, r"views\[0\]: expected an array or \(address, shape, strides"),
        (dict(dtype="int8"), TypeError, r"views\[0\]: expected uint8 in 0\.\.255, got int8"),
        (dict(device="cuda:0"), ValueError, r"views\[0\]: expected device cpu, got cuda:0"),
        (dict(shape=(2, 8, 8, 4)), ValueError, r"views\[0\]: expected shape \[2, -1, -1, 3\].*got \[2, 8, 8, 4\]"),
        (dict(strides=(1, 1)), ValueError, r"views\[0\]: expected 4 strides, got \[1, 1\]"),
        (dict(address=0), ValueError, r"views\[0\]: expected an address, got null"),
        (dict(out_strides=(0, 0, 0, 0)), ValueError, "out: expected elements that do not overlap"),
    ],
)
def test_the_launcher_checks_what_it_is_given(change, error, message):
    image, result = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3, 4, 4), np.float32)
    facts = dict(zip(("address", "shape", "strides", "dtype", "device"), buffer(image), strict=True))
    view = tuple({**facts, **{k: v for k, v in change.items() if k in facts}}.values())
    out = list(buffer(result))
    out[2] = change.get("out_strides", out[2])
    given = dict(views=[view], widths=[4], filter="cv2_area")
    with pytest.raises(error, match=message):
        _C.preprocess(out=tuple(out), **{**given, **{k: v for k, v in change.items() if k in given}})


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(device="cpu"), r"views\[0\]: expected device cuda:0, got cpu"),
        (dict(out_device="cpu"), "out: expected a cuda device such as cuda:0, got cpu"),
        (dict(count=9), "views: expected at most 8 on cuda, got 9"),
        (dict(widths=[5]), r"out: expected shape \[-1, 3, -1, 5\]"),
    ],
)
def test_the_cuda_launcher_checks_what_it_is_given(change, message):
    """Before it touches a GPU; the addresses are never followed."""

    def described(shape, dtype, device):
        address = 4096 if dtype == "uint8" else 1 << 20  # the output's memory is its own
        return address, shape, torch.empty(shape, device="meta").stride(), dtype, device

    count = change.get("count", 1)
    view = described((2, 8, 8, 3), "uint8", change.get("device", "cuda:0"))
    out = described((2, 3, 4, 4 * count), "float32", change.get("out_device", "cuda:0"))
    with pytest.raises(ValueError, match=message):
        _C.preprocess_cuda([view] * count, change.get("widths", [4] * count), out, "cv2_area", 0)


def test_numpy_without_torch(tmp_path):
    """A robot's own process may have NumPy and nothing else; negative strides turn a picture without a copy."""
    script = """
import sys
sys.modules["torch"] = None  # importing it raises
import numpy as np
from dit4dit import _C

def buffer(a):
    return a.ctypes.data, a.shape, tuple(s // a.itemsize for s in a.strides), a.dtype.name, "cpu"

upright = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3), dtype=np.uint8)
turned, copied = upright[:, ::-1, ::-1], np.ascontiguousarray(upright[:, ::-1, ::-1])
results = [np.full((1, 3, 28, 35), np.nan, np.float32) for _ in range(2)]
for image, out in zip((turned, copied), results):
    _C.preprocess([buffer(image)], [35], buffer(out), "cv2_area")
assert np.array_equal(*results), "negative strides"
assert np.abs(results[0]).max() <= 1
assert "torch" not in {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
print(results[0].astype(np.float64).sum())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    turned = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3), dtype=np.uint8)[:, ::-1, ::-1].copy()
    want = reference([torch.from_numpy(turned)], (28, 35), "cv2_area", torch.float32)
    assert float(done.stdout) == pytest.approx(want.double().sum().item(), abs=1e-6)
