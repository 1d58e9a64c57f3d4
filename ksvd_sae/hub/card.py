"""The model card of a repository: what its dictionaries are, how they came to be, what they score, how to load them."""

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from ksvd_sae import __version__
from ksvd_sae.activations.vision.model import place_of
from ksvd_sae.hub.layout import RESULTS
from ksvd_sae.hub.source import Entry, FinishedRun, Source
from ksvd_sae.methods.base import CODER_LABELS
from ksvd_sae.report.headline import MISSING
from ksvd_sae.report.markdown import markdown_table, markdown_text
from ksvd_sae.report.tables import by_seed, headings, legend, seeds_text
from ksvd_sae.run.config import ImageRunConfig, TextRunConfig

_TEMPLATE = "card.md.j2"
_TAGS = ("sparse-autoencoder", "dictionary-learning", "k-svd", "interpretability", "saelens")
# What an SAE for SAELens alone is held against its dictionary by.
_BESIDE = ("FVU", "L0", "nats lost", "nats lost, spliced")


def model_card(source: Source, repo_id: str, license_id: str | None) -> str:
    """README.md of the repository, with its YAML header."""
    from huggingface_hub import ModelCard, ModelCardData

    run, weights, place = source.run, source.weights, place_of(source.hook)
    header = ModelCardData(
        library_name="saelens",
        base_model=source.base_model,
        datasets=[run.dataset] if run is not None and run.dataset else None,
        license=license_id,
        tags=[*_TAGS, *(["vision"] if place else [])],
    )
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("ksvd_sae.hub").joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markdown, not HTML: what comes from elsewhere goes through markdown_text.
        autoescape=False,
    )
    own = [entry for entry in source.entries if entry.stock is None]
    body = environment.get_template(_TEMPLATE).render(
        model=markdown_text(source.model_name),
        linked=source.base_model is not None,
        weights=weights,
        hook=source.hook,
        repo_id=repo_id,
        version=__version__,
        license=license_id,
        first=own[0],
        entries=_entry_table(own),
        training=list(_training(own)),
        place=place,
        harvest=None if run is None else _harvest(run),
        run=None if run is None else f"{RESULTS}/{run.folder.name}",
        has_plot=run is not None and (run.folder / "plots" / "metrics.png").is_file(),
        scores=None if run is None else _scores(run, own),
        seeds=None if run is None else _seeds(run),
        stock=_stock(source),
        has_split=any(entry.view == "split" for entry in own),
        same=[entry for entry in source.entries if entry.stock is not None and entry.stock.same],
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n{body}"))


def _entry_table(entries: list[Entry]) -> str:
    rows = []
    for entry in entries:
        assert entry.dictionary is not None
        coding, weighting = entry.dictionary.coding, entry.dictionary.weighting
        shape = "raw" if weighting is None else "a diagonal metric" if weighting.is_diagonal else "a full metric"
        if entry.method is not None and entry.method.metric.kind != "none":
            shape = entry.method.metric.kind
        rows.append(
            [
                f"`{entry.sae_id}`",
                f"{entry.dictionary.n_atoms:,}",
                f"{entry.sae.cfg.d_sae:,}",
                str(coding.k),
                CODER_LABELS[coding.coder],
                shape,
            ]
        )
    heads = ["sae_id", "atoms", "latents", "k", "coder", "coordinates"]
    return markdown_table(heads, rows, {"atoms", "latents", "k"})


def _training(entries: list[Entry]) -> Iterator[dict[str, Any]]:
    """Options, samples and seconds of every training, once."""
    for entry in {entry.name: entry for entry in entries}.values():
        known = entry.training or {}
        options, versions = known.get("key", {}).get("dictionary", {}), known.get("versions", {})
        if entry.method is not None:
            # As a config has them, and no longer.
            options = {"kind": entry.method.kind, **entry.method.model_dump(mode="json", exclude_defaults=True)}
        yield {
            "name": entry.name,
            "options": yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6).strip()
            if options
            else None,
            "samples": known.get("samples_seen"),
            "seconds": known.get("seconds"),
            "device": known.get("device"),
            "seed": known.get("key", {}).get("seed"),
            "versions": ", ".join(f"{n} {versions[n]}" for n in ("ksvd-sae", "torch") if n in versions),
        }


