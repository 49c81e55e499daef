"""Code generation for GPUs: regions to Triton kernels, compiled without a GPU at hand."""
