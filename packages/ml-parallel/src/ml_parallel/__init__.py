"""Devices, process topology and checkpoints for training on megatron-core."""
