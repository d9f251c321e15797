"""How networks are computed fast, with the same numbers: compiled, fused, recorded, in half precision."""
