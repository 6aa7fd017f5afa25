"""English about photographs, of a small folder of captions and class names."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import english
from robustclip.data import lexicon

CAPTIONS = [f"{image}.jpg#{number}\tA dog number {image} runs , again ." for image in range(120) for number in range(2)]
TESTED = 7  # the image that is tested on


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder of one file of captions, two sets with classes, and one image that the file captions, too."""
    for name, names in (("captions-text", None), ("pets", ["siamese cat", "dog"]), ("toys", ["dog", "Xylophone"])):
        (tmp_path / name).mkdir()
        if names:
            (tmp_path / name / "classes.json").write_text(json.dumps(names))
    with gzip.open(tmp_path / "captions-text" / "some.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(CAPTIONS) + "\n")
    (tmp_path / "coco-mini").mkdir()
    tested = {
        "image": [{"bytes": b"...", "path": ""}],
        "captions": [[f"A dog number {TESTED} runs , again .", "said nowhere else"]],
    }
    pq.write_table(pa.table(tested), tmp_path / "coco-mini" / "test.parquet")
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    english.captions.cache_clear()
    english.photo_names.cache_clear()
    yield tmp_path
    english.captions.cache_clear()
    english.photo_names.cache_clear()


def test_held_out_captions_are_those_of_whole_images(folder):
    held, rest = english.captions(held_out=True), english.captions()
    assert len(held) + len(rest) == len(CAPTIONS) - 2
    assert sorted(set(held)) == [f"A dog number {image} runs , again ." for image in (0, 100, 50)]
    assert not set(held) & set(rest)


def test_captions_of_images_that_are_tested_on_are_left_out(folder):
    said = english.captions(held_out=True) + english.captions()
    assert not [text for text in said if f"number {TESTED} " in text]


def test_function_words_stand_for_each_other_and_other_words_for_their_synonyms():
    assert {"the", "this", "one"} <= set(english.alike("a"))
    assert "a" not in english.alike("a")
    assert english.alike("automobile") == lexicon.synonyms("automobile") != ()


def test_the_vocabulary_is_the_same_in_every_run_and_knows_every_character_and_class(folder, tmp_path):
    vocabulary = english.photo_vocabulary()
    assert english.photo_vocabulary() == vocabulary
    assert len(set(vocabulary)) == len(vocabulary)
    tokenizer = english.write_photo_tokenizer(tmp_path / "model")
    assert english.photo_names() == ("siamese cat", "dog", "Xylophone")
    assert tokenizer.tokenize("Siamese cat, dog: xylophone") == ["siamese", "cat", ",", "dog", ":", "xylophone"]
    printable = "".join(map(chr, range(33, 127)))
    for text in (printable, "x" + printable, " ".join(printable)):
        assert tokenizer.unk_token not in tokenizer.tokenize(text)


def test_templates_have_a_place_for_a_name():
    assert len(set(english.templates())) == 80
    assert all(template.count("{}") == 1 for template in english.templates())


def test_without_captions_the_error_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ROBUSTCLIP_DATA .* captions-text"):
        english.data_folder()
