"""The words of SAEBench's absorption eval: of a model's vocabulary, those that are one token in a prompt."""

import logging
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from typing import Any

from sae_bench.evals.absorption.prompting import first_letter_formatter
from sae_bench.evals.absorption.vocab import convert_tokens_to_string, get_alpha_tokens

from ksvd_sae.errors import EvaluationError

logger = logging.getLogger(__name__)
_EXAMPLES = 20


@dataclass
class Vocabulary:
    """Words of a tokenizer's vocabulary, always the same ones in the same order.

    Differs from SAEBench's ``get_alpha_tokens``: sorted, for tokenizers give their vocabulary in another order at every
    call, and a shuffle of it by seed would still differ; each word once, for byte tokens spell letters again; without
    words of odd tokenisation; a sample, if asked for.

    Args:
        template, position: the prompt, and where in it the word is, from its end.
        sample: how many words, drawn by ``seed`` and evenly over letters; None: all.
    """

    tokenizer: Any
    template: str
    position: int
    sample: int | None
    seed: int

    @cached_property
    def spelled(self) -> list[str]:
        """Every word of letters, once."""
        return sorted(set(get_alpha_tokens(self.tokenizer)))

    @cached_property
    def odd(self) -> list[str]:
        """Words that are no single token at ``position`` of their prompt.

        Prompts must be of one length, and SAEBench reads activations at ``position`` whatever is there: a single word
        that becomes several tokens stops the eval at a letter, and would spoil every prompt that has it as an example.

        Raises: EvaluationError if most words are odd: then it is not the words.
        """
        answer = first_letter_formatter()
        # As a word stands in a prompt: once among the examples, once at the end.
        prompts = [self.template.format(word=word) for word in self.spelled]
        texts = [f"\n{p}{answer(w)}\n{p}" for p, w in zip(prompts, self.spelled, strict=True)]
        ids = self.tokenizer(texts)["input_ids"] if texts else []
        usual = Counter(map(len, ids)).most_common(1)[0][0] if ids else 0
        odd = [w for w, i in zip(self.spelled, ids, strict=True) if len(i) != usual or self._at_position(i) != w]
        if 2 * len(odd) >= len(self.spelled):
            raise EvaluationError(
                f"absorption: {len(odd)} of the vocabulary's {len(self.spelled)} words are not one token at the place "
                "in the prompt where activations are read",
                got=f"such as {odd[:5]}, prompt {self.template!r}, position {self.position}",
                cause="this tokenizer divides the prompt's own words otherwise"
                if odd
                else "the tokenizer has no words of the letters a to z",
                cure="set evaluation.absorption.prompt_token_pos to the word's place, counted from the prompt's end",
            )
        return odd

    def _at_position(self, ids: list[int]) -> str:
        if len(ids) < -self.position:
            return ""
        (token,) = self.tokenizer.convert_ids_to_tokens([ids[self.position]])
        return convert_tokens_to_string(token, self.tokenizer)

    @cached_property
    def words(self) -> list[str]:
        """The words to use.

        Raises: EvaluationError if fewer than ``sample`` can be used.
        """
        left_out = set(self.odd)
        words = [word for word in self.spelled if word not in left_out]
        if self.sample is not None:
            if self.sample > len(words):
                raise EvaluationError(
                    "absorption: the vocabulary has fewer words than are to be drawn",
                    got=f"{len(words)} words",
                    limit=f"vocabulary_sample: {self.sample}",
                    cure="lower evaluation.absorption.vocabulary_sample, or set it to null for all words",
                )
            words = self._drawn(words, self.sample)
        logger.info(
            "absorption: %d of the vocabulary's %d words; %d left out as they are not one token in the prompt%s",
            len(words),
            len(self.spelled),
            len(self.odd),
            f", such as {', '.join(map(repr, self.odd[:5]))}" if self.odd else "",
        )
        return words

    def _drawn(self, words: list[str], n: int) -> list[str]:
        """As many words of each letter, as far as there are: scores are means over letters, and of 2,000 words drawn
        as they come five begin with x."""
        draw, by_letter = random.Random(self.seed), defaultdict[str, list[str]](list)
        for word in words:
            by_letter[word.strip()[0].lower()].append(word)
        shuffled = [draw.sample(of_letter, len(of_letter)) for of_letter in by_letter.values()]
        in_turn = (word for words in zip_longest(*shuffled) for word in words if word is not None)
        return list(islice(in_turn, n))

    def facts(self) -> dict[str, Any]:
        """What a result says of its words."""
        return {
            "words_in_vocabulary": len(self.spelled),
            "words_left_out": len(self.odd),
            "words_left_out_such_as": self.odd[:_EXAMPLES],
            "words_used": len(self.words),
        }
