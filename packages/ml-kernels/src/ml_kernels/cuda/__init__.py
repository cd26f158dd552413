"""CUDA versions of operators, where they beat the reference."""
