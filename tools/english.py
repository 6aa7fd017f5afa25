"""English about photographs: what photo-clip's vocabulary is learned from, and what photo-mlm reads.

Captions of COCO and Flickr8k, the class names of the data sets in the prompt templates of CLIP's authors, and what
WordNet says about these names. Captions and class names lie below ROBUSTCLIP_DATA.
"""

import gzip
import os
import re
import string
from functools import cache
from itertools import chain
from pathlib import Path

from pretraining import write_vocabulary
from robustclip import _torchvision
from robustclip.data import lexicon
from robustclip.data.grammar import SPECIAL_TOKENS
from robustclip.data.loaders import class_names
from robustclip.data.sources import table_of

_torchvision.prepare()
from open_clip import OPENAI_IMAGENET_TEMPLATES  # noqa: E402  torchvision has to be prepared first

PIECES = 4500  # that are learned; the words of class names come on top
REPEATED = 5  # how often what WordNet says counts, beside many more captions
FUNCTION_WORDS = (  # words of a group may stand for each other
    ("a", "an", "the", "one", "this", "that", "some", "any", "every", "each", "another", "my", "your", "our", "its"),
    ("of", "with", "in", "on", "at", "by", "near", "from", "for", "to"),
    ("is", "was", "are", "were", "has", "had"),
)


def data_folder() -> Path:
    """The folder that ROBUSTCLIP_DATA names."""
    root = os.environ.get("ROBUSTCLIP_DATA", "")
    if not Path(root or "/nowhere", "captions-text").is_dir():
        raise FileNotFoundError(f"ROBUSTCLIP_DATA ({root or 'not set'}) must name a folder with captions-text in it")
    return Path(root)


@cache
def captions(held_out: bool = False) -> tuple[str, ...]:
    """Captions of photographs that no role tests on; those of every 50th photograph are held out."""
    found, tested = [], set(chain(*table_of("coco", "parquet", "test").captions))
    for path in sorted(data_folder().glob("captions-text/*.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        pairs = [(key.partition("#")[0], text) for key, _, text in (line.partition("\t") for line in lines)]
        hidden = {name for name, text in pairs if text in tested}
        apart = set(list(dict.fromkeys(name for name, _ in pairs))[::50])
        found += [text for name, text in pairs if name not in hidden and (name in apart) == held_out]
    return tuple(found)


@cache
def photo_names() -> tuple[str, ...]:
    """The class names of all sets of photographs."""
    folders = sorted(path.parent for path in data_folder().glob("*/classes.json"))
    return tuple(dict.fromkeys(name for folder in folders for name in class_names(folder)))


def templates() -> tuple[str, ...]:
    """The 80 prompt templates of CLIP's authors, with {} for a name."""
    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def alike(word: str) -> tuple[str, ...]:
    """What may stand for a word: the other function words of its group, or its synonyms."""
    group = next((group for group in FUNCTION_WORDS if word in group), ())
    return tuple(other for other in group if other != word) or lexicon.synonyms(word)


def photo_vocabulary() -> list[str]:
    """Special tokens, single characters, learned word pieces, and every word of a class name as a whole.

    The learner breaks ties by the numbers of pieces: those of characters are given, so that each run learns the same.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    characters = string.ascii_lowercase + string.digits
    given = [*SPECIAL_TOKENS, *characters, *string.punctuation, *(f"##{character}" for character in characters)]
    told = [text for name in photo_names() for text in (*lexicon.descriptions(name), *lexicon.synonyms(name))]
    texts = [*captions(), *photo_names(), *templates(), *REPEATED * told]
    learner = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS[1]))
    learner.normalizer, learner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(
        (text.encode("ascii", "ignore").decode() for text in texts),
        trainers.WordPieceTrainer(vocab_size=PIECES, min_frequency=2, show_progress=False, special_tokens=given),
    )
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    return list(dict.fromkeys([*learned, *re.findall(r"[a-z0-9]+", " ".join(photo_names()).lower())]))


def write_photo_tokenizer(folder: Path):
    """Save the tokenizer that photo-clip and photo-mlm share and return it."""
    return write_vocabulary(folder, photo_vocabulary())
