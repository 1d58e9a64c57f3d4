"""SAEBench's SCR."""
