"""Random models in a local Hub cache, under the names of real ones: loading by name then needs no network.

``transformers`` and ``tokenizers`` are imported inside the functions: they read the Hub cache's place at their import.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PYTHIA = "EleutherAI/pythia-160m-deduped"
GEMMA_2 = "google/gemma-2-2b"
# TransformerLens has no model of its own by this name.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M"
# Nor a bridge to one.
HELIUM = "kyutai/helium-1-preview-2b"
REVISION = "0" * 40
END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 512
# Blocks beyond the YAML's blocks.8, so that stopping at the hook's layer leaves something out.
N_LAYERS, D_MODEL, N_HEADS, N_CONTEXT = 10, 32, 4, 512


def documents(n: int, seed: int = 0, words: int = 120) -> list[str]:
    """``n`` documents of about ``words`` made-up words; words follow each other in a few fixed ways."""
    draw = random.Random(seed)
    syllables = ["ba", "co", "di", "fu", "ga", "hel", "in", "jo", "ka", "lum", "mo", "ne", "or", "pi", "qua", "rest"]
    lexicon = ["".join(draw.choices(syllables, k=1 + i % 4)) for i in range(150)]
    follows = {word: draw.choices(lexicon, k=4) for word in lexicon}
    texts = []
    for _ in range(n):
        word, text = draw.choice(lexicon), []
        for _ in range(draw.randint(words // 2, 3 * words // 2)):
            text.append(word)
            word = draw.choice(follows[word])
        texts.append(" ".join(text).capitalize() + ".")
    return texts


def write_text_folder(folder: Path, n: int, seed: int = 0) -> Path:
    """``n`` documents as .txt files."""
    folder.mkdir(parents=True)
    for i, text in enumerate(documents(n, seed)):
        (folder / f"{i:05d}.txt").write_text(text)
    return folder


def byte_pair_tokenizer(vocabulary_size: int = VOCABULARY_SIZE) -> Any:
    """A byte-level BPE, trained on made-up text, with <|endoftext|> in every role, as Pythia's has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(200), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def neox_model(seed: int = 0, n_layers: int = N_LAYERS) -> Any:
    """A GPTNeoXForCausalLM of some 200,000 random weights, float32."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        max_position_embeddings=N_CONTEXT,
        # Large enough for the blocks to change what they add to, and for the loss to notice.
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def gpt2_model() -> Any:
    """A GPT2LMHeadModel of some 40,000 random weights, float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=3,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _unlike_fresh(GPT2LMHeadModel(config))


