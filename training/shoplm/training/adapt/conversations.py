"""Conversations that an adapter is trained on: facts of the shop to be repeated, and ordinary talk to be kept.

Facts come from the shop's own catalogue and knowledge folder: the question, passages among which the answer may be, and
the answer in the words of the passage; where no passage holds it, the answer is `DECLINED`. Ordinary talk are prompts
that the base itself answers, so that what it could say before is not forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from shoplm.catalog.items import Catalog
from shoplm.retrieval import DECLINED, Passage, habits_passage, item_passage

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+")
_COMMON = frozenset(
    """the and are you your our for with from that this they them can cannot not have has had was were will would what
    when where which who how its every each per any all one two into out over under than then there here get got take
    taken come comes goes made make used use""".split()  # noqa: SIM905 - a list of words is easier to read without quotes
)
_PRICE_QUESTIONS = (
    "What does {title} cost?",
    "How much is {title}?",
    "What is the price of {title}?",
    "How much do I pay for {title}?",
    "Price of {title}?",
)
_CATEGORY_QUESTIONS = (
    "In which department do I find {title}?",
    "Where do I find {title}?",
    "Which category does {title} belong to?",
)
_TITLE_QUESTIONS = ("{title}?", "I have a question about this: {title}.", "Please tell me: {title}?", "About: {title}")
_WORD_QUESTIONS = (
    "What about {words}?",
    "Can you tell me about {words}?",
    "I have a question: {words}?",
    "How is it with {words}?",
    "What do I need to know about {words}?",
    "Please tell me about {words}.",
)
_HABIT_QUESTIONS = (
    "What do I usually buy?",
    "What are my favourite products?",
    "What do I buy most often?",
    "Remind me what I often buy.",
)
_UNKNOWN_QUESTIONS = (
    "Who founded the shop?",
    "How many people work here?",
    "Is there a playground for children?",
    "What was the turnover last year?",
    "Which supplier delivers your bread?",
    "Do you have a branch in Rome?",
    "What is the manager's name?",
    "Can I rent a van from you?",
    "Do you repair bicycles?",
    "How warm is it in the store?",
    "Do you offer cooking classes?",
    "Is the cafeteria open today?",
    "How many floors does the store have?",
    "Can I charge my electric car at your place?",
    "Do you sell concert tickets?",
    "Which bus stops in front of the store?",
    "Are dogs allowed in the store?",
    "Do you print photos?",
    "How many parking spaces are there?",
    "Can I apply for a job here?",
    "Do you buy used books?",
    "Which music is played in the store?",
    "Do you wrap presents?",
    "Is there an app for my phone?",
    "What colour are the shopping bags?",
)
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


@dataclass(frozen=True, slots=True)
class Fact:
    """A question, the passages beside it, and the answer."""

    question: str
    passages: tuple[Passage, ...]
    answer: str


class FactWriter:
    """Draws facts of one shop at random."""

    def __init__(self, catalog: Catalog, knowledge: Sequence[Passage], currency: str) -> None:
        self._titles: dict[str, int] = {}
        for row in range(len(catalog)):
            if catalog.titles[row].strip() and np.isfinite(catalog.prices[row]):
                self._titles.setdefault(catalog.titles[row], row)
        self._rows = list(self._titles.values())
        self._catalog = catalog
        self._knowledge = tuple(knowledge)
        self._currency = currency

    def draw(self, random: np.random.Generator) -> Fact:
        """One fact: about the knowledge, the catalogue, or something that no passage answers."""
        kinds = ["unknown"]
        if self._knowledge:
            kinds += ["sentence", "sentence", "title"]
        if len(self._rows) > 1:
            kinds += ["price", "price", "category", "missing", "habits"]
        kind = kinds[random.integers(len(kinds))]
        if kind in ("sentence", "title"):
            return self._about_knowledge(random, whole=kind == "title")
        if kind == "habits":
            return self._habits(random)
        if kind == "unknown":
            question = _UNKNOWN_QUESTIONS[random.integers(len(_UNKNOWN_QUESTIONS))]
            return Fact(question, self._mixed(random, None), DECLINED)
        return self._about_item(random, kind)

    def _about_knowledge(self, random: np.random.Generator, *, whole: bool) -> Fact:
        passage = self._knowledge[random.integers(len(self._knowledge))]
        sentences = _SENTENCE.split(passage.text)
        if whole:
            question = _TITLE_QUESTIONS[random.integers(len(_TITLE_QUESTIONS))].format(title=passage.title)
            answer = sentences[0]
            for sentence in sentences[1:]:
                if len(f"{answer} {sentence}".split()) > _LONGEST_ANSWER_WORDS:
                    break
                answer = f"{answer} {sentence}"
        else:
            answer = sentences[random.integers(len(sentences))]
            words = [word for word in _WORD.findall(answer) if len(word) > 2 and word.lower() not in _COMMON]
            if not words:
                words = [passage.title]
            chosen = sorted(random.choice(len(words), min(len(words), int(random.integers(1, 4))), replace=False))
            text = " ".join(words[index] for index in chosen).lower()
            question = _WORD_QUESTIONS[random.integers(len(_WORD_QUESTIONS))].format(words=text)
        return Fact(question, self._mixed(random, passage), answer)

    def _habits(self, random: np.random.Generator) -> Fact:
        rows = random.choice(self._rows, min(len(self._rows), int(random.integers(1, 5))), replace=False)
        titles = [self._catalog.titles[row].split(",")[0] for row in rows.tolist()]
        question = _HABIT_QUESTIONS[random.integers(len(_HABIT_QUESTIONS))]
        return Fact(question, self._mixed(random, habits_passage(titles)), f"You often buy {'; '.join(titles)}.")

    def _about_item(self, random: np.random.Generator, kind: str) -> Fact:
        row = self._rows[random.integers(len(self._rows))]
        catalog, title = self._catalog, self._catalog.titles[row]
        questions = _CATEGORY_QUESTIONS if kind == "category" else _PRICE_QUESTIONS
        question = questions[random.integers(len(questions))].format(title=title)
        if kind == "missing":
            return Fact(question, self._mixed(random, None, not_row=row), DECLINED)
        price = f"{title} costs {catalog.prices[row]:.2f} {self._currency}."
        answer = f"{title} is in {catalog.categories[row]}." if kind == "category" else price
        return Fact(question, self._mixed(random, self._item(row), not_row=row), answer)

    def _item(self, row: int) -> Passage:
        catalog = self._catalog
        return item_passage(catalog.titles[row], catalog.categories[row], float(catalog.prices[row]), self._currency)

    def _mixed(
        self, random: np.random.Generator, right: Passage | None, not_row: int | None = None
    ) -> tuple[Passage, ...]:
        """Up to three other passages, and `right` at a random place among them."""
        passages: list[Passage] = []
        for _ in range(int(random.integers(0, 4))):
            if self._knowledge and (not self._rows or random.random() < 0.5):
                other = self._knowledge[random.integers(len(self._knowledge))]
            elif self._rows:
                row = self._rows[random.integers(len(self._rows))]
                if row == not_row:
                    continue
                other = self._item(row)
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
