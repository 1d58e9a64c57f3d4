"""From text to activations on disk."""
