"""Where a config lies: a file of the user's, or one that comes with the package, by its name."""

from difflib import get_close_matches
from pathlib import Path

from ksvd_sae.errors import ConfigError


def shipped_configs() -> dict[str, Path]:
    """Name -> YAML of the configs that come with the package: inside it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside, beside = package / "eval_configs", package.parent / "eval_configs"
    folder = inside if inside.is_dir() else beside
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_config(given: str | Path, start: Path | None = None) -> Path:
    """The file that ``given`` stands for: a path, else the name of a config that comes with the package.

    Args: start: the folder from which relative paths count; None: the working directory.
    Raises: ConfigError, which names the nearest ones, if there is neither.
    """
    path, shipped = (start or Path()) / given, shipped_configs()
    # A folder may have a config's name, as in results/.
    if path.is_file() or (path.exists() and str(given) not in shipped):
        return path
    if str(given) in shipped:
        return shipped[str(given)]
    known = [*shipped, *(str(near) for near in sorted(path.parent.glob("*.yaml")))]
    near = get_close_matches(str(path), known, n=3) or get_close_matches(path.stem, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"reading config {given}: no such file, and no config of that name",
        cure=f"did you mean {' or '.join(near)}?" if near else f"check the path, or give one of: {', '.join(shipped)}",
    )
