"""What a batch of training moves and multiplies on a GPU, stage by stage, and the least time that follows from it.

A model, not a measurement: ``python -m ksvd_sae.bench gpu --predict`` prints it, and the rows that ``gpu.py`` measures
have its times as their floors. Rates are an H200's: copy and bfloat16 products as measured on one, the L2 cache as it
follows from its clock and width, float32 without tensor cores from the data sheet at the share that others reach.
"""

from dataclasses import dataclass

from ksvd_sae.bench.problems import Shape
from ksvd_sae.learning.products import Precision

COPY_BYTES_PER_S, L2_BYTES_PER_S = 4.3e12, 5.5e12
BFLOAT16_FLOP_PER_S, FLOAT32_FLOP_PER_S = 788e12, 52e12
# What of the L2 cache a table can have before its rows come from memory.
L2_BYTES = 50 << 20
# As in learning/atom_update.py: rows of the triangle solved for at a time; many atoms, for each dimension.
SOLVED_ROWS, MANY_ATOMS = 1024, 4
# Picks of atoms that a sample has already: 1.007 steps an atom at k = 20.
STEPS = 1.007


@dataclass(frozen=True)
class Stage:
    """Of one batch: bytes to and from memory, bytes of rows that are gathered, and flops of each kind.

    gathered_from: bytes of the table that the rows are of.
    """

    name: str
    n_bytes: float = 0
    gathered_bytes: float = 0
    gathered_from: float = 0
    bfloat16_flops: float = 0
    float32_flops: float = 0

    @property
    def seconds(self) -> float:
        """All of it one after the other: nothing overlaps."""
        gathered_rate = L2_BYTES_PER_S if self.gathered_from <= L2_BYTES else COPY_BYTES_PER_S
        times = (
            self.n_bytes / COPY_BYTES_PER_S,
            self.gathered_bytes / gathered_rate,
            self.bfloat16_flops / BFLOAT16_FLOP_PER_S,
            self.float32_flops / FLOAT32_FLOP_PER_S,
        )
        return sum(times)


def stages(shape: Shape, precision: Precision) -> list[Stage]:
    """The stages of one batch, in their order; names as gpu.py times them."""
    n, d, m, k = shape.n, shape.d, shape.m, shape.k
    parts = 3 if precision == "float32" else 1
    gram_bytes = 4 if precision == "float32" else 2
    return [
        # Rows of the pass gathered; the centre taken off.
        Stage("samples", n_bytes=16 * n * d),
        Stage("statistics", n_bytes=4 * n * d),
        # In float32 each half is written, and the three pieces side by side.
        Stage("products", n_bytes=(34 if parts == 3 else 6) * n * d + 4 * n * m, bfloat16_flops=2 * parts * n * m * d),
        Stage("gram", n_bytes=(4 + gram_bytes) * m * m, bfloat16_flops=2 * 3 * m * m * d),
        Stage(
            "pursuit",
            n_bytes=4 * n * m,
            gathered_bytes=STEPS * gram_bytes * n * k * m,
            gathered_from=gram_bytes * m * m,
        ),
        Stage("leave", n_bytes=6 * n * d + 2 * n * m, gathered_bytes=4 * n * k * d, gathered_from=4 * m * d),
        Stage("usage", n_bytes=2 * n * m + 12 * n * k),
        _sums(n, d, m),
        Stage("solve", n_bytes=8 * m * d, float32_flops=m * SOLVED_ROWS * d),
        Stage("duplicates", n_bytes=8 * m * m, bfloat16_flops=3 * m * m * d),
        Stage("redraw", n_bytes=6 * n * d + 16 * m * d),
        Stage("average", n_bytes=20 * m * d),
    ]


def _sums(n: int, d: int, m: int) -> Stage:
    """Gradients and couplings of the atoms, block after block; from the residual where atoms are many."""
    blocks = max(1, m // SOLVED_ROWS)
    flops = 2.0 * n * m * d
    if m > MANY_ATOMS * d:
        # Each block of atoms that has moved is taken off the residual, which is read and written.
        flops += 2 * n * m * d + 2 * n * m * SOLVED_ROWS
        return Stage("sums", n_bytes=blocks * 6 * n * d + 6 * n * m, bfloat16_flops=flops)
    flops += n * m * m * (1 + 1 / blocks) + 3 * m * m * d * (1 - 1 / blocks)
    return Stage("sums", n_bytes=2 * n * (m + d) + n * m * (blocks + 1), bfloat16_flops=flops)


def predicted_s(shape: Shape, precision: Precision, *names: str) -> float:
    """Seconds of the stages of those names, or of all."""
    return sum(stage.seconds for stage in stages(shape, precision) if not names or stage.name in names)


def orthogonal_s(shape: Shape) -> float:
    """Seconds of orthogonal matching pursuit with a float16 Gram matrix: at step s the rows of s picks are read."""
    rows = Stage(
        "omp",
        gathered_bytes=2 * shape.n * shape.m * shape.k * (shape.k + 1) / 2,
        gathered_from=2 * shape.m**2,
        n_bytes=8 * shape.n * shape.m * shape.k,
    )
    return predicted_s(shape, "bfloat16", "products", "gram") + rows.seconds


def as_table(shape: Shape) -> str:
    """The model as Markdown: milliseconds of each stage in both precisions."""
    lines = [
        "| stage | GB | GB gathered | TFLOP | ms, float32 | ms, bfloat16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    pairs = list(zip(stages(shape, "float32"), stages(shape, "bfloat16"), strict=True))
    for full, half in pairs:
        flops = (half.bfloat16_flops + half.float32_flops) / 1e12
        sizes = f"{half.n_bytes / 1e9:.2f} | {half.gathered_bytes / 1e9:.1f} | {flops:.2f}"
        lines.append(f"| {full.name} | {sizes} | {1e3 * full.seconds:.2f} | {1e3 * half.seconds:.2f} |")
    totals = [1e3 * sum(pair[i].seconds for pair in pairs) for i in (0, 1)]
    lines.append(f"| **batch** | | | | **{totals[0]:.1f}** | **{totals[1]:.1f}** |")
    return "\n".join(lines)
