"""The text audit: a program's ids against a reference pipeline's."""
