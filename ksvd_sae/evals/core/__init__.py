"""SAEBench's core."""
