"""Kernels for CPUs, through TVM and LLVM. Only this folder imports tvm."""
