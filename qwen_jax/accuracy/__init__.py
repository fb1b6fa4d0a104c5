"""The accuracy laboratory: traces of a run, references to hold them against, and causes named."""
