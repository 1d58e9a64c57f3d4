"""SAEs that others published."""
