"""How every figure looks: colours that follow a dictionary, fonts, and labels that do not collide.

Figures are made without pyplot, so nothing outlives the call that draws them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from ksvd_sae.store import atomic_path

DPI = 150
CONTROLS = frozenset({"pca", "random", "identity"})
INK = "#222222"
FAINT = "#767676"
GRID = "#e4e4e4"

# Okabe and Ito (2008), told apart with any colour vision; yellow is left out: too pale on white. The last four are from
# Paul Tol's "muted" scheme.
_OKABE_ITO = ("#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
_COLOURS = (*_OKABE_ITO, "#882255", "#332288", "#999933", "#44AA99")
_GREYS = ("#8C8C8C", "#4D4D4D", "#B3B3B3")
# The methods of the demo keep one colour in every figure of every run.
_USUAL = {
    "db-ksvd": "#0072B2",
    "topk-sae": "#D55E00",
    "db-ksvd-refit": "#56B4E9",
    "pca": "#8C8C8C",
    "random": "#4D4D4D",
    "identity": "#B3B3B3",
}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")

# Any: matplotlib types the keys, one by one, only from 3.11 on.
_RC: Any = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": "#9a9a9a",
    "ytick.color": "#9a9a9a",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def palette(names: Iterable[str], controls: frozenset[str] = CONTROLS) -> dict[str, str]:
    """A colour for each dictionary; controls are grey.

    The usual methods always have the same colour. Others take what is left in order of appearance:
    to keep those the same across figures, make one palette of a run and pass it to every plot.
    """
    names = list(dict.fromkeys(names))
    chosen = {name: _USUAL[name] for name in names if name in _USUAL}
    for wanted, colours in ((False, _COLOURS), (True, _GREYS)):
        rest = [name for name in names if name not in chosen and (name in controls) == wanted]
        free = [colour for colour in colours if colour not in chosen.values()] or list(colours)
        chosen |= {name: free[i % len(free)] for i, name in enumerate(rest)}
    return {name: chosen[name] for name in names}


def colours_of(
    names: Iterable[str], given: Mapping[str, str] | None, controls: frozenset[str] = CONTROLS
) -> dict[str, str]:
    """The given colours, and the palette's for names that were given none."""
    return {**palette(names, controls), **(given or {})}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style, in inches, written to ``path`` as PNG if the block ends well."""
    with matplotlib.rc_context(_RC):
        drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        with atomic_path(Path(path)) as temporary:
            # No software version in the file: equal scores give equal bytes.
            drawn.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
            # A palette of 256 colours shows no difference and takes a third of the bytes, which the report holds too.
            Image.open(temporary).convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)


def short_count(value: float) -> str:
    """1500000 as 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def count_axis(axes: Axes, which: str) -> None:
    """Ticks such as 500k and 1.5M."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


# Where a point's label may stand, in points from it, best first: (dx, dy, horizontal, vertical).
_PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (7, 7, "left", "bottom"),
    (7, -7, "left", "top"),
    (-7, 7, "right", "bottom"),
    (-7, -7, "right", "top"),
    (0, 22, "center", "bottom"),
    (0, -22, "center", "top"),
)


def label_points(axes: Axes, points: list[tuple[float, float]], labels: list[str], colours: list[str]) -> None:
    """Write each label beside its point, where it covers no other point or label and stays inside the axes."""
    canvas: Any = axes.figure.canvas
    canvas.draw()  # settles the layout, so that extents are true
    renderer = canvas.get_renderer()
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in pixels]
    inside = axes.get_window_extent(renderer)
    for i, (point, text, colour) in enumerate(zip(points, labels, colours, strict=True)):
        others = taken[:i] + taken[i + 1 :]
        options = []
        for rank, (dx, dy, horizontal, vertical) in enumerate(_PLACES):
            label = axes.annotate(
                text,
                point,
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=colour,
                fontsize=9.5,
                annotation_clip=False,
            )
            box = label.get_window_extent(renderer)
            outside = not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
            options.append(((sum(box.overlaps(other) for other in others), outside, rank), label, box))
        options.sort(key=lambda option: option[0])
        taken.append(options[0][2])
        for _, label, _ in options[1:]:
            label.remove()
