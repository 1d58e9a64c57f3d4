"""Scores: SAEBench's own evals, and our own metrics where SAEBench's are wrong for signed codes."""
