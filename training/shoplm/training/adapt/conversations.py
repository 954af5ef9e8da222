"""Conversations that an adapter is trained on: facts of the shop to be repeated, and ordinary talk to be kept.

Facts come from the shop's own catalogue and knowledge folder: the question, passages among which the answer may be, and
the answer in the words of the passage; where no passage holds it, the answer is `DECLINED`. Ordinary talk are prompts
that the base itself answers, so that what it could say before is not forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from shoplm.catalog.items import Catalog
from shoplm.grounding import Grounding
from shoplm.retrieval import DECLINED, ITEMS_SOURCE, Knowledge, Passage, habits_passage
from shoplm.training.adapt import questions
from shoplm.training.adapt.questions import drawn

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_TALK_ABOUT = (
    "Give me a simple recipe with {topic}.",
    "How do I store {topic}?",
    "What goes well with {topic}?",
    "Write a short shopping list for {topic}.",
    "Tell me a fun fact about {topic}.",
    "What should I look for when I choose {topic}?",
    "How would you describe {topic} to a child?",
    "Is {topic} a good idea for a picnic?",
)
_TALK = (
    "Hello!",
    "Hi, how are you?",
    "Thank you, that helped a lot.",
    "What can you do for me?",
    "Suggest a dinner for two tonight.",
    "I am tired. Cheer me up.",
    "What is a good breakfast before a long walk?",
    "Plan three lunches for a child.",
    "How do I cook rice?",
    "Explain what a vitamin is.",
    "Write a birthday wish for my grandmother.",
    "How can I waste less food?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three vegetables that grow in winter.",
    "How many grams are in a pound?",
    "Tell me a short story about a cat.",
    "What is the difference between baking soda and baking powder?",
    "Give me five ideas for a healthy snack.",
    "How do I get a coffee stain out of a shirt?",
    "Write a haiku about autumn.",
    "What should I bring to a barbecue?",
    "Explain compound interest in two sentences.",
    "How long do hard-boiled eggs keep?",
    "Suggest a dessert without flour.",
    "What are good sources of protein?",
    "How do I keep bread fresh?",
    "Summarise why sleep matters.",
    "I want to eat less sugar. Where do I begin?",
    "Help me write a note to my neighbour about a parcel.",
)
_LONGEST_ANSWER_WORDS = 32
_SERVED = 0.6  # of the facts have the passages that a server would find for the question
_PASSAGES = 3


@dataclass(frozen=True, slots=True)
class Fact:
    """A question, the passages beside it, and the answer."""

    question: str
    passages: tuple[Passage, ...]
    answer: str


class FactWriter:
    """Draws facts of one shop at random."""

    def __init__(self, catalog: Catalog, knowledge: Knowledge, currency: str) -> None:
        self._grounding = Grounding(knowledge, catalog, currency, decay_days=1.0)
        self._rows = self._grounding.rows_with_facts
        self._catalog = catalog
        self._knowledge = knowledge.passages
        self._currency = currency

    def draw(self, random: np.random.Generator) -> Fact:
        """One fact: about the knowledge, the catalogue, or something that no passage answers."""
        kinds = ["unknown"]
        if self._knowledge:
            kinds += ["sentence"] * 3 + ["title"]
        if len(self._rows) > 1:
            kinds += ["price", "price", "category", "stocked", "stocked", "missing", "not sold", "habits"]
        kind = drawn(random, tuple(kinds))
        if kind in ("sentence", "title"):
            return self._about_knowledge(random, whole=kind == "title")
        if kind == "habits":
            return self._habits(random)
        if kind in ("unknown", "not sold"):
            return self._unknown(random, sold=kind == "unknown")
        return self._about_item(random, kind)

    def _about_knowledge(self, random: np.random.Generator, *, whole: bool) -> Fact:
        passage = self._knowledge[random.integers(len(self._knowledge))]
        sentences = _SENTENCE.split(passage.text)
        if whole:
            question = drawn(random, questions.WHOLE).format(title=passage.title)
            answer = sentences[0]
            for sentence in sentences[1:]:
                if len(f"{answer} {sentence}".split()) > _LONGEST_ANSWER_WORDS:
                    break
                answer = f"{answer} {sentence}"
        else:
            answer = drawn(random, tuple(sentences))
            question = questions.about_sentence(answer, passage.title, random)
        return Fact(question, self._beside(random, question, passage), answer)

    def _habits(self, random: np.random.Generator) -> Fact:
        rows = random.choice(self._rows, min(len(self._rows), int(random.integers(1, 5))), replace=False)
        titles = [self._catalog.titles[row].split(",")[0] for row in rows.tolist()]
        passages = self._mixed(random, habits_passage(titles))
        return Fact(drawn(random, questions.HABITS), passages, f"You often buy {'; '.join(titles)}.")

    def _unknown(self, random: np.random.Generator, *, sold: bool) -> Fact:
        """What no shop's texts say, or what a shop of this kind does not sell."""
        question = drawn(random, questions.UNKNOWN)
        if not sold:
            question = drawn(random, questions.STOCKED).format(item=drawn(random, questions.NOT_SOLD))
            if any(each.source == ITEMS_SOURCE for each in self._grounding.search(question, None, _PASSAGES)):
                return self._unknown(random, sold=True)  # this one does
        return Fact(question, self._beside(random, question, None), DECLINED)

    def _about_item(self, random: np.random.Generator, kind: str) -> Fact:
        row = self._rows[random.integers(len(self._rows))]
        item = self._catalog.titles[row]
        if random.random() < 0.5:  # by its name alone: the first item of this name speaks
            item = item.split(",")[0]
            row = self._grounding.rows_of_name(item)[0]
            item = item.lower() if random.random() < 0.5 else item
        asked = {"category": questions.CATEGORY, "stocked": questions.STOCKED}.get(kind, questions.PRICE)
        if kind == "missing" and random.random() < 0.5:
            asked = questions.STOCKED
        question = drawn(random, asked).format(item=item)
        if kind == "missing":
            return Fact(question, self._mixed(random, None, unnamed=item), DECLINED)
        title = self._catalog.titles[row]
        answer = f"{title} costs {self._catalog.prices[row]:.2f} {self._currency}."
        if kind == "category":
            answer = f"{title} is in {self._catalog.categories[row]}."
        if kind == "stocked":
            answer = f"Yes. {answer}"
        return Fact(question, self._beside(random, question, self._grounding.item(row)), answer)

    def _beside(self, random: np.random.Generator, question: str, right: Passage | None) -> tuple[Passage, ...]:
        """What a server would find for the question, with `right` among it; or passages at random."""
        if random.random() >= _SERVED:
            return self._mixed(random, right)
        passages = self._grounding.search(question, None, _PASSAGES)
        if right is not None and right not in passages:
            passages = passages[: _PASSAGES - 1]
            passages.insert(int(random.integers(len(passages) + 1)), right)
        return tuple(passages)

    def _mixed(self, random: np.random.Generator, right: Passage | None, unnamed: str = "") -> tuple[Passage, ...]:
        """Up to three others, none of an item of the name `unnamed`, and `right` at a random place among them."""
        hidden = unnamed.split(",")[0].lower()
        passages: list[Passage] = []
        for _ in range(int(random.integers(0, _PASSAGES + 1))):
            if self._knowledge and (not self._rows or random.random() < 0.5):
                other = self._knowledge[random.integers(len(self._knowledge))]
            elif self._rows:
                other = self._grounding.item(self._rows[random.integers(len(self._rows))])
                if hidden and other.title.split(",")[0].lower() == hidden:
                    continue
            else:
                continue
            if other != right and other not in passages:
                passages.append(other)
        if right is not None:
            passages.insert(int(random.integers(len(passages) + 1)), right)
        return tuple(passages)


def talk_prompts(catalog: Catalog, count: int, random: np.random.Generator) -> list[str]:
    """`count` prompts of ordinary talk, a part of them about what the shop sells."""
    topics = sorted({title.split(",")[0].strip().lower() for title in catalog.titles if title.strip()})
    prompts: list[str] = []
    for _ in range(count):
        if topics and random.random() < 0.6:
            topic = topics[random.integers(len(topics))]
            prompts.append(_TALK_ABOUT[random.integers(len(_TALK_ABOUT))].format(topic=topic))
        else:
            prompts.append(_TALK[random.integers(len(_TALK))])
    return prompts
