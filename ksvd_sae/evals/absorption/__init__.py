"""SAEBench's absorption."""
