"""Compiling Triton kernels ahead of time, without a GPU (`python -m dit4dit.aot_build`).

`released` lists the launches of the released models; `compiler` turns them into cubins beside the manifest that `dit4dit.ops.aot`
reads, and alone needs Triton.
"""