def gemma_2_model() -> Any:
    """A Gemma2ForCausalLM of the sizes of ``hooked_gemma_2``."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        # TransformerLens' default, and its scale of scores.
        rms_norm_eps=1e-5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _unlike_fresh(Gemma2ForCausalLM(config))


@torch.no_grad()
def _unlike_fresh(model: nn.Module) -> Any:
    """Gains and biases as if they had been learned: fresh ones are 1 and 0, whatever is made of them."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def hooked_gemma_2(tokenizer: Any, dtype: torch.dtype = torch.float32, seed: int = 0, model_class: Any = None) -> Any:
    """A HookedTransformer built as Gemma-2 is, of some 40,000 random weights: RMS norms before and after, soft caps of
    scores and logits, gated MLPs, rotary positions, grouped keys, every other layer local."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3,
        d_model=24,
        d_head=8,
        n_heads=4,
        n_key_value_heads=2,
        d_mlp=48,
        n_ctx=64,
        d_vocab=VOCABULARY_SIZE,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        final_rms=True,
        use_normalization_before_and_after=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=8,
        use_local_attn=True,
        window_size=8,
        attn_types=["global", "local", "global"],
        # Small enough to bend these scores and logits.
        attn_scores_soft_cap=2.0,
        output_logits_soft_cap=3.0,
        # Large enough for the blocks to change what they add to, and for the loss to notice.
        initializer_range=0.3,
        dtype=dtype,
        seed=seed,
        device="cpu",
    )
    return (model_class or HookedTransformer)(config, tokenizer=tokenizer).eval()


def pythia_160m(home: Path, n_layers: int = N_LAYERS) -> Path:
    """A tiny GPT-NeoX under the name EleutherAI/pythia-160m-deduped in the HF_HOME ``home``; returns its snapshot."""
    snapshot = snapshot_of(home, PYTHIA)
    neox_model(n_layers=n_layers).save_pretrained(snapshot)
    byte_pair_tokenizer().save_pretrained(snapshot)
    return snapshot


def small_gemma_2_2b(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Gemma2ForCausalLM under the name google/gemma-2-2b in the HF_HOME ``home``; returns its snapshot.

    TransformerLens knows the real one's sizes by its name; in this process it is told these.
    """
    from transformer_lens import loading_from_pretrained
    from transformers import Gemma2Config, Gemma2ForCausalLM

    # Blocks beyond the YAML's blocks.12.
    n_layers, heads = 14, {"num_attention_heads": N_HEADS, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=n_layers,
        max_position_embeddings=N_CONTEXT,
        query_pre_attn_scalar=8,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["Gemma2ForCausalLM"],
        **heads,
    )
    sizes = {"d_model": D_MODEL, "d_head": 8, "n_heads": N_HEADS, "n_key_value_heads": 2, "d_mlp": 4 * D_MODEL}
    sizes |= {"n_layers": n_layers, "n_ctx": N_CONTEXT, "d_vocab": VOCABULARY_SIZE}
    convert = loading_from_pretrained.convert_hf_model_config

    def smaller(model_name: str, **options: Any) -> dict[str, Any]:
        found = convert(model_name, **options)
        return {**found, **sizes, "attn_types": found["attn_types"][:n_layers]} if model_name == GEMMA_2 else found

    monkeypatch.setattr(loading_from_pretrained, "convert_hf_model_config", smaller)
    snapshot = snapshot_of(home, GEMMA_2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma2ForCausalLM(config).eval().save_pretrained(snapshot)
    byte_pair_tokenizer().save_pretrained(snapshot)
    return snapshot


def smollm2(home: Path) -> Path:
    """A tiny Llama with tied embeddings under the name HuggingFaceTB/SmolLM2-135M in the HF_HOME ``home``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=3,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS // 2,
        max_position_embeddings=N_CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    snapshot = snapshot_of(home, SMOLLM2)
    LlamaForCausalLM(config).save_pretrained(snapshot)
    byte_pair_tokenizer().save_pretrained(snapshot)
    return snapshot


def helium(home: Path) -> Path:
    """A tiny HeliumForCausalLM under the name kyutai/helium-1-preview-2b in the HF_HOME ``home``; its snapshot."""
    from transformers import HeliumConfig, HeliumForCausalLM

    torch.manual_seed(0)
    config = HeliumConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=3,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=D_MODEL // N_HEADS,
        max_position_embeddings=N_CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    snapshot = snapshot_of(home, HELIUM)
    HeliumForCausalLM(config).save_pretrained(snapshot)
    byte_pair_tokenizer().save_pretrained(snapshot)
    return snapshot


def gemma_2_2b(home: Path) -> Path:
    """Full-size random bfloat16 weights under the name google/gemma-2-2b in the HF_HOME ``home``.

    TransformerLens takes the model's sizes from its name, so they are the real ones.
    """
    return wide_gemma_2(snapshot_of(home, GEMMA_2))


def wide_gemma_2(snapshot: Path, **sizes: Any) -> Path:
    """Random bfloat16 weights of Gemma-2-2B's sizes, but for those given; a shard a block: at no time is more than one
    in memory."""
    from safetensors.torch import save_file
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(dtype="bfloat16", architectures=["Gemma2ForCausalLM"], **sizes)
    with torch.device("meta"):
        shapes = {
            # The output matrix is the embedding's: a checkpoint has it once.
            name: weight.shape
            for name, weight in Gemma2ForCausalLM(config).named_parameters()
            if name != "lm_head.weight"
        }
    by_shard: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shard = f"model-block-{int(parts[2]):02d}.safetensors" if parts[1] == "layers" else "model-rest.safetensors"
        by_shard.setdefault(shard, []).append(name)
    generator = torch.Generator().manual_seed(0)
    n_bytes = 0
    for shard, names in by_shard.items():
        tensors = {}
        for name in names:
            weight = torch.empty(shapes[name], dtype=torch.bfloat16)
            # Gemma's norms multiply by 1 + weight.
            if "norm" in name:
                weight.zero_()
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)
            tensors[name] = weight
            n_bytes += weight.nbytes
        save_file(tensors, snapshot / shard, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": n_bytes},
        "weight_map": {name: shard for shard, names in by_shard.items() for name in names},
    }
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(snapshot)
    byte_pair_tokenizer().save_pretrained(snapshot)
    return snapshot


def snapshot_of(home: Path, name: str) -> Path:
    """Folder of the one revision of a model in the Hub's cache layout."""
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot
