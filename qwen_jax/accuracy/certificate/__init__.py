"""Certificates: what two engines' whole difference is, with everything needed to find it again."""
