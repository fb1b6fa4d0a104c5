"""What a maintainer runs by hand, as `python -m tools.<name>` from the repository root."""
