"""The engines: NumPy references, and the compiled kernels."""
