"""Code generation: from graphs to kernels. What no target owns is here; each backend has a folder."""
