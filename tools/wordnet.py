"""Write what WordNet says about the class names of all data sets into `src/robustclip/assets/wordnet.json`.

    python tools/wordnet.py --data DATA           DATA is the folder of the data sets, by default $ROBUSTCLIP_DATA
    python tools/wordnet.py --data DATA --list    print what each class name was taken to mean, write nothing

It reads the database of WordNet 3.0, by default where Debian's package `wordnet-base` puts it. A class means what
`wordnet-senses.toml` says, else what its set says (wnids.json), else the first sense of its name. The licence of the
database is copied beside the JSON. The same database and data sets give the same bytes.
"""

import argparse
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from robustclip.checks import check_folder
from robustclip.files import write_whole

ASSETS = Path(__file__).resolve().parent.parent / "src" / "robustclip" / "assets"
SENSES = Path(__file__).with_name("wordnet-senses.toml")
DEBIAN = Path("/usr/share/wordnet")  # package wordnet-base
LONGEST = 120  # characters of a gloss
KINDS = {"n": "noun", "a": "adj"}


class Database:
    """The nouns and adjectives of a WordNet folder; synsets are called like wnids, "n02121620"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if missing := [name for name in self._files() if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{str(folder)!r} has no {missing[0]}; give the folder of a WordNet 3.0 database")

    @staticmethod
    def _files() -> list[str]:
        return [f"{part}.{kind}" for part in ("index", "data") for kind in KINDS.values()]

    def _lines(self, name: str) -> Iterator[str]:
        text = (self.folder / name).read_text(encoding="utf8")
        return (line for line in text.splitlines() if not line.startswith(" "))  # those are the licence

    @cached_property
    def licence(self) -> str:
        """The notice at the head of the database."""
        lines = (self.folder / "data.noun").read_text(encoding="utf8").splitlines()
        return "".join(re.sub(r"^ *\d+ ?", "", line).rstrip() + "\n" for line in lines if line.startswith(" "))

    @cached_property
    def index(self) -> dict[str, list[str]]:
        """Synsets of "n:lemma" and "a:lemma", the most frequent sense first."""
        found = {}
        for key, kind in KINDS.items():
            for line in self._lines(f"index.{kind}"):
                fields = line.split()
                found[f"{key}:{fields[0]}"] = [key + offset for offset in fields[-int(fields[2]) :]]
        return found

    @cached_property
    def synsets(self) -> dict[str, str]:
        """The line of each synset."""
        return {key + line[:8]: line for key, kind in KINDS.items() for line in self._lines(f"data.{kind}")}

    def sense(self, said: str) -> str | None:
        """The synset of "ray 3" (third sense of the noun), "a:bumpy" (adjective) or "n02121620"; None if unknown."""
        if said in self.synsets:
            return said
        kind, _, rest = said.rpartition(":")
        name, number = re.fullmatch(r"(.*?)(?: (\d+))?", rest).groups()
        lemma = name.replace(" ", "_")
        for form in (lemma, re.sub("s$", "", lemma), re.sub("es$", "", lemma), lemma.replace("_", "")):
            if synsets := self.index.get(f"{kind or 'n'}:{form}"):
                return synsets[int(number or 1) - 1]
        return None

    def lemmas(self, synset: str) -> list[str]:
        """The words of a synset in lower case."""
        fields = self.synsets[synset].split()
        lemmas = (re.sub(r"\(\w+\)$", "", lemma) for lemma in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
        return list(dict.fromkeys(lemma.replace("_", " ").lower() for lemma in lemmas))

    def parents(self, synset: str) -> list[str]:
        """The synsets right above; adjectives have none."""
        fields = self.synsets[synset].split(" | ")[0].split()
        return [fields[at + 2] + fields[at + 1] for at, mark in enumerate(fields) if mark in ("@", "@i")]

    def gloss(self, synset: str) -> str:
        """The definition without examples and remarks in brackets, as many of its clauses as fit."""
        text = re.split(r'; "|: "', self.synsets[synset].partition(" | ")[2])[0].replace("`", "'")
        clauses = re.split(r"(?=[;:,] )", re.sub(r"\s*\([^)]*\)", "", text).strip())
        fitting = [clauses[0]]
        for clause in clauses[1:]:
            if len("".join(fitting)) + len(clause) > LONGEST:
                break
            fitting.append(clause)
        return "".join(fitting).strip()


def class_names(folder: Path) -> dict[str, dict[str, str]]:
    """Per data set the names of its classes, each with the synset that the set gives it or ""."""
    found = {}
    for path in sorted(folder.glob("*/classes.json")):
        names, wnids = json.loads(path.read_text()), path.with_name("wnids.json")
        synsets = json.loads(wnids.read_text()) if wnids.exists() else [""] * len(names)
        found[path.parent.name] = dict(zip(names, synsets, strict=True))
    return found


class Lexicon:
    """What goes into the JSON."""

    def __init__(self, database: Database, senses: dict) -> None:
        self.database, self.senses = database, senses
        plain = {name: said for name, said in senses["senses"].items() if "/" not in name}
        self.names = {name: self._meant(said) for name, said in plain.items()}
        self.synsets, self.unknown = {}, []
        for name, own in senses["own"].items():
            parents = [self._meant(parent) for parent in own["kinds"]]
            self.names[name], self.synsets[name] = name, [[], own["gloss"], parents]

    def _meant(self, said: str) -> str:
        if not (synset := self.database.sense(said)):
            raise ValueError(f"WordNet has no {said!r}; correct {SENSES.name}")
        return synset

    def name(self, data: str, name: str, wnid: str) -> None:
        """Give a class its synset; where it means another thing than elsewhere, its name carries the set's."""
        said = self.senses["senses"].get(f"{data}/{name}", wnid)
        synset = self.database.sense(said) if said else self.names.get(name) or self.database.sense(name)
        if synset is None:
            self.unknown.append(f"{data}/{name}")
        elif self.names.setdefault(name, synset) != synset:
            self.names[f"{data}/{name}"] = synset

    def describe(self) -> None:
        """Write down the synsets of all names, and the kinds above them with one word each, or none if too vague."""
        named = set(self.names.values()) - set(self.senses["own"])
        for synset in named:
            kept = [lemma for lemma in self._words(synset) if self._owner(lemma, named) == synset]
            self.synsets[synset] = [kept, self.database.gloss(synset), self._parents(synset)]
        for name in set(self.senses["glosses"]) & set(self.names):
            self.synsets[self.names[name]][1] = self.senses["glosses"][name]
        above = [parent for _, _, parents in self.synsets.values() for parent in parents]
        while above:
            if (synset := above.pop()) not in self.synsets:
                kept = [lemma for lemma in self.database.lemmas(synset)[:1] if lemma not in self.senses["vague"]]
                self.synsets[synset] = [kept, "", self._parents(synset)]
                above += self.synsets[synset][2]

    def _owner(self, lemma: str, named: set[str]) -> str:
        """Of the classes that share a word, the one called so, else the one that it means most often."""
        senses = [sense for key in KINDS for sense in self.database.index.get(f"{key}:{lemma.replace(' ', '_')}", ())]
        return self.names.get(lemma) or next(sense for sense in senses if sense in named)

    def _words(self, synset: str) -> list[str]:
        lemmas = self.database.lemmas(synset)
        wrong = {lemma for word in lemmas for lemma in self.senses["wrong"].get(word, ())}
        return [lemma for lemma in lemmas if lemma not in wrong]

    def _parents(self, synset: str) -> list[str]:
        first = {parent: self.database.lemmas(parent)[0] for parent in self.database.parents(synset)}
        cut = self.senses["cut"].get(self.database.lemmas(synset)[0])
        return [parent for parent, lemma in first.items() if lemma != cut]

    def words(self) -> dict[str, list[str]]:
        """Synonyms of the words that prompts are made of: those of templates, and of kinds that end a name."""
        found = {}
        for name, synset in self.names.items():
            last = name.rpartition(" ")[2]
            for above in self._kinds(synset) - set(self.senses["own"]):
                if last not in self.names and last in self.database.lemmas(above):
                    found.setdefault(last, set()).add(above)
        senses = {word: kinds for word, kinds in found.items() if len(kinds) == 1}
        senses |= {word: map(self._meant, said) for word, said in self.senses["words"].items()}
        words = {word: self._others(word, meant) for word, meant in senses.items()}
        return {word: others for word, others in words.items() if others}

    def _kinds(self, synset: str) -> set[str]:
        """The synset and all above it."""
        return {synset}.union(*map(self._kinds, self.synsets[synset][2]))

    def _others(self, word: str, synsets: Iterable[str]) -> list[str]:
        lemmas = (lemma for synset in synsets for lemma in self._words(synset))
        return [lemma for lemma in dict.fromkeys(lemmas) if word not in lemma.split()]

    def text(self) -> str:
        """The JSON, one line per entry."""
        tables = {"names": self.names, "synsets": self.synsets, "words": self.words()}
        return "{" + ",\n".join(f'"{key}":{_lines(table)}' for key, table in tables.items()) + "}\n"


