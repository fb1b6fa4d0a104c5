"""Executables that processes leave for each other, so that the next one need not trace."""
