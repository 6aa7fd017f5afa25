"""TextAttack on CLIP: the same BERT-Attack assembled from its parts, as a reference, and a door to its recipes.

TextAttack downloads word lists when it is imported and moves the caches of other libraries. Here it is imported on
first use and given the one list it cannot do without, our stop words.
"""

import atexit
import copy
import logging
import os
import random
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from robustclip import _torchvision
from robustclip.attacks.base import MAX_SEED
from robustclip.attacks.language import load_language_model
from robustclip.attacks.text import OBJECTIVES, TextAttack, TextFeatures, check_texts, stop_words
from robustclip.checks import check_choice, check_integer
from robustclip.component import component
from robustclip.models import Clip

RECIPES = ("DeepWordBugGao2018", "Pruthi2019")  # the others download embeddings, taggers or sentence encoders


@contextmanager
def _same_random():
    """Random states are afterwards what they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _undisturbed():
    """As `_same_random`, for the environment, too; TextAttack's warnings are not shown."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with patch.dict(os.environ), warnings.catch_warnings(action="ignore"), _same_random():
            yield
    finally:
        logging.disable(level)


@cache
def import_textattack() -> ModuleType:
    """The module `textattack`, imported without network or TensorFlow, its cache a folder that is removed at exit."""
    _torchvision.prepare()
    with _same_random():
        for name in ("datasets", "matplotlib.font_manager", "sklearn", "transformers"):
            import_module(
                name
            )  # they remember where their caches are, which TextAttack moves, or set variables to keep
    import nltk

    folder = TemporaryDirectory(prefix="robustclip-")
    atexit.register(folder.cleanup)
    words = Path(folder.name, "corpora/stopwords/english")
    words.parent.mkdir(parents=True)
    words.write_text("\n".join(sorted(stop_words())) + "\n", encoding="utf-8")
    Path(folder.name, "post_install_check_3").touch()  # TextAttack's note to itself that its downloads are done
    nltk.data.path.append(folder.name)
    with _undisturbed():
        os.environ["TA_CACHE_DIR"] = folder.name
        return import_module("textattack")


def _not_stop_words():
    """TextAttack's constraint on what is swapped, with our list in any case of letters."""
    forms = {form for word in stop_words() for form in (word, word.capitalize(), word.upper())}
    return import_textattack().constraints.pre_transformation.StopwordModification(stopwords=forms)


@component
class TextAttackAttack(TextAttack):
    """An attack made of TextAttack's parts, on one prompt after the other, that changes at most `words` words."""

    objective: str = "kl"
    words: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_integer("words", self.words, 1)
        check_integer("seed", self.seed, 0, MAX_SEED)

    def goal(self, clip: Clip):
        """TextAttack's goal: an embedding far from the clean one; reached when `words` words have changed."""
        textattack, distance, words = import_textattack(), OBJECTIVES[self.objective], self.words

        class FarEmbedding(textattack.goal_functions.GoalFunction):
            def init_attack_example(self, attacked_text, ground_truth_output):
                self.clean = self.model([attacked_text.text])[0]
                return super().init_attack_example(attacked_text, ground_truth_output)

            def _get_score(self, model_output, attacked_text):
                return distance(self.clean, model_output).item()

            def _is_goal_complete(self, model_output, attacked_text):
                return len(attacked_text.all_words_diff(self.initial_attacked_text)) >= words

            def _process_model_outputs(self, inputs, outputs):
                return outputs

            def _goal_function_result_type(self):
                return textattack.goal_function_results.ClassificationGoalFunctionResult

        return FarEmbedding(TextFeatures(clip), model_batch_size=512)

    @abstractmethod
    def parts(self, clip: Clip) -> tuple[list, Any, Any]:
        """TextAttack's constraints, transformation and search method."""

    def __call__(self, clip: Clip, prompts: Sequence[str]) -> list[str]:
        """One attacked text per prompt; equal prompts are attacked once."""
        textattack, attacked = import_textattack(), dict.fromkeys(check_texts("prompts", prompts), "")
        with _undisturbed():
            attack = textattack.Attack(self.goal(clip), *self.parts(clip))
            for prompt in attacked:
                random.seed(seed := zlib.crc32(prompt.encode(), self.seed))
                np.random.seed(seed)  # noqa: NPY002  TextAttack draws from these two
                attacked[prompt] = attack.attack(prompt, 0).perturbed_result.attacked_text.text
        return [attacked[prompt] for prompt in prompts]


@component
class ReferenceBertAttack(TextAttackAttack):
    """BERT-Attack from TextAttack's parts: `WordSwapMaskedLM` proposes, `GreedyWordSwapWIR` searches.

    The reference for `BertAttack()` differs where a word has several pieces (it takes the first combinations of all
    candidates) or carries punctuation (which it leaves out of the word), where a guess is below the threshold (it knows
    none), and after a first swap (it asks the language model again).
    """

    candidates: int = 10
    max_pieces: int = 30
    language_model: str = "auto"

    def parts(self, clip: Clip) -> tuple[list, Any, Any]:
        """The masked language model's swaps under our stop list, the most important word first."""
        textattack, model = import_textattack(), load_language_model(self.language_model, clip)
        swap = textattack.transformations.WordSwapMaskedLM(
            method="bert-attack",
            masked_language_model=copy.deepcopy(model.network),  # TextAttack moves it to a device of its choice
            tokenizer=model.tokenizer,
            max_length=self.max_pieces,
            max_candidates=self.candidates,
        )

        class WholeWords(textattack.constraints.Constraint):
            def _check_constraint(self, transformed_text, reference_text):
                new = {transformed_text.words[at] for at in transformed_text.attack_attrs["newly_modified_indices"]}
                return not (new & stop_words() or any(part in transformed_text.text for part in ("##", *model.special)))

        once = textattack.constraints.pre_transformation.RepeatModification()
        few = textattack.constraints.overlap.MaxWordsPerturbed(max_num_words=self.words)
        search = textattack.search_methods.GreedyWordSwapWIR("unk", unk_token=model.unknown)
        return [once, few, _not_stop_words(), WholeWords(compare_against_original=True)], swap, search


@component
class FromTextAttack(TextAttackAttack):
    """One of TextAttack's recipes that change characters, its goal the distance of CLIP embeddings, stop words ours."""

    recipe: str = "DeepWordBugGao2018"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("recipe", self.recipe, RECIPES)

    def parts(self, clip: Clip) -> tuple[list, Any, Any]:
        """The recipe's own transformation and search; its constraints with our stop list."""
        built = getattr(import_textattack().attack_recipes, self.recipe).build(TextFeatures(clip))
        constraints, ours = [*built.pre_transformation_constraints, *built.constraints], _not_stop_words()
        others = [entry for entry in constraints if not isinstance(entry, type(ours))]
        return [*others, ours], built.transformation, built.search_method
