"""``python -m ksvd_sae.bench gpu`` and ``processes``: see gpu.py and processes.py."""

import argparse
from pathlib import Path

from ksvd_sae.bench import processes
from ksvd_sae.bench.gpu import PAPER
from ksvd_sae.bench.gpu import main as gpu
from ksvd_sae.bench.gpu_model import as_table, orthogonal_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ksvd_sae.bench", description=__doc__)
    parser.add_argument("suite", choices=["gpu", "processes"])
    parser.add_argument("--device", default="cuda", help="cpu with --small: a smoke run of the script itself")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=6.0, help="time there is: what is worth most comes first")
    parser.add_argument("--only", help="one step by its name, see gpu.py")
    parser.add_argument("--predict", action="store_true", help="print the model of a batch and measure nothing")
    parser.add_argument("--output", type=Path, help="rows are appended; results/bench/SUITE.jsonl")
    arguments = parser.parse_args()
    output = arguments.output or Path("results/bench") / f"{arguments.suite}.jsonl"
    if arguments.suite == "processes":
        print(processes.prediction()) if arguments.predict else processes.main(output, small=arguments.small)
        return
    if arguments.predict:
        for shape in PAPER:
            print(f"\n{shape}\n\n{as_table(shape)}\n\nOMP: {1e3 * orthogonal_s(shape):.0f} ms")
        return
    how = {"minutes": arguments.minutes, "only": arguments.only}
    gpu(arguments.device, small=arguments.small, output=output, **how)


if __name__ == "__main__":
    main()
