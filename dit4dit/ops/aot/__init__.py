"""Finding and starting Triton kernels that were compiled ahead of time; nothing here needs Triton or a compiler.

`launch_record` describes one launch; `specialization` names it as Triton's just-in-time compiler would tell it from others;
`manifest` reads what a build brought along, in the folder `dit4dit/cubins`; `loader` starts what is there through the driver.
`dit4dit.aot_build` writes that folder.
"""
