"""``python -m ksvd_sae``, and so ``torchrun -m ksvd_sae``: the command line."""

from ksvd_sae.cli import app

if __name__ == "__main__":
    app(prog_name="ksvd-sae")
