"""SAEBench's RAVEL."""
