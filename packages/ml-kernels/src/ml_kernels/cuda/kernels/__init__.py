"""Kernels in Triton's language. Its functions have no types: only constants, in capitals, have."""
