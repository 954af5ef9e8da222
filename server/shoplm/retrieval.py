"""The shop's own texts for chat: passages of `knowledge/*.md`, found by BM25 over stems of English words.

A passage is what stands under one heading. A dozen of short texts is what a shop has; there, exact words (a brand, an
opening day) find the right one, and no second model has to be loaded. In other languages words are found as they are
written, where their endings are not those of English ones.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shoplm.errors import BundleError

TEXTS_FOLDER = "knowledge"  # of a bundle
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
DECLINED = "I don't know. The shop's information does not say."  # what an adapted base says where no passage answers
ITEMS_SOURCE = "items.parquet"  # of passages about items
_WORTH = 0.6  # of the best passage's score
MAX_PASSAGE_CHARACTERS = 1200  # longer passages are split at blank lines


@dataclass(frozen=True, slots=True)
class Passage:
    """What stands under one heading of one text."""

    source: str  # file name in knowledge/
    title: str
    text: str

    @property
    def line(self) -> str:
        """The passage as it stands in a prompt."""
        return f"{self.title}: {self.text}"


def habits_passage(titles: Sequence[str]) -> Passage:
    """What the customer buys most, best first, as a passage."""
    return Passage("customer", "What this customer often buys", "; ".join(titles))


class WordIndex:
    """BM25 over stems of English words. Safe to share: it is not changed after construction."""

    def __init__(self, documents: Sequence[str]) -> None:
        import bm25s  # only here: a shop without texts starts without both
        import Stemmer

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG when it is imported
        self._bm25s = bm25s
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25()
        stems = self._stems(documents)
        self._known = frozenset(itertools.chain.from_iterable(stems))
        if self._known:
            self._index.index(stems, show_progress=False)

    def words(self, text: str) -> list[str]:
        """Its stems, in the order of the text."""
        return self._stems([text])[0]

    def asked(self, query: str) -> list[str]:
        """The stems of a question without words that any question has."""
        return self._stems([query], stopwords="english_plus")[0]

    def known(self, words: list[str]) -> list[str]:
        """Those that stand in some document."""
        return [word for word in words if word in self._known]

    def scores(self, words: list[str]) -> NDArray[np.float32]:
        """[documents] of words that are known."""
        scores: NDArray[np.float32] = self._index.get_scores(words)
        return scores

    def holds(self, text: str, words: list[str]) -> bool:
        """Whether all of these stems stand in the text."""
        return set(words) <= set(self.words(text))

    def _stems(self, texts: Sequence[str], stopwords: str | None = None) -> list[list[str]]:
        stems: list[list[str]] = self._bm25s.tokenize(
            list(texts), stopwords=stopwords, stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return stems


class Knowledge:
    """All passages of a bundle, and the search over them. Safe to share: it is not changed after construction."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = tuple(passages)
        documents = [f"{passage.title}\n{passage.text}" for passage in self.passages]
        self._index = WordIndex(documents) if documents else None

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, query: str, count: int, aside: frozenset[str] = frozenset()) -> list[Passage]:
        """At most `count` passages that share a word with the query, best first; ties in the order of the texts. Those
        that are far behind the best one are left out: they would only distract.

        Words such as `how` and `you` count only where the query asks for something that no text speaks of: a model that
        is shown what does not answer says so, and one that is shown nothing makes something up. Where something else
        answers already, they do not count, nor do those whose stems are in `aside`.
        """
        index = self._index
        if index is None or count <= 0:
            return []
        asked = [word for word in index.asked(query) if word not in aside]
        known = index.known(asked) or (index.known(index.words(query)) if asked and not aside else [])
        if not known:
            return []
        scores = index.scores(known)
        best = np.argsort(-scores, kind="stable")[:count]
        least = max(_WORTH * float(scores[best[0]]), np.finfo(np.float32).tiny)
        return [self.passages[row] for row in best.tolist() if scores[row] >= least]


def read_knowledge(folder: Path) -> Knowledge:
    """The texts of a bundle folder; empty if there are none. Raises BundleError for an unreadable file."""
    return read_texts(folder / TEXTS_FOLDER)


def read_texts(folder: Path) -> Knowledge:
    """The `.md` files of a folder, not those below it. Raises BundleError for an unreadable file."""
    passages: list[Passage] = []
    for path in text_files(folder):
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: {error}") from error
        passages += split_passages(path.name, text)
    return Knowledge(passages)


def text_files(folder: Path) -> list[Path]:
    """Its `.md` files, by name; none where there is no folder. Some systems write a hidden file beside each."""
    return [path for path in sorted(folder.glob("*.md")) if not path.name.startswith(".") and not path.is_dir()]


def split_passages(source: str, text: str) -> list[Passage]:
    """One passage per heading with text under it; text before the first heading has the file's name as its title."""
    passages: list[Passage] = []
    title, start = Path(source).stem.replace("-", " ").replace("_", " "), 0
    for match in [*_HEADING.finditer(text), None]:
        body = text[start : match.start() if match else len(text)].strip()
        passages += [Passage(source, title, part) for part in _parts(body)]
        if match:
            title, start = match.group(1), match.end()
    return passages


def _parts(body: str) -> list[str]:
    parts: list[str] = []
    for paragraph in filter(None, (each.strip() for each in re.split(r"\n\s*\n", body))):
        if parts and len(parts[-1]) + len(paragraph) + 2 <= MAX_PASSAGE_CHARACTERS:
            parts[-1] += f"\n\n{paragraph}"
        else:
            parts.append(paragraph)
    return parts
