"""TextAttack on CLIP: the same BERT-Attack assembled from its parts, as a reference, and a door to its recipes.

TextAttack downloads word lists when it is imported, silences other loggers and sets environment variables. Here it is
imported on first use, given the one list it cannot do without (our stop words), and leaves the process as it was.
"""

import atexit
import copy
import logging
import os
import random
import shutil
import tempfile
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustclip import _torchvision
from robustclip.attacks.base import MAX_SEED
from robustclip.attacks.language import load_language_model
from robustclip.attacks.text import OBJECTIVES, TextAttack, check_texts, embed, in_float32, stop_words
from robustclip.checks import check_choice, check_integer
from robustclip.component import component
from robustclip.models import Clip

RECIPES = ("DeepWordBugGao2018", "Pruthi2019")  # the others download embeddings, taggers or sentence encoders
INSTALLED = "post_install_check_3"  # TextAttack's note to itself that its downloads are done


@contextmanager
def _undisturbed():
    """Whatever TextAttack does to environment, loggers, warnings and random state is undone at the end."""
    manager, environment = logging.root.manager, dict(os.environ)
    disabled = {logger: logger.disabled for logger in manager.loggerDict.values() if isinstance(logger, logging.Logger)}
    level, states = manager.disable, (random.getstate(), np.random.get_state())  # noqa: NPY002
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        logging.disable(level)
        for logger, value in disabled.items():
            logger.disabled = value
        for name in os.environ.keys() - environment.keys():
            if not name.startswith("KMP_"):  # scikit-learn's, without which OpenMP may refuse to load twice
                del os.environ[name]
        os.environ.update(environment)


