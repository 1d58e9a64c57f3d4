"""SAEBench's own evals on a panel of SAEs, one a module: what each is told, and where its data come from."""
