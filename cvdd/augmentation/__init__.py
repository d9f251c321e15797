"""How views of images differ: parameters that are drawn apart from being applied."""