def _word_lists() -> str:
    """A folder, removed at exit, that holds what TextAttack looks for when it is imported."""
    folder = Path(tempfile.mkdtemp(prefix="robustclip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "corpora/stopwords").mkdir(parents=True)
    (folder / "corpora/stopwords/english").write_text("\n".join(sorted(stop_words())) + "\n", encoding="utf-8")
    (folder / INSTALLED).touch()
    return str(folder)


@cache
def import_textattack() -> ModuleType:
    """The module `textattack`, imported without network, TensorFlow or lasting changes to the process."""
    _torchvision.prepare()
    with _undisturbed():
        for name in ("datasets", "matplotlib.font_manager", "transformers"):
            import_module(name)  # they remember where their caches are, which TextAttack moves
        import nltk

        folder = _word_lists()
        nltk.data.path.append(folder)
        if not Path(os.environ.get("TA_CACHE_DIR", "~/.cache/textattack"), INSTALLED).expanduser().is_file():
            os.environ["TA_CACHE_DIR"] = folder
        import textattack
    return textattack


# --- the parts that are ours ------------------------------------------------------------------------------------------


class _Encoder:
    """A CLIP as TextAttack's model: texts to unit features."""

    def __init__(self, clip: Clip) -> None:
        self.model = in_float32(clip)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return embed(self.model, list(texts))


def _goal(clip: Clip, objective: str, words: int):
    """TextAttack's goal: an embedding far from the clean one; reached when `words` words have changed."""
    textattack = import_textattack()

    class FarEmbedding(textattack.goal_functions.GoalFunction):
        def init_attack_example(self, attacked_text, ground_truth_output):
            self.clean = self.model([attacked_text.text])[0]
            return super().init_attack_example(attacked_text, ground_truth_output)

        def _get_score(self, model_output, attacked_text):
            return OBJECTIVES[objective](self.clean, model_output).item()

        def _is_goal_complete(self, model_output, attacked_text):
            return len(attacked_text.all_words_diff(self.initial_attacked_text)) >= words

        def _process_model_outputs(self, inputs, outputs):
            return outputs

        def _goal_function_result_type(self):
            return textattack.goal_function_results.ClassificationGoalFunctionResult

    return FarEmbedding(_Encoder(clip), model_batch_size=512)


def _not_stop_words():
    """TextAttack's constraint on what is swapped, with our list in any case."""
    both = {form for word in stop_words() for form in (word, word.capitalize(), word.upper())}
    return import_textattack().constraints.pre_transformation.StopwordModification(stopwords=both)


def _whole_words(special: frozenset[str]):
    """A constraint on what is put in: no stop word, no word piece, none of the language model's special tokens."""
    textattack = import_textattack()

    class WholeWords(textattack.constraints.Constraint):
        def _check_constraint(self, transformed_text, reference_text):
            new = [transformed_text.words[place] for place in transformed_text.attack_attrs["newly_modified_indices"]]
            text = transformed_text.text
            return stop_words().isdisjoint(new) and "##" not in text and not any(token in text for token in special)

    return WholeWords(compare_against_original=True)


# --- attacks ----------------------------------------------------------------------------------------------------------


@component
class TextAttackAttack(TextAttack):
    """An attack made of TextAttack's parts, on one prompt after the other, that changes at most `words` words.

    What happens to a prompt depends on the prompt and the seed only.
    """

    objective: str = "kl"
    words: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_integer("words", self.words, 1)
        check_integer("seed", self.seed, 0, MAX_SEED)

    def goal(self, clip: Clip):
        """TextAttack's goal function: see `_goal`."""
        return _goal(clip, self.objective, self.words)

    @abstractmethod
    def parts(self, clip: Clip) -> tuple[list, Any, Any]:
        """TextAttack's constraints, transformation and search method."""

    def __call__(self, clip: Clip, prompts: Sequence[str]) -> list[str]:
        """One attacked text per prompt; equal prompts are attacked once."""
        textattack, attacked = import_textattack(), dict.fromkeys(check_texts("prompts", prompts), "")
        with _undisturbed():
            attack = textattack.Attack(self.goal(clip), *self.parts(clip))
            for prompt in attacked:
                seed = zlib.crc32(prompt.encode(), self.seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002  TextAttack draws from these two
                attacked[prompt] = attack.attack(prompt, 0).perturbed_result.attacked_text.text
        return [attacked[prompt] for prompt in prompts]


@component
class ReferenceBertAttack(TextAttackAttack):
    """BERT-Attack from TextAttack's parts: `WordSwapMaskedLM` proposes, `GreedyWordSwapWIR` searches.

    The reference for `BertAttack()`. It differs where a word has several pieces (TextAttack takes the first
    combinations of all candidates) or carries punctuation (which it leaves out of the word), where a guess is below the
    threshold (it knows none), and after a first swap (it asks the language model again).
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
        constraints = [
            textattack.constraints.pre_transformation.RepeatModification(),
            _not_stop_words(),
            textattack.constraints.overlap.MaxWordsPerturbed(max_num_words=self.words),
            _whole_words(model.special),
        ]
        search = textattack.search_methods.GreedyWordSwapWIR(wir_method="unk", unk_token=model.unknown)
        return constraints, swap, search


@component
class FromTextAttack(TextAttackAttack):
    """One of TextAttack's recipes with the distance of CLIP embeddings as its goal: "DeepWordBugGao2018", "Pruthi2019".

    These two change characters and need no downloads. Stop words are ours, in any case of letters.
    """

    recipe: str = "DeepWordBugGao2018"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("recipe", self.recipe, RECIPES)

    def parts(self, clip: Clip) -> tuple[list, Any, Any]:
        """The recipe's own transformation and search; its constraints with our stop list."""
        textattack = import_textattack()
        built = getattr(textattack.attack_recipes, self.recipe).build(_Encoder(clip))
        stop = textattack.constraints.pre_transformation.StopwordModification
        before = [entry for entry in built.pre_transformation_constraints if not isinstance(entry, stop)]
        return [*before, _not_stop_words(), *built.constraints], built.transformation, built.search_method
