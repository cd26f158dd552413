"""Ascend NPU: the only folder of the repository that imports torch_npu, and only on demand."""
