"""Plain references: each stage as a researcher writes it from the specification in an afternoon.

Full precision, eager, one unit at a time, image files read by a DataLoader: the obvious way, and nothing that is slow
on purpose. They import nothing of the engine; networks are given to them, so that both sides have the same.
"""
