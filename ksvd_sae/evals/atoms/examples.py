"""Atoms in context: for a sample of each dictionary's atoms, the tokens that they code most strongly.

The model reads some held-out text once; every dictionary codes the same activations. What is kept of a dictionary is
its codes' nonzeros, and the result is one JSON file, named by the hash of all that it follows from.

Notation: C contexts, L positions, N tokens that are coded, n nonzeros of their codes, F latents, A atoms of the sample.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksvd_sae.activations.documents import Document, read_documents
from ksvd_sae.activations.harvest import HarvestConfig
from ksvd_sae.activations.language import ActivationReader
from ksvd_sae.activations.text import Packing, contexts
from ksvd_sae.errors import EvaluationError, ShapeError
from ksvd_sae.evals.atoms import AtomsConfig
from ksvd_sae.evals.atoms.logit_lens import logit_lens
from ksvd_sae.evals.atoms.token_texts import TokenTexts
from ksvd_sae.evals.base import Heldout, Panelist
from ksvd_sae.store import atomic_path, content_hash, copy_of_other_name

logger = logging.getLogger(__name__)
# Raised when the same inputs come to give another file.
FORMAT = 2
# The sample's strata in the order in which they are shown; the last three are thirds of the live atoms by density.
STRATA = ("strongest", "frequent", "middle", "rare")
# Tokens shown to the left and to the right of the one that is shown for.
AROUND = 12
# Of an atom's activations of one sign.
_BINS = 20
_CODE_BYTES = 64 << 20
# 12 bytes each. A code with more nonzeros than this is no sparse code: it is looked at on the first tokens only.
_MOST_NONZEROS = 1 << 26


@dataclass(frozen=True)
class ExampleSetting:
    """What is shown of each dictionary, and on which text.

    atoms, examples: how many atoms, and examples of each atom and sign. tokens: of text, at most.
    context_tokens, batch_contexts: as in the harvest. norm_limit: above it a token is an outlier, which the harvest
    leaves out; None: no limit. seed: of the sample.
    """

    atoms: int
    examples: int
    tokens: int
    context_tokens: int
    batch_contexts: int
    norm_limit: float | None
    seed: int


@dataclass(frozen=True)
class ReadText:
    """Text as the model read it.

    tokens_CL: contexts. document_CL: which document a token is of. ordinary_CL: not special.
    coded_CL: ordinary and no outlier. x_ND: activations of the coded tokens in reading order.
    """

    tokens_CL: Tensor
    document_CL: Tensor
    ordinary_CL: Tensor
    coded_CL: Tensor
    x_ND: Tensor

    @property
    def n_documents(self) -> int:
        return len(torch.unique(self.document_CL[self.coded_CL]))


def run_examples(
    panel: list[Panelist], config: AtomsConfig, harvest: HarvestConfig, seed: int, heldout: Heldout, output: Path
) -> dict[str, Path]:
    """``evaluate_examples`` as a run asks for it, on its held-out documents; empty if its report shows no atoms."""
    if not config.atoms:
        return {}
    setting = ExampleSetting(
        **config.model_dump(),
        context_tokens=harvest.context_tokens,
        batch_contexts=harvest.batch_contexts,
        norm_limit=heldout.outlier_limit,
        seed=seed,
    )
    return evaluate_examples(
        panel,
        setting,
        heldout.documents,
        heldout.loaded_reader,
        heldout.harvest_hash,
        output,
        prepend_bos=heldout.shards.prepend_bos,
    )


def evaluate_examples(
    panel: list[Panelist],
    setting: ExampleSetting,
    documents: Path,
    reader: Callable[[], ActivationReader],
    harvest_hash: str,
    output: Path,
    *,
    prepend_bos: bool = True,
) -> dict[str, Path]:
    """Atoms in context of each panelist, computed once.

    Args:
        documents: JSONL with the held-out documents under 'text'.
        reader: called once, and only if a panelist has no result yet.
        harvest_hash: of model, hook and text.
        prepend_bos: whether the harvest's contexts began with a BOS.
    Returns: panelist -> JSON file.
    Raises: EvaluationError (no token to code), ShapeError (a dictionary of another model or hook).
    """
    key = {"eval": "examples", "format": FORMAT, "harvest": harvest_hash, "setting": asdict(setting)}
    files = {p.name: output / f"{p.name}-{content_hash({**key, 'dictionary': p.content})}.json" for p in panel}
    missing = [p for p in panel if not files[p.name].exists() and not copy_of_other_name(files[p.name])]
    if not missing:
        return files
    started = time.perf_counter()
    read = reader()
    text = read_text(read, read_documents(documents), setting, prepend_bos)
    texts = TokenTexts(read.model.tokenizer)
    logger.info("examples: read %d tokens in %.1f s", len(text.x_ND), time.perf_counter() - started)
    for panelist in missing:
        started = time.perf_counter()
        atoms = atoms_in_context(panelist.load(), text, read, texts, setting)
        _write(files[panelist.name], atoms)
        logger.info("examples of %s: %.1f s", panelist.name, time.perf_counter() - started)
    return files


def read_text(
    reader: ActivationReader, texts: Iterator[Document], setting: ExampleSetting, prepend_bos: bool = True
) -> ReadText:
    """Run the model over the text's first contexts."""
    tokenizer = reader.model.tokenizer
    packing = Packing.of(tokenizer, setting.context_tokens, prepend_bos)
    n_contexts = max(1, setting.tokens // packing.step)
    stream = contexts(texts, tokenizer, setting.context_tokens, prepend_bos=prepend_bos)
    packed = list(islice(stream, n_contexts))
    if not packed:
        raise EvaluationError(
            "examples: the held-out text fills no context",
            limit=f"{setting.context_tokens} tokens",
            cure="hold out more tokens, or set report.atoms to 0",
        )
    tokens_CL = torch.stack(packed)
    step = setting.batch_contexts
    x_ND = torch.cat([reader.read(tokens_CL[i : i + step]).cpu() for i in range(0, len(tokens_CL), step)])
    ordinary_CL = reader.ordinary(tokens_CL.to(reader.model.cfg.device)).cpu()
    # Special tokens show nobody what an atom means, kept or not.
    read_CL = reader.kept(tokens_CL.to(reader.model.cfg.device)).cpu()
    kept_N = (torch.linalg.vector_norm(x_ND, dim=1) <= (setting.norm_limit or float("inf"))) & ordinary_CL[read_CL]
    coded_CL = torch.zeros_like(ordinary_CL).masked_scatter(read_CL, kept_N)
    # The BOS at a context's start does not begin another document; what stands between two of them does.
    begins_CL = torch.zeros_like(ordinary_CL) if packing.between is None else tokens_CL == packing.between
    if packing.begin is not None:
        begins_CL[:, 0] = False
    document_CL = begins_CL.flatten().cumsum(0).reshape(begins_CL.shape)
    if not bool(kept_N.any()):
        raise EvaluationError("examples: every token of the held-out text is special or an outlier")
    return ReadText(tokens_CL, document_CL, ordinary_CL, coded_CL, x_ND[kept_N])


# ---------------------------------------------------------------- codes


@dataclass(frozen=True)
class Codes:
    """The nonzeros of some codes, sorted by latent, then by token.

    ends_F: where each latent's entries end. n_tokens: tokens that were coded.
    """

    token_n: Tensor
    value_n: Tensor
    ends_F: Tensor
    n_tokens: int

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """(tokens, values) of a latent, in reading order."""
        part = slice(int(self.ends_F[latent - 1]) if latent else 0, int(self.ends_F[latent]))
        return self.token_n[part].long(), self.value_n[part]

    @property
    def density_F(self) -> Tensor:
        return torch.diff(self.ends_F, prepend=torch.zeros(1, dtype=torch.int64)).double() / self.n_tokens

    @property
    def energy_F(self) -> Tensor:
        """Σ z² of each latent: what it puts into the reconstructions (decoder rows have unit norm)."""
        sums_n = torch.cat([torch.zeros(1, dtype=torch.float64), self.value_n.double().square().cumsum(0)])
        return torch.diff(sums_n[self.ends_F], prepend=torch.zeros(1, dtype=torch.float64))


@torch.no_grad()
def code_text(sae: Any, x_ND: Tensor) -> Codes:
    """Code activations with a SAELens SAE and keep the nonzeros."""
    d_sae, d_in = sae.W_dec.shape
    if d_in != x_ND.shape[1]:
        raise ShapeError(
            "examples: the dictionary does not fit the activations",
            got=f"d_in = {d_in}",
            limit=f"activations of {x_ND.shape[1]} dimensions",
            cause="a dictionary of another model or hook",
        )
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    step = max(1, _CODE_BYTES // (4 * d_sae))
    tokens, latents, values, n_tokens, n_nonzeros = [], [], [], 0, 0
    for start in range(0, len(x_ND), step):
        code_BF = sae.encode(x_ND[start : start + step].to(device, dtype)).cpu()
        token_n, latent_n = code_BF.nonzero(as_tuple=True)
        tokens.append((token_n + start).to(torch.int32))
        latents.append(latent_n.to(torch.int32))
        values.append(code_BF[token_n, latent_n].float())
        n_tokens, n_nonzeros = n_tokens + len(code_BF), n_nonzeros + len(token_n)
        if n_nonzeros > _MOST_NONZEROS and n_tokens < len(x_ND):
            logger.warning("examples: %.0f nonzeros a token: only %d tokens", n_nonzeros / n_tokens, n_tokens)
            break
    latent_n = torch.cat(latents)
    order_n = torch.argsort(latent_n, stable=True)
    ends_F = torch.bincount(latent_n, minlength=d_sae).cumsum(0)
    return Codes(torch.cat(tokens)[order_n], torch.cat(values)[order_n], ends_F, n_tokens)


def sample_atoms(density_F: Tensor, energy_F: Tensor, n: int, seed: int) -> dict[str, list[int]]:
    """Atoms to show, by stratum, the densest first: a quarter the strongest, the rest drawn from thirds by density.

    Dead atoms are in none. Where there are no more than ``n`` live ones, all are shown.
    """
    live = (density_F > 0).nonzero().flatten()
    by_energy = live[torch.argsort(energy_F[live], descending=True, stable=True)]
    chosen = {"strongest": by_energy[: n // 4].tolist()}
    rest = live[~torch.isin(live, torch.tensor(chosen["strongest"], dtype=live.dtype))]
    rest = rest[torch.argsort(density_F[rest], descending=True, stable=True)]
    generator = torch.Generator().manual_seed(seed)
    left, thirds = n - len(chosen["strongest"]), torch.tensor_split(rest, 3)
    for stratum, third, more in zip(STRATA[1:], thirds, (3, 2, 1), strict=True):
        wanted = -(-left // more)
        picks = torch.randperm(len(third), generator=generator)[:wanted].sort().values
        chosen[stratum] = third[picks].tolist()
        left -= len(picks)
    return {stratum: sorted(atoms, key=lambda a: (-float(density_F[a]), a)) for stratum, atoms in chosen.items()}


# ---------------------------------------------------------------- one dictionary


@torch.no_grad()
def atoms_in_context(
    sae: Any, text: ReadText, reader: ActivationReader, texts: TokenTexts, setting: ExampleSetting
) -> dict[str, Any]:
    """One dictionary's sample as JSON values; see ``_write`` for what they are."""
    codes = code_text(sae, text.x_ND)
    density_F = codes.density_F
    sample = sample_atoms(density_F, codes.energy_F, setting.atoms, setting.seed)
    chosen = [(stratum, atom) for stratum in STRATA for atom in sample[stratum]]
    rows_AD = sae.W_dec.detach()[[atom for _, atom in chosen]]
    nearest = nearest_atoms(sae.W_dec.detach(), [atom for _, atom in chosen])
    lens = logit_lens(reader.model, reader.hook, rows_AD, texts) if chosen else None
    signed = bool((codes.value_n < 0).any())
    signs = {"positive": 1, **({"negative": -1} if signed else {})}
    finder = _Finder(text, texts, setting.examples)
    atoms = []
    for i, (stratum, atom) in enumerate(chosen):
        token_n, value_n = codes.of(atom)
        atoms.append(
            {
                "atom": atom,
                "stratum": stratum,
                "density": rounded(float(density_F[atom])),
                "strongest": rounded(float(value_n.abs().max())),
                "nearest": nearest[i],
                "logit_lens": None if lens is None else lens[i],
                "histogram": {name: histogram(value_n, sign) for name, sign in signs.items()},
                **{name: finder.examples(token_n, value_n, sign) for name, sign in signs.items()},
            }
        )
    return {
        "format": FORMAT,
        "n_tokens": codes.n_tokens,
        "n_contexts": len(text.tokens_CL),
        "context_tokens": text.tokens_CL.shape[1],
        "n_documents": text.n_documents,
        "n_atoms": len(density_F),
        "n_dead": int((density_F == 0).sum()),
        "signed": signed,
        "atoms": atoms,
    }


def histogram(value_n: Tensor, sign: int) -> dict[str, list[float]]:
    """How many of an atom's activations of one sign lie around which |value|: centres of bins, and counts."""
    value_n = (value_n * sign)[value_n * sign > 0].double()
    if not len(value_n):
        return {"centres": [], "counts": []}
    count_B, edge_B = torch.histogram(value_n, bins=_BINS)
    centre_B = (edge_B[1:] + edge_B[:-1]) / 2
    return {"centres": [rounded(x) for x in centre_B.tolist()], "counts": [int(x) for x in count_B.tolist()]}


def nearest_atoms(atoms_FD: Tensor, chosen: list[int]) -> list[dict[str, Any] | None]:
    """For each chosen atom the one with the largest |cosine| to it; None if there is no other."""
    if len(atoms_FD) < 2 or not chosen:
        return [None] * len(chosen)
    unit_FD = torch.nn.functional.normalize(atoms_FD.float(), dim=1)
    cosines_AF = unit_FD[chosen] @ unit_FD.T
    own = torch.arange(len(chosen), device=cosines_AF.device)
    magnitudes_AF = cosines_AF.abs()
    magnitudes_AF[own, torch.tensor(chosen, device=own.device)] = -1
    nearest_A = magnitudes_AF.argmax(dim=1)
    neighbours = zip(nearest_A.tolist(), cosines_AF[own, nearest_A].tolist(), strict=True)
    # + 0.0: no -0.0.
    return [{"atom": atom, "cosine": round(cosine, 4) + 0.0} for atom, cosine in neighbours]


class _Finder:
    """Finds an atom's strongest tokens and cuts out the text around them."""

    def __init__(self, text: ReadText, texts: TokenTexts, n_examples: int):
        self._text, self._texts, self._n_examples = text, texts, n_examples
        self._where_N2 = text.coded_CL.nonzero()
        self._row_CL = torch.full(text.coded_CL.shape, -1)
        self._row_CL[text.coded_CL] = torch.arange(len(self._where_N2))
        self._document_N = text.document_CL[text.coded_CL]

    def examples(self, token_n: Tensor, value_n: Tensor, sign: int) -> list[dict[str, Any]]:
        """The strongest tokens of one sign, at most one a document; of equals, the first."""
        activation_N = torch.zeros(len(self._where_N2))
        activation_N[token_n] = value_n
        wanted = value_n * sign > 0
        token_n, value_n = token_n[wanted], value_n[wanted]
        chosen: list[dict[str, Any]] = []
        seen: set[int] = set()
        for token in token_n[torch.argsort(value_n * sign, descending=True, stable=True)].tolist():
            document = int(self._document_N[token])
            if document not in seen:
                seen.add(document)
                chosen.append({"document": document, **self._cut(token, activation_N)})
            if len(chosen) == self._n_examples:
                break
        return chosen

    def _cut(self, token: int, activation_N: Tensor) -> dict[str, Any]:
        """The ordinary tokens of the same document and context around a token."""
        context, position = self._where_N2[token].tolist()
        text, part = self._text, slice(max(0, position - AROUND), position + AROUND + 1)
        shown = text.ordinary_CL[context, part] & (
            text.document_CL[context, part] == text.document_CL[context, position]
        )
        rows = self._row_CL[context, part][shown]
        activations = torch.where(rows >= 0, activation_N[rows.clamp(min=0)], 0.0)
        return {
            "peak": int((rows == token).nonzero()),
            "tokens": self._texts.all(text.tokens_CL[context, part][shown].tolist()),
            "activations": [rounded(value) for value in activations.tolist()],
        }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _write(path: Path, described: dict[str, Any]) -> None:
    """JSON with a line an atom: what was read, n_atoms, n_dead (on this text), signed, and atoms.

    An atom: its index, stratum, density (share of tokens), strongest |activation|, nearest (largest |cosine|),
    logit_lens, histogram of each sign (see ``histogram``), and examples of the positive and (where codes have signs)
    the negative sign. An example: document, peak (index of its token), tokens (texts), activations.
    """
    facts = {name: value for name, value in described.items() if name != "atoms"}
    head = json.dumps(facts, ensure_ascii=False, allow_nan=False).removesuffix("}")
    lines = ",\n".join(json.dumps(atom, ensure_ascii=False, allow_nan=False) for atom in described["atoms"])
    with atomic_path(path) as temporary:
        temporary.write_text(f'{head}, "atoms": [\n{lines}\n]}}\n', encoding="utf-8")
