"""SAEBench's sparse probing."""
