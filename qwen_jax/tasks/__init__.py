"""One module per task of run.py: glue from a config to the library and back to the user."""
