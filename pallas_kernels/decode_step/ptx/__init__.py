"""Code for single threads: PTX instructions, barriers and 16-bit number formats."""
