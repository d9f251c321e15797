"""What networks see of images, layer by layer, and how far that is from what they saw of the real ones."""
