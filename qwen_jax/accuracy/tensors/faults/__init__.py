"""The catalogue of faults: small changes of one operation or more."""
