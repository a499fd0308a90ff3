"""Triton kernels, one module per operation, imported at first use by `backend.kernels`."""