def _lines(table: dict) -> str:
    rows = (f"{json.dumps(key)}:{json.dumps(table[key], separators=(',', ':'))}" for key in sorted(table))
    return "{\n" + ",\n".join(rows) + "}"


def build(database: Database, data: Path, senses: dict) -> Lexicon:
    """The lexicon of all class names below `data`; sets that name their synsets come first."""
    lexicon = Lexicon(database, senses)
    sets = class_names(data)
    for name in sorted(sets, key=lambda name: (not all(sets[name].values()), name)):
        for class_name, wnid in sets[name].items():
            lexicon.name(name, class_name, wnid)
    lexicon.describe()
    return lexicon


def main() -> None:
    """Write the JSON, or list what names were taken to mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=DEBIAN, help="database folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=os.environ.get("ROBUSTCLIP_DATA"), help="folder of the data sets")
    parser.add_argument("--to", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--list", action="store_true", help="print what names were taken to mean, write nothing")
    given = parser.parse_args()
    lexicon = build(Database(given.wordnet), given.data, tomllib.loads(SENSES.read_text(encoding="utf8")))
    if given.list:
        for name, synset in sorted(lexicon.names.items()):
            lemmas, gloss, parents = lexicon.synsets[synset]
            print(name, synset, ", ".join(lemmas), gloss, [lexicon.synsets[parent][0] for parent in parents], sep=" | ")
        print("unknown:", *lexicon.unknown, sep="\n")
    elif lexicon.unknown:
        parser.error(f"WordNet has no {', '.join(lexicon.unknown)}; add them to {SENSES.name}")
    else:
        check_folder(given.to)
        write_whole(given.to / "wordnet.json", lexicon.text())
        write_whole(given.to / "wordnet-license.txt", lexicon.database.licence)


if __name__ == "__main__":
    main()
