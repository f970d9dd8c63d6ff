"""The checkpoint format of vLLM, as the package compressed-tensors defines it; nothing here imports that package."""
