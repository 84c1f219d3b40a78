"""What tells one call of an op from another."""

from __future__ import annotations

import torch

from dit4dit.ops.verdicts import call_text


def test_what_tells_one_call_from_another() -> None:
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    texts = [
        call_text(args)
        for args in (
            (x,),
            (x.float(),),
            (x.transpose(1, 2).contiguous(),),
            (x.transpose(1, 2),),
            (x, None),
            (x, x),
            ([x, x],),
            (x, "none"),
            (x, "tanh"),
            (x, 1),
            (x, True),
            (x, torch.float32),
        )
    ]
    assert len(set(texts)) == len(texts)
    assert call_text((x, 1e-5)) == call_text((x, 1e-6)) == "bfloat16[2x3x4], float"
    assert call_text((torch.zeros(10, 4)[2:],)) == call_text((torch.zeros(8, 4),)), "not offsets"
    assert call_text((torch.zeros(4, 4, device="meta"),)) == call_text((torch.zeros(4, 4),))


def test_the_stride_of_a_dimension_of_one_is_no_layout() -> None:
    wide = torch.zeros(1, 3, 8)[:, :, :4]
    odd = wide.as_strided((1, 3, 4), (7, 8, 1))
    assert call_text((wide,)) == call_text((odd,)) == "float32[1x3x4] strides *x8x1"
