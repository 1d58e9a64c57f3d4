"""Speed, memory and the error reached beside them. ``python -m ksvd_sae.bench gpu`` is the GPU to-do list."""
