"""The model on a device: what is compiled, what it holds, and who comes when."""
