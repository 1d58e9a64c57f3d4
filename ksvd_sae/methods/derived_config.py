"""Dictionaries that take the atoms of another of the same run and code with them in another way, as typed values.

Is it the coder that limits a dictionary, its atoms, or the metric that they were learned in? These kinds change one of
the three and keep the others. What they leave open is as in the dictionary that they are ``of``: ``filled`` puts it in.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ksvd_sae.evals.config import Strict
from ksvd_sae.methods.options import SAETraining, Viewed, WeightingConfig


class DerivedConfig(Strict):
    """What takes its atoms from another dictionary of the run."""

    of: str = Field(description="the name of the other dictionary")
    k: int | None = Field(None, gt=0, description="null: that of the other")
    weighting: WeightingConfig | None = Field(
        None, description="the metric to code in; null: the one that the other was learned in"
    )
    seed: int | None = Field(
        None, description="of the other's training, if its config has none, and of the encoder's; null takes the run's"
    )


class RecodedConfig(DerivedConfig, Viewed):
    """The atoms of another dictionary, coded by pursuit.

    Of an SAE it takes the decoder's rows, and the decoder's bias as the centre.
    """

    kind: Literal["recoded"] = "recoded"
    coder: Literal["mp", "mp_refit", "omp", "ormp"] = "omp"
    nonnegative: bool | None = Field(None, description="null: as the other's own codes, so that of SAEs: true")
    rtol: float | None = Field(None, ge=0, description="null: that of the other, 0 if it has none")


class LinearTopKConfig(DerivedConfig, SAETraining):
    """A linear encoder with TopK fitted to the atoms of another dictionary, which stay as they are.

    SAELens' trainer moves the encoder's weights and bias; it starts from the atoms themselves, scaled. A scale for each
    latent needs no parameter: it is the length of the encoder's column.

    With signs, the decoder is [D; −D], two latents an atom, of which each has an encoder of its own. The other way to
    have signs, the k largest in size of m signed latents (SAELens' abstopk), is what this gives when an atom's two
    encoders are opposites: so this can do no worse, and its codes are not negative, which evals read right.
    """

    kind: Literal["linear_topk"] = "linear_topk"
    signed: bool | None = Field(None, description="whether atoms count with both signs; null: as in the other's codes")
    aux_loss_coefficient: float = Field(1 / 32, ge=0)


def has_signs(config: Any) -> bool:
    """Whether a dictionary's own codes have signs; those of SAEs have none (as far as a config can tell)."""
    return config.kind in ("pca", "random", "identity") or (
        config.kind in ("db_ksvd", "recoded") and not config.nonnegative
    )


def metric(config: Any) -> WeightingConfig:
    """The metric that a dictionary was learned in."""
    found: WeightingConfig | None = getattr(config, "weighting", None)
    return found or WeightingConfig()


def filled(name: str, config: DerivedConfig, others: Mapping[str, Any]) -> Any:
    """``config`` with what it leaves open taken from the dictionary that it is of.

    Args: name: of this one.  others: the run's dictionaries by name.
    Raises: ValueError: no such dictionary, one that cannot be taken, k above its atoms, options that do not fit.
    """
    source = others.get(config.of)
    where = f"dictionaries.{name}"
    if source is None:
        raise ValueError(f"{where}.of: no dictionary {config.of!r} in this run; there are {', '.join(others)}")
    if isinstance(source, DerivedConfig):
        raise ValueError(f"{where}.of: {_why_not_twice(name, others)}")
    if source.kind == "identity":
        raise ValueError(f"{where}.of: {config.of!r} leaves activations as they are: there is nothing to code")
    own: int | None = getattr(source, "seed", None)
    if own is not None and config.seed not in (None, own):
        raise ValueError(f"{where}: seed = {config.seed}, but {config.of!r} is trained with seed {own}; leave one out")
    changes: dict[str, Any] = {
        "seed": own if config.seed is None else config.seed,
        "k": config.k or source.k,
        "weighting": config.weighting or metric(source),
    }
    if changes["k"] is None:
        raise ValueError(f"{where}: the k of {config.of!r} is not known before it is fetched; give k")
    # How many atoms a published SAE has is not known either.
    n_atoms = source.k if source.kind == "pca" else getattr(source, "n_atoms", None)
    if n_atoms is not None and changes["k"] > n_atoms:
        raise ValueError(f"{where}: k = {changes['k']} is above the {n_atoms} atoms of {config.of!r}")
    if isinstance(config, RecodedConfig):
        changes["nonnegative"] = not has_signs(source) if config.nonnegative is None else config.nonnegative
        changes["rtol"] = getattr(source, "rtol", 0.0) if config.rtol is None else config.rtol
        if changes["nonnegative"] and config.coder == "ormp":
            raise ValueError(f"{where}: coder 'ormp' has signs; use 'omp', or set nonnegative: false")
        if changes["nonnegative"] and config.view != "signed":
            raise ValueError(f"{where}: view {config.view!r} needs signs to split; leave view out")
    if isinstance(config, LinearTopKConfig):
        if source.kind == "pca":
            raise ValueError(
                f"{where}.of: {config.of!r} is a PCA, which has as many atoms as it uses: TopK has nothing to choose; "
                "take a dictionary with more atoms than k"
            )
        changes["signed"] = has_signs(source) if config.signed is None else config.signed
    return config.model_copy(update=changes)


def _why_not_twice(name: str, others: Mapping[str, Any]) -> str:
    chain = [name, others[name].of]
    while isinstance(others.get(chain[-1]), DerivedConfig) and chain[-1] not in chain[:-1]:
        chain.append(others[chain[-1]].of)
    way = " -> ".join(chain)
    if chain[-1] in chain[:-1]:
        return f"goes round in a circle ({way}); name a dictionary that is learned"
    return f"{chain[1]!r} has its atoms from another ({way}); name that one: of: {chain[-1]}"
