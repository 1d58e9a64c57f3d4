"""From images to activations of a vision transformer on disk."""
