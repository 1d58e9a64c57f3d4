"""Gemma's tokenizer out of a GGUF file, as the byte-pair encoding that it is.

transformers reads the SentencePiece vocabulary of a GGUF file as a Unigram model. Gemma's scores are
merge ranks, so Unigram cuts "government" into g-ov-ern-ment and the model's loss more than doubles. Here
the merges are rebuilt from the ranks: every way to cut a token into two others, best rank first.
"""

from pathlib import Path
from typing import Any

# GGUF token types (llama.cpp's LLAMA_TOKEN_TYPE_*).
_NORMAL, _USER_DEFINED = 1, 4
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """Write ``tokenizer.json`` and its config, loadable by AutoTokenizer, into ``folder``."""
    from transformers import GemmaTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    _byte_pair_encoding(gguf).save(str(path))
    tokenizer = GemmaTokenizerFast(
        tokenizer_file=str(path),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)


def _byte_pair_encoding(gguf: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, ranks, types = _read_vocabulary(gguf)
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        _merges(tokens, ranks, types),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL if t in tokens])
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in whole])
    return tokenizer


def _read_vocabulary(gguf: Path) -> tuple[list[str], list[float], list[int]]:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields

    def column(name: str) -> list[Any]:
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[i] for i in field.data]

    tokens = [bytes(part).decode() for part in column("tokens")]
    return tokens, [float(part[0]) for part in column("scores")], [int(part[0]) for part in column("token_type")]


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Best score first; among the cuts of one token, the lowest ids first. Runs of blanks merge before all else."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, int]] = []
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # SentencePiece matches user-defined pieces first; of those, only runs of one sign can be merged.
        is_run = kind == _USER_DEFINED and len(set(token)) == 1
        if kind != _NORMAL and not is_run:
            continue
        priority = -1e9 + len(token) if is_run else -score
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                merges.append((priority, i, left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in merges]
