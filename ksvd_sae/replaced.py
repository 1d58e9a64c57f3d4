"""All that is changed around SAEBench and its libraries at run time, and the one place where it is done.

SAEBench has no hooks: what does not fit is changed by putting something else under one of its names for as long as an
eval runs. ``TABLE`` says for each name what stands there instead, why, and which test notices when it is needed no
longer; ``replaced`` does it and refuses what is not in the table. What is put there is made beside the eval that needs
it (``adapters.py`` of its folder).

``docs/replacements.md`` is this table: ``python -m ksvd_sae.replaced > docs/replacements.md``.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ksvd_sae.errors import UpstreamError

# Target -> what is to stand there; for a dict, the entries that it gets.
Changes = Mapping[str, Any]

_SAE_BENCH = "sae-bench 0.6.0"
_TRANSFORMER_LENS = "transformer-lens 3.2.1"
_HERE = "tests/evals/test_upstream.py::"
_MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """Something of a library that is replaced.

    used_by: the evals, or what else needs it.  instead: what stands there.  why: what is wrong with the original, or
    what work it does again and again.  seen_in: versions in which that was seen.  noticed_by: tests that run the
    original and fail once it is mended.  added: the library has nothing of this name.
    """

    used_by: str
    instead: str
    why: str
    seen_in: str
    noticed_by: tuple[str, ...]
    added: bool = False


TABLE: dict[str, Replacement] = {
    # ------------------------------------------------------------ loading a model
    "transformer_lens.HookedTransformer.from_pretrained_no_processing": Replacement(
        used_by="all evals",
        instead="gives the model that was loaded last, if it is the one that is asked for and is as it was; with the "
        "run's own weights, and a BOS before texts if its contexts had one",
        why="SAEBench loads the model anew in each eval, which takes longer than many an eval's share of it; by its "
        "name alone, and with a BOS or not as TransformerLens and the tokenizer have it.",
        seen_in=f"{_SAE_BENCH}, {_TRANSFORMER_LENS}",
        noticed_by=("tests/evals/test_loaded_model.py::test_scores_of_evals_that_share_the_model",),
    ),
    "transformers.GPTNeoXForCausalLM.embed_out": Replacement(
        used_by="loading a model of TransformerLens, with transformers 5",
        instead="a property: the unembedding, whatever it is called",
        why="GPT-NeoX's (Pythia's) unembedding is called lm_head from transformers 5 on; TransformerLens asks for "
        "embed_out, as it was called before.",
        seen_in=f"{_TRANSFORMER_LENS} with transformers 5",
        noticed_by=("tests/activations/test_transformers_5.py::test_transformer_lens_asks_for_the_old_name",),
        added=True,
    ),
    "gguf.GGUFReader": Replacement(
        used_by="converting the demo's model",
        instead="gives one reader of the file",
        why="A reader takes a dozen seconds to go through Gemma's vocabulary, and transformers makes two, one for the "
        "config and one for the weights, beside the one for the tokenizer.",
        seen_in="gguf 0.19 with transformers 4.57 and 5",
        noticed_by=("tests/offline/test_gemma.py::test_transformers_reads_the_file_anew_each_time",),
    ),
    # ------------------------------------------------------------ core
    "sae_bench.evals.core.main.get_recons_loss": Replacement(
        used_by="core",
        instead="the same losses from runs of the model that a panel shares (`core/shared.py`), noted by context",
        why="For every SAE the model runs as it is, with zeros at the hook, and spliced; only the spliced run differs.",
        seen_in=_SAE_BENCH,
        noticed_by=("tests/evals/test_shared_core.py::test_panel_has_saebenchs_scores_and_runs_the_model_once",),
    ),
    "sae_bench.evals.core.main.get_sparsity_and_variance_metrics": Replacement(
        used_by="core",
        instead="SAEBench's own function on activations that a panel shares",
        why="The activations are read again for every SAE.",
        seen_in=_SAE_BENCH,
        noticed_by=("tests/evals/test_shared_core.py::test_panel_has_saebenchs_scores_and_runs_the_model_once",),
    ),
    "sae_bench.evals.core.main.save_single_eval_result": Replacement(
        used_by="core",
        instead="the same, with sums of the losses by context beside the scores",
        why="The losses of all tokens become one mean; an interval over contexts cannot be had from that.",
        seen_in=_SAE_BENCH,
        noticed_by=("tests/evals/test_items.py::test_cores_result_says_nothing_of_contexts",),
    ),
    "sae_bench.evals.core.main.replace_nans_with_negative_one": Replacement(
        used_by="core",
        instead="leaves NaN as it is; results say null, and why",
        why="−1 is a loss recovered that can happen: a NaN that is written as −1 looks like a score.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_core_writes_minus_one_for_nan",),
    ),
    # ------------------------------------------------------------ sae-probes
    "sae_probes.generate_model_activations._process_activations": Replacement(
        used_by="sae-probes",
        instead="the same, for each text once, beside others as long (`sae_probes/adapters.py`)",
        why="Many data sets are one text asked different things, and each is read in full; batches in the data sets' "
        "order are half padding.",
        seen_in="sae-probes 0.4.2",
        noticed_by=(_HERE + "test_sae_probes_reads_a_text_again",),
    ),
    # ------------------------------------------------------------ sparse probing, sae-probes, SCR, TPP, autointerp
    "transformer_lens.hook_points.HookPoint.add_hook": Replacement(
        used_by="sparse probing, sae-probes, SCR, TPP and autointerp",
        instead="the same, for a function that sees the heads of an activation flattened",
        why="At a hook with heads these give the SAE (contexts, tokens, heads, d_head), or fail before: core alone "
        "flattens them, and at four hooks.",
        seen_in=f"{_SAE_BENCH}, {_TRANSFORMER_LENS}",
        noticed_by=(_HERE + "test_heads_are_not_flattened",),
    ),
    # ------------------------------------------------------------ sparse probing, SCR, TPP
    "sae_bench.sae_bench_utils.dataset_info.chosen_classes_per_dataset": Replacement(
        used_by="sparse probing and TPP",
        instead="has the labels of our data sets, too",
        why="SAEBench knows the labels of its own eight data sets only.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_sparse_probing_has_a_closed_list_of_data_sets",),
    ),
    "sae_bench.sae_bench_utils.dataset_utils.get_multi_label_train_test_data": Replacement(
        used_by="sparse probing and TPP",
        instead="reads our data sets of text and integer label as SAEBench reads ag_news",
        why="SAEBench reads its own eight data sets only, each by its name.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_sparse_probing_has_a_closed_list_of_data_sets",),
    ),
    "sae_bench.evals.sparse_probing.main.get_dataset_activations": Replacement(
        used_by="sparse probing",
        instead="the same; the LLM's probes, which come next, are seeded",
        why="Each SAE is seeded once, before the LLM's probes are trained with the SAE that comes first: its scores "
        "are others where the LLM's activations were there, as after a run that was stopped.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_sparse_probing_scores_depend_on_what_was_there",),
    ),
    "sae_bench.sae_bench_utils.activation_collection.get_sae_meaned_activations": Replacement(
        used_by="sparse probing",
        instead="the same; the random state is as if the LLM's probes had not been trained",
        why="Each SAE is seeded once, before the LLM's probes are trained with the SAE that comes first: its scores "
        "are others where the LLM's activations were there, as after a run that was stopped.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_sparse_probing_scores_depend_on_what_was_there",),
    ),
    "sae_bench.sae_bench_utils.dataset_info.dataset_metadata": Replacement(
        used_by="SCR",
        instead="has our data sets, too, laid out as LabHC/bias_in_bios",
        why="SAEBench knows the columns and labels of its own two data sets only.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_scr_has_a_closed_list_of_data_sets",),
    ),
    "sae_bench.evals.scr_and_tpp.main.COLUMN2_VALS_LOOKUP": Replacement(
        used_by="SCR and TPP",
        instead="has the genders of our data sets, too; none for TPP",
        why="SAEBench knows the second attribute of its own two data sets only, and looks it up for TPP, too, which "
        "has no use for it.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_scr_has_a_closed_list_of_data_sets",),
    ),
    # ------------------------------------------------------------ absorption
    "sae_bench.evals.absorption.common.get_alpha_tokens": Replacement(
        used_by="absorption",
        instead="the words of `vocabulary.py`: sorted, each once, without odd ones, a sample if asked for",
        why="Words come in the tokenizer's order, which changes with every call, so no seed draws the same ones again; "
        "and one word that is several tokens in its prompt stops the eval.",
        seen_in=_SAE_BENCH,
        noticed_by=(
            _HERE + "test_absorptions_words_come_in_the_tokenizers_order",
            "tests/evals/test_absorption.py::test_saebench_stops_at_an_odd_word",
        ),
    ),
    "sae_bench.evals.absorption.feature_absorption.get_alpha_tokens": Replacement(
        used_by="absorption",
        instead="the same words",
        why="As above; this module has the function under a name of its own.",
        seen_in=_SAE_BENCH,
        noticed_by=(
            _HERE + "test_absorptions_words_come_in_the_tokenizers_order",
            "tests/evals/test_absorption.py::test_saebench_stops_at_an_odd_word",
        ),
    ),
    "sae_bench.evals.absorption.common._parse_probe_data_split": Replacement(
        used_by="absorption",
        instead="the same, with the words as they were stored",
        why="Words that were stored are made into strings again as if they were tokens: with tokenizers that drop a "
        "leading space in doing so (Llama's), the eval goes on with other words, not all of them tokens.",
        seen_in=_SAE_BENCH,
        noticed_by=(
            "tests/evals/test_absorption.py::test_words_stay_as_they_are_behind_a_tokenizer_that_drops_spaces",
        ),
    ),
    "sae_bench.evals.absorption.common.create_dataset_probe_training": Replacement(
        used_by="absorption",
        instead="the same, but an error that names the letters if one has no word to learn from",
        why="The probe of such a letter is trained to NaN, and the eval ends with a KeyError, after the model has run, "
        "when it is to score the first SAE.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_a_letter_without_words_ends_absorption_late",),
    ),
    "sae_bench.evals.absorption.feature_absorption.FeatureAbsorptionCalculator": Replacement(
        used_by="absorption",
        instead="the same, on activations at the words that are kept for a panel",
        why="The model runs on the same prompts again for each SAE.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_absorption_runs_the_whole_model_for_each_sae",),
    ),
    "sae_bench.evals.absorption.k_sparse_probing.metrics": Replacement(
        used_by="absorption",
        instead="the same numbers without scikit-learn's checks of its arguments (`binary_metrics.py`)",
        why="The eval asks scikit-learn for eight thousand scores of a thousand words each, one by one; nine tenths of "
        "the time go into looking at the arguments.",
        seen_in=f"{_SAE_BENCH} with scikit-learn 1.9.1",
        noticed_by=(_HERE + "test_absorption_asks_scikit_learn_for_every_score",),
    ),
    "sae_bench.evals.absorption.main.run_k_sparse_probing_experiment": Replacement(
        used_by="absorption",
        instead="the same, seeded, in folders of ours, once the letter probes are there",
        why="The eval never uses its seed. It writes probes and tables inside the installed package and finds them "
        "again by names: the probes by model and layer, whatever the words, prompt and dtype were, the tables by the "
        "SAE's name, even if they were half written.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_absorption_uses_no_seed_and_writes_into_its_package",),
    ),
    "sae_bench.evals.absorption.main.run_feature_absortion_experiment": Replacement(
        used_by="absorption",
        instead="the same, seeded, in folders of ours",
        why="As above.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_absorption_uses_no_seed_and_writes_into_its_package",),
    ),
    "sae_bench.evals.absorption.main.AbsorptionEvalOutput": Replacement(
        used_by="absorption",
        instead="the same, with the number of words used and left out in `eval_result_unstructured`",
        why="Which words were left out belongs to the scores; SAEBench's result says nothing of its words.",
        seen_in=_SAE_BENCH,
        noticed_by=("tests/evals/test_absorption.py::test_scores_are_saebenchs",),
    ),
    # ------------------------------------------------------------ absorption and autointerp
    "transformer_lens.HookedTransformer.run_with_cache": Replacement(
        used_by="absorption, autointerp",
        instead="absorption: ends behind the block whose hook is read. Autointerp: answered from what was kept",
        why="Absorption reads one block's output and runs the whole model, logits of the whole vocabulary and all. "
        "Autointerp runs the model over the same tokens twice for every SAE, to count what fires and to collect texts.",
        seen_in=f"{_SAE_BENCH}, {_TRANSFORMER_LENS}",
        noticed_by=(
            _HERE + "test_absorption_runs_the_whole_model_for_each_sae",
            _HERE + "test_autointerp_runs_the_model_twice_for_each_sae",
        ),
    ),
    # ------------------------------------------------------------ autointerp
    "sae_bench.evals.autointerp.main.OpenAI": Replacement(
        used_by="autointerp",
        instead="a client that asks the judge of the config",
        why="SAEBench asks gpt-4o-mini and nothing else, each question once: one rate limit, timeout or empty reply "
        "ends the eval with all answers lost.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_autointerp_asks_one_model_once",),
    ),
    "sae_bench.evals.autointerp.main.AutoInterp": Replacement(
        used_by="autointerp",
        instead="the same, with latents and failures counted, and the example in a question drawn by seed",
        why="A prediction that is no list of numbers drops its latent unseen. The example of an answer that a question "
        "shows is another one in each run, so a second run asks other questions than those that have answers.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_autointerp_drops_latents_and_draws_its_example_anew",),
    ),
    "sae_bench.evals.autointerp.main.AutoInterpEvalOutput": Replacement(
        used_by="autointerp",
        instead="the same, written whole, with the judge and its costs, and the logs in a file of their own",
        why="The result does not say who judged, and holds every text that the judge was shown, some 10 kB a latent.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_autointerps_result_holds_logs_and_no_judge",),
    ),
    "sae_bench.sae_bench_utils.dataset_utils.load_and_tokenize_dataset": Replacement(
        used_by="autointerp",
        instead="the same, but an error that names the data set and the number of tokens if it is too short, and no "
        "BOS where the run's contexts had none",
        why="A bare assertion fails, which names neither. A BOS is written over the first token of each context.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_too_little_text_is_a_bare_assertion",),
    ),
    # ------------------------------------------------------------ RAVEL
    "sae_bench.evals.ravel.main.LLM_NAME_MAP": Replacement(
        used_by="RAVEL",
        instead="has the run's model, too",
        why="SAEBench knows the Hub's names of two models only.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravel_knows_two_models",),
    ),
    "sae_bench.evals.ravel.main.AutoModelForCausalLM": Replacement(
        used_by="RAVEL",
        instead="gives one model for the panel, with the run's own weights, without gradients or dropout, with logits "
        "of the last token alone, and completions of full length",
        why="Masks are trained with gradients for every weight of the model and logits of every token, of which one is "
        "read; dropout stays on once a mask was trained; of completions that all end early, too many tokens are taken.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravel_trains_masks_on_a_model_in_training",),
    ),
    "sae_bench.evals.ravel.main.AutoTokenizer": Replacement(
        used_by="RAVEL",
        instead="gives one tokenizer for the panel, with a BOS before texts if the run's contexts had one",
        why="The tokenizer is loaded several times for each attribute: seconds each, with Gemma's vocabulary.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravel_loads_the_tokenizer_again_and_again",),
    ),
    "sae_bench.evals.ravel.main.run_eval_single_cause_attribute": Replacement(
        used_by="RAVEL",
        instead="the same, with the numbers of pairs beside the scores",
        why="The result does not say over how many pairs a score is averaged.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravels_scores_come_without_numbers_of_pairs",),
    ),
    "sae_bench.evals.ravel.intervention.generate_batched_interventions": Replacement(
        used_by="RAVEL",
        instead="the same, but an error where there is no pair of a kind; counts pairs",
        why="The mean of no pairs is NaN.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravels_score_of_no_pairs_is_nan",),
    ),
    "sae_bench.evals.ravel.instance.RAVELInstance.build_and_tokenize_prompts": Replacement(
        used_by="RAVEL",
        instead="the same, with the entity's last token also where the tokenizer puts nothing before a text",
        why="SAEBench counts the tokens behind the entity and relies on a <bos> among them. Pythia's tokenizer adds "
        "none: the position is the next token's, or the first of all where nothing follows.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravel_takes_it_that_there_is_a_bos",),
    ),
    "sae_bench.sae_bench_utils.activation_collection.get_module": Replacement(
        used_by="RAVEL",
        instead="finds the layers of any decoder; hooks on them get a tuple and do not outlive the eval",
        why="SAEBench knows Gemma-2's and GPT-NeoX's layers, and takes outputs[0] of what they return: of a tensor, "
        "which Llama's layers return, and all from transformers 5 on, that is the batch's first row. Where a "
        "dictionary fails inside a hook, the hook stays on the model.",
        seen_in=f"{_SAE_BENCH} with transformers 4.57.6 and 5",
        noticed_by=(
            _HERE + "test_ravel_knows_the_layers_of_two_architectures",
            _HERE + "test_ravel_takes_a_layers_tensor_for_a_tuple",
        ),
    ),
    "sae_bench.sae_bench_utils.activation_collection.get_layer_activations": Replacement(
        used_by="RAVEL",
        instead="the same activations, computed once for a panel, and no further than the layer",
        why="The whole model runs for them in every epoch and for every SAE, although they follow from the prompts.",
        seen_in=_SAE_BENCH,
        noticed_by=(_HERE + "test_ravel_runs_the_whole_model_for_the_same_activations",),
    ),
}


@contextmanager
def replaced(*changes: Changes) -> Iterator[None]:
    """Inside, each target is what ``changes`` say; afterwards it is what it was, also after an exception.

    Raises: UpstreamError (a target that is not in the table, given twice, or not there in what is installed).
    """
    pairs = [pair for one in changes for pair in one.items()]
    targets = [target for target, _ in pairs]
    if unknown := [target for target in targets if target not in TABLE]:
        raise UpstreamError(
            f"replaced: {unknown[0]} is not in the table",
            cure="add it to ksvd_sae/replaced.py with a reason and a test",
        )
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise UpstreamError(f"replaced: {twice[0]} is given twice", cure="nest one in the other")
    with ExitStack() as undo:
        for target, value in pairs:
            owner, name = resolve(target)
            current = getattr(owner, name, None)
            if isinstance(current, dict):
                undo.callback(_refill, current, dict(current))
                current.update(value)
                continue
            # As it lies in the class: a classmethod, and not the method that it gives.
            own = vars(owner).get(name, _MISSING)
            setattr(owner, name, value)
            undo.callback(*((delattr, owner, name) if own is _MISSING else (setattr, owner, name, own)))
        yield


def _refill(entries: dict[Any, Any], before: dict[Any, Any]) -> None:
    entries.clear()
    entries.update(before)


def resolve(target: str) -> tuple[Any, str]:
    """The module or class that has the target, and the target's name in it.

    Raises: UpstreamError if there is none in what is installed.
    """
    root, *path, name = target.split(".")
    place = root
    try:
        owner = import_module(root)
        for part in path:
            place = f"{place}.{part}"
            # A class first: TransformerLens has a module of the same name.
            owner = getattr(owner, part) if hasattr(owner, part) else import_module(place)
        if not (hasattr(owner, name) or TABLE[target].added):
            raise AttributeError(f"{place} has no {name}")
    except (ImportError, AttributeError) as error:
        raise UpstreamError(
            f"replaced: {target} is not there",
            got=f"{error}; installed: {_installed(root)}",
            limit=f"written for {TABLE[target].seen_in}",
            cause="another version, which may need the replacement no longer, or elsewhere",
            cure="install the versions of constraints.txt, or see the tests of the table's entry",
        ) from error
    return owner, name


def _installed(package: str) -> str:
    name = package.replace("_", "-")
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def page() -> str:
    """The table as Markdown."""
    lines = [_INTRODUCTION.format(n=len(TABLE))]
    for used_by in dict.fromkeys(entry.used_by for entry in TABLE.values()):
        lines += [f"## {used_by[0].upper()}{used_by[1:]}", ""]
        lines += ["| name | what stands there instead | why | seen in | noticed by |", "|---|---|---|---|---|"]
        for target, entry in TABLE.items():
            if entry.used_by == used_by:
                place, _, name = target.rpartition(".")
                tests = "<br>".join(f"`{test}`" for test in entry.noticed_by).replace("::", "`<br>`")
                columns = (f"`{place}`<br>`{name}`", entry.instead, entry.why, entry.seen_in, tests)
                lines.append(f"| {' | '.join(columns)} |")
        lines.append("")
    return "\n".join(lines)


_INTRODUCTION = """# What is replaced around SAEBench

<!-- From ksvd_sae/replaced.py: python -m ksvd_sae.replaced > docs/replacements.md -->

The evals are SAEBench's own code, but it does not run as it is: while an eval runs, something else stands under the
{n} names below, and afterwards what was there before. Nothing is written into the installed packages. Where SAEBench
can give scores by itself, ours are the same; tests compare them.

The tests in the last column run the original, and fail once it need not be replaced any more.
"""


if __name__ == "__main__":
    print(page(), end="")
