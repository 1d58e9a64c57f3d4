"""``python -m ksvd_sae.bench gpu``: see gpu.py."""

import argparse
from pathlib import Path

from ksvd_sae.bench.gpu import main as gpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ksvd_sae.bench", description=__doc__)
    parser.add_argument("suite", choices=["gpu"])
    parser.add_argument("--device", default="cuda", help="cpu with --small: a smoke run of the script itself")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu.jsonl"), help="rows are appended")
    arguments = parser.parse_args()
    gpu(arguments.device, small=arguments.small, output=arguments.output)


if __name__ == "__main__":
    main()
