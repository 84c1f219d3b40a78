"""The operations that are worth writing by hand: each has one name, a reference, and a list of implementations."""

from dit4dit.ops.dispatch import (
    Call,
    Choices,
    Implementation,
    implementations,
    listing,
    names,
    register,
    trace,
    use_backend,
)
from dit4dit.ops.explanation import Explanation, explain
from dit4dit.ops.stages import stage

# isort: off
# in the order of the data's way through the model, which `names` keeps
from dit4dit.ops.preprocess import preprocess
from dit4dit.ops.philox_normal import philox_normal
from dit4dit.ops.state_token import state_token
from dit4dit.ops.conv2d import conv2d
from dit4dit.ops.rms_norm_silu import rms_norm_silu
from dit4dit.ops.add_pad import add_pad
from dit4dit.ops.posterior_patches import posterior_patches
from dit4dit.ops.patch_tokens import patch_tokens
from dit4dit.ops.adaln import adaln
from dit4dit.ops.qk_norm_rope import qk_norm_rope
from dit4dit.ops.self_attention import self_attention
from dit4dit.ops.cross_attention import cross_attention
from dit4dit.ops.linear import linear
from dit4dit.ops.linear_gelu import linear_gelu
from dit4dit.ops.linear_fp8 import linear_fp8
from dit4dit.ops.norm_linear import norm_linear
from dit4dit.ops.euler_step import euler_step
from dit4dit.ops.action_ode import action_ode
from dit4dit.ops.unnormalize import unnormalize
# isort: on

__all__ = [
    "Call",
    "Choices",
    "Explanation",
    "Implementation",
    "action_ode",
    "adaln",
    "add_pad",
    "conv2d",
    "cross_attention",
    "euler_step",
    "explain",
    "implementations",
    "linear",
    "linear_fp8",
    "linear_gelu",
    "listing",
    "names",
    "norm_linear",
    "patch_tokens",
    "philox_normal",
    "posterior_patches",
    "preprocess",
    "qk_norm_rope",
    "register",
    "rms_norm_silu",
    "self_attention",
    "stage",
    "state_token",
    "trace",
    "unnormalize",
    "use_backend",
]
