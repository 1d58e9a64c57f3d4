"""DB-KSVD dictionaries of transformer activations: learned in seconds, scored like SAEs.

The path of the data, and the module that walks each step::

    text ── activations/ ── shards on disk ── learning/ ── dictionary.py ── sae.py ── evals/ ────── report/
            harvest          safetensors       DB-KSVD      the value        SAELens    SAEBench      tables,
                             + manifest                     that travels     SAE        and others    plots

``methods/`` has a file for each kind of dictionary, ``evals/`` a folder for each eval; ``hub/`` publishes dictionaries
and loads them; ``run/`` takes one YAML through all steps, ``cli.py`` is ``ksvd-sae``.
Public names load on first use, so ``import ksvd_sae`` stays quick and pulls in neither
sae_lens nor transformers; it does tell SAELens, should that be loaded later, how to find the
``db_ksvd`` architecture (see ``_registration.py``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ksvd_sae._registration import register_when_sae_lens_loads

__version__ = "0.1.0"

_PUBLIC = {
    "DoubleBatchKSVD": "ksvd_sae.estimator",
    "Code": "ksvd_sae.learning.sparse_coding",
    "matching_pursuit": "ksvd_sae.learning.sparse_coding",
    "orthogonal_matching_pursuit": "ksvd_sae.learning.sparse_coding",
    "Coding": "ksvd_sae.learning.coding",
    "Dictionary": "ksvd_sae.dictionary",
    "import_sae": "ksvd_sae.methods.published.importing",
    "ActivationShards": "ksvd_sae.activations.shards",
    "RunConfig": "ksvd_sae.run.config",
    "load_config": "ksvd_sae.run.config",
    "DBKSVDSAE": "ksvd_sae.sae",
    "DBKSVDSAEConfig": "ksvd_sae.sae",
    "sae_from_dictionary": "ksvd_sae.sae",
    "load": "ksvd_sae.hub.load",
    "load_dictionary": "ksvd_sae.hub.load",
    "KsvdSaeError": "ksvd_sae.errors",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from ksvd_sae.activations.shards import ActivationShards
    from ksvd_sae.dictionary import Dictionary
    from ksvd_sae.errors import KsvdSaeError
    from ksvd_sae.estimator import DoubleBatchKSVD
    from ksvd_sae.hub.load import load, load_dictionary
    from ksvd_sae.learning.coding import Coding
    from ksvd_sae.learning.sparse_coding import Code, matching_pursuit, orthogonal_matching_pursuit
    from ksvd_sae.methods.published.importing import import_sae
    from ksvd_sae.run.config import RunConfig, load_config
    from ksvd_sae.sae import DBKSVDSAE, DBKSVDSAEConfig, sae_from_dictionary


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        # Looked up anew each time: a module may have been reloaded.
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ksvd_sae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_sae_lens_loads()
