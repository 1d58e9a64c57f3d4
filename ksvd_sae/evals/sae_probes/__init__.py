"""SAEBench's sparse probing on sae-probes' data."""
