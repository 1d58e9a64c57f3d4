"""A published folder: SAEs, dictionaries, scores, the card and the manifest, written whole or not at all."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

from ksvd_sae.errors import ManifestError
from ksvd_sae.hub import neuronpedia
from ksvd_sae.hub.card import model_card
from ksvd_sae.hub.layout import CARD, RESULTS, SAE_FILES, Manifest, check_name, check_repository
from ksvd_sae.hub.source import Entry, FinishedRun, Source
from ksvd_sae.report.raw import OWN_EVALS, RawResults, result_name
from ksvd_sae.run.config import TextRunConfig
from ksvd_sae.store import MANIFEST, write_json

logger = logging.getLogger(__name__)


def write_folder(source: Source, repo_id: str, folder: Path, license_id: str | None) -> Manifest:
    """Write all that goes into the repository; the same source gives the same bytes.

    Args:
        folder: what an earlier call wrote there is replaced.
        license_id: as the Hub names licences; None: the card says that there is none.
    Raises: ConfigError (no name of a repository), ManifestError (something else lies there).
    """
    what = f"publishing to {folder}"
    check_repository(repo_id, what)
    for entry in source.entries:
        check_name(entry.sae_id, what)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise ManifestError(
                f"{what}: the folder holds something else", cure="empty it, or give another with --folder"
            )
        Manifest.read(folder / MANIFEST, what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        new = Path(name) / "new"
        for entry in source.entries:
            _write_entry(entry, new / entry.sae_id)
            if source.run is not None:
                _write_dashboards(entry, source.run, new / entry.sae_id)
        if source.run is not None:
            _write_results(source, source.run, repo_id, new / RESULTS / source.run.folder.name)
        (new / CARD).write_text(model_card(source, repo_id, license_id), encoding="utf-8")
        manifest = Manifest.of(new, [entry.sae_id for entry in source.entries])
        manifest.write(new)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return manifest


def _write_entry(entry: Entry, folder: Path) -> None:
    _, config_path = entry.sae.save_model(folder)
    config = json.loads(config_path.read_text())
    # Under the registered name, which other programs go by; metadata says what it needs.
    write_json(config_path, {**config, "architecture": entry.sae.cfg.architecture()})
    if entry.dictionary is not None:
        entry.dictionary.save(folder)
    assert {path.name for path in folder.iterdir()} >= set(SAE_FILES)


def _write_dashboards(entry: Entry, finished: FinishedRun, folder: Path) -> None:
    """For Neuronpedia, of the atoms that the run's report shows; what stands beside a dictionary has none."""
    file, config = None if entry.stock is not None else finished.examples(entry.name), finished.config
    # Of images Neuronpedia shows none, and theirs hold parts of the images, which are not ours to publish.
    if file is None or not isinstance(config, TextRunConfig):
        return
    with RawResults(finished.folder) as raw:
        found = json.loads(raw[f"atoms/{file}"])
    if found["format"] < 2:
        logger.warning("%s: no dashboards for Neuronpedia: its atoms in context are of an older version", entry.name)
        return
    dataset = finished.dataset or config.text.name
    batch = neuronpedia.dashboards(found, config.model.name, entry.hook, entry.name, entry.view, dataset)
    if batch is not None:
        write_json(folder / "neuronpedia" / neuronpedia.NAME, batch)


def _write_results(source: Source, finished: FinishedRun, repo_id: str, folder: Path) -> None:
    """Scores of the whole run, its figures, and SAEBench's files of what is published."""
    folder.mkdir(parents=True)
    for name in ("comparison.csv", "comparison.md"):
        shutil.copyfile(finished.folder / name, folder / name)
    if (finished.folder / "plots").is_dir():
        shutil.copytree(finished.folder / "plots", folder / "plots")
    with RawResults(finished.folder) as raw:
        for name in dict.fromkeys(entry.name for entry in source.entries if entry.name in finished.first):
            for eval_name, seed, view, file in finished.result_files(name):
                if eval_name in OWN_EVALS:
                    continue
                sae_id = f"{source.hook}/{name}/{view}"
                result = json.loads(raw[result_name(eval_name, file)])
                # The names that SAEBench joins results with SAEs by.
                result |= {"sae_lens_release_id": repo_id, "sae_lens_id": sae_id}
                joined = f"{repo_id}_{sae_id}_eval_results.json".replace("/", "_")
                write_json(folder / "saebench" / eval_name / (f"seed_{seed}" if seed else "") / joined, result)
