"""Bytes to named, checked tensors: GGUF and safetensors files, quantised blocks, the loader.

Only `loader` and `on_device` need JAX; everything else here reads files with NumPy alone.
"""