def _harvest(finished: FinishedRun) -> dict[str, Any]:
    config, shards = finished.config, finished.run.shards()
    part = shards.manifest["parts"]["train"]
    common = {
        "data": markdown_text(config.data_name),
        "tokens": f"{shards.n_samples:,}",
        "factor": config.harvest.outlier_factor,
        "outliers": f"{part['outliers']:,}",
        "dtype": config.model.dtype,
    }
    if isinstance(config, ImageRunConfig):
        names = {"cls": "CLS", "registers": "registers"}
        return common | {
            "kinds": " and ".join(["patches", *(names[token] for token in config.model.also)]),
            "images": f"{part['n_images']:,}",
            "grid": shards.manifest["grid"],
            # Not of harvests that an earlier version made.
            "preprocessing": shards.manifest.get("preprocessing"),
            "revision": config.model.revision,
        }
    assert isinstance(config, TextRunConfig)
    return common | {"context": config.harvest.context_tokens, "bos": shards.prepend_bos}


def _seeds(finished: FinishedRun) -> str:
    text = seeds_text(finished.scores)
    several = any(name != trained.label for name, trained in finished.first.items())
    return text + (" Published is the first training of each." if several else "")


def _scores(finished: FinishedRun, entries: list[Entry]) -> str:
    """A line for each headline score, a column for each published dictionary and scored view; and what they are."""
    table, shown = finished.headline
    names = {entry.name for entry in entries}
    rows = [index for index, name in enumerate(table["dictionary"]) if name in names]
    heads = ["score", *(f"{table['dictionary'][i]} ({table['view'][i]})" for i in rows)]
    meanings, lines, legends = dict(legend(finished.scores)), [], []
    for column, heading in enumerate(headings(table)):
        texts = [shown[i][column] for i in rows]
        if heading in ("dictionary", "view", "d_sae", "k") or set(texts) == {MISSING}:
            continue
        lines.append([markdown_text(heading), *map(markdown_text, texts)])
        legends.append(f"- **{markdown_text(heading)}**: {markdown_text(meanings[heading])}")
    return "\n".join([markdown_table(heads, lines, set(heads[1:])), "", *legends])


def _stock(source: Source) -> str | None:
    """SAEs for SAELens alone, each beside its dictionary; scores of the trainings that are published, not of others."""
    stock = [entry for entry in source.entries if entry.stock is not None]
    if not stock or source.run is None:
        return None
    table = by_seed(source.run.scores)
    columns = [name for name in _BESIDE if name in table.columns and table[name].notna().any()]

    def scored(name: str) -> list[str]:
        assert source.run is not None
        seed = source.run.first[name].seed
        own = table[(table["dictionary"] == name) & (table["seed"].isna() if seed is None else table["seed"] == seed)]
        return [f"{value:.4g}" for value in own[columns].iloc[0]]

    rows: dict[str, list[str]] = {}
    for entry in stock:
        assert entry.stock is not None
        of = next(one for one in source.entries if one.sae_id == entry.sae.cfg.metadata["stands_beside"])
        measured = entry.stock.measured
        own = [f"{measured[name]:.4g}" if name in measured else MISSING for name in columns]
        kind = f"`{entry.sae.cfg.architecture()}` of SAELens"
        rows[of.sae_id] = [f"`{of.sae_id}`", "needs ksvd-sae", *scored(of.name)]
        rows[entry.sae_id] = [f"`{entry.sae_id}`", kind, *(own if measured else scored(entry.name))]
    return markdown_table(["sae_id", "is", *columns], list(rows.values()), set(columns))
