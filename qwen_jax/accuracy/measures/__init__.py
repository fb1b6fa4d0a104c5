"""How far arrays are apart, and where."""
