"""An installed wheel with NumPy alone: it imports, resizes a picture, and was built for the architectures named."""

import sys

import numpy as np

import dit4dit
from dit4dit import _C


def buffer(array: np.ndarray) -> tuple:
    strides = tuple(step // array.itemsize for step in array.strides)
    return array.ctypes.data, array.shape, strides, array.dtype.name, "cpu"


image = np.full((1, 256, 256, 3), 255, np.uint8)
result = np.full((1, 3, 224, 224), np.nan, np.float32)
_C.preprocess([buffer(image)], [224], buffer(result), "cv2_area")
assert (result == 1).all(), "a white picture must stay white"
assert "torch" not in sys.modules
assert set(_C.cuda_architectures) == set(sys.argv[1:]), f"built for {_C.cuda_architectures}, expected {sys.argv[1:]}"
print(f"dit4dit {dit4dit.__version__}: {_C.build_info()}")
