"""Floor 0: the ops of the framework on one device, each validated here and implemented by the back end in force.

Import an op from the module of its name (`from fp8moe.kernels.gemm import gemm`). README.md beside this file is the
numerics contract.
"""
