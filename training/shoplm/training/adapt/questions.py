"""How customers ask: the forms of questions that an adapter is trained on, in English."""

from __future__ import annotations

import re

import numpy as np

PRICE = (
    "What does {item} cost?",
    "What do {item} cost?",
    "How much is {item}?",
    "How much are {item}?",
    "What is the price of {item}?",
    "How much do I pay for {item}?",
    "Price of {item}?",
    "{item}: how much?",
    "I want {item}. How expensive is that?",
    "Could you give me the price of {item}?",
    "What do you charge for {item}?",
    "Tell me what one pays for {item}.",
)
CATEGORY = (
    "In which department do I find {item}?",
    "Where do I find {item}?",
    "Where can I find {item}?",
    "Where is {item}?",
    "Which category does {item} belong to?",
    "In what part of the store is {item}?",
)
STOCKED = (
    "Do you sell {item}?",
    "Do you have {item}?",
    "Have you got {item}?",
    "Do you carry {item}?",
    "Can I buy {item} here?",
    "I am looking for {item}.",
    "Is there {item} in your store?",
    "I need {item}.",
    "{item}?",
)
HABITS = (
    "What do I usually buy?",
    "What are my favourite products?",
    "What do I buy most often?",
    "Remind me what I often buy.",
)
WHOLE = ("{title}?", "I have a question about this: {title}.", "Please tell me: {title}?", "About: {title}")
NOT_SOLD = (
    "a sofa",
    "airline tickets",
    "cameras",
    "car tyres",
    "curtains",
    "diamonds",
    "a garden shed",
    "guitars",
    "horses",
    "laptops",
    "lottery machines",
    "mattresses",
    "a piano",
    "roof tiles",
    "running shoes",
    "sunglasses",
    "a swimming pool",
    "televisions",
    "video games",
    "wedding dresses",
)
UNKNOWN = (
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
    "Which paint is on the walls?",
    "Who cleans the windows?",
    "Who is the mayor of this town?",
    "What time is it in Tokyo?",
    "When will the store be rebuilt?",
    "What did the fountain cost to build?",
    "Do you have a photo studio?",
    "Which newspaper wrote about you?",
    "Which song is played at closing time?",
    "Can I sleep in the store?",
    "How many apples did you sell yesterday?",
)

_ANY = (
    "What about {words}?",
    "Can you tell me about {words}?",
    "I have a question: {words}?",
    "How is it with {words}?",
    "What do I need to know about {words}?",
    "Please tell me about {words}.",
    "{words}?",
)
_BY_WHAT_IT_SAYS = (  # what a sentence has in it, and how it may be asked for then
    (
        re.compile(r"[$€£]|\b(?:dollars?|euros?|cents?|pounds?|USD|EUR|GBP|free)\b", re.IGNORECASE),
        ("How much is {words}?", "What does it cost: {words}?", "What do I pay, {words}?", "Is {words} free?"),
    ),
    (
        re.compile(
            r"\b(?:[ap]\.m\.|\d{1,2}:\d{2}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?|every day)", re.IGNORECASE
        ),
        (
            "When {words}?",
            "At what time {words}?",
            "Until when {words}?",
            "What are the hours, {words}?",
            "On which days {words}?",
        ),
    ),
    (
        re.compile(r"\b(?:minutes?|hours?|days?|weeks?|months?|years?)\b", re.IGNORECASE),
        ("How long {words}?", "How many days or hours, {words}?", "How soon {words}?", "Within what time {words}?"),
    ),
    (
        re.compile(r"\b(?:can|cannot|may|must|not|only|take|accept|refund)\b", re.IGNORECASE),
        (
            "Can I {words}?",
            "Is it possible: {words}?",
            "Am I allowed {words}?",
            "Do you take {words}?",
            "Do I need {words}?",
        ),
    ),
    (
        re.compile(r"\b(?:at|in|beside|behind|desk|entrance|checkout|label|street|call)\b", re.IGNORECASE),
        ("Where {words}?", "Where do I go, {words}?", "How do I know {words}?", "How {words}?"),
    ),
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+")
_COMMON = frozenset(
    """the and are you your our for with from that this they them can cannot not have has had was were will would what
    when where which who how its every each per any all one two into out over under than then there here get got take
    taken come comes goes made make used use until something""".split()  # noqa: SIM905 - a list of words is easier to read without quotes
)
_LONGEST_SPAN = 5


def drawn(random: np.random.Generator, forms: tuple[str, ...]) -> str:
    """One of them."""
    return forms[random.integers(len(forms))]


def about_sentence(sentence: str, title: str, random: np.random.Generator) -> str:
    """A question that one sentence of the passage `title` answers: in a form for what the sentence says, with words of
    it, sometimes beside one of the title's; digits are what is asked for and stay out."""
    forms = [form for found, some in _BY_WHAT_IT_SAYS if found.search(sentence) for form in some]
    form = drawn(random, tuple(forms)) if forms and random.random() < 0.7 else drawn(random, _ANY)
    spoken = _WORD.findall(sentence)
    telling = [at for at, word in enumerate(spoken) if _tells(word)]
    if not telling:
        return form.format(words=title.lower())
    if random.random() < 0.5:
        start = telling[random.integers(len(telling))]
        words = spoken[start : start + int(random.integers(2, _LONGEST_SPAN + 1))]
    else:
        count = min(len(telling), int(random.integers(1, 4)))
        words = [spoken[at] for at in sorted(random.choice(telling, count, replace=False).tolist())]
    topic = [word for word in _WORD.findall(title) if _tells(word) and word not in words]
    if topic and random.random() < 0.5:
        words = [*words, topic[random.integers(len(topic))]]
    return form.format(words=" ".join(words).lower())


def _tells(word: str) -> bool:
    return len(word) > 2 and word.lower() not in _COMMON
