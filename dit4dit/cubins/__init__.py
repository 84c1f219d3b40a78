"""Triton kernels compiled ahead of time: which ones the released models launch, compiling them, finding and launching them.

`specialization` names a launch as Triton's just-in-time compiler would tell it from others; `released` lists the launches of the
released models; `compiler` turns them into cubins beside a manifest (`python -m dit4dit.cubins`); `manifest` reads it;
`loader` launches what is there through the driver. Only `compiler` needs Triton.
"""
