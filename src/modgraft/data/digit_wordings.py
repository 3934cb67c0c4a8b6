"""How people word the questions of DigitsQA: templates, and words for their places and numbers.

In a template, `{a}` and `{b}` are places as adjectives ("left", "first"), `{at}` and `{too}` the
same places as phrases ("on the left"), `{order}` is the first as an adverb ("first"), `{n}` and
`{m}` are "digit" and "digits" or words like them, and `{c}` is "larger" or "smaller" or the like.
A family's first template is DigitsQA's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TEMPLATES: dict[str, tuple[str, ...]] = {
    "read": (
        "What is the {a} {n}?",
        "What's the {a} {n}?",
        "What {n} is {at}?",
        "Which {n} is {at}?",
        "What is {at}?",
        "What's {at}?",
        "What is the {n} {at}?",
        "The {a} {n} is",
        "The {n} {at} is",
        "{a} {n}?",
        "{a} {n}",
        "Tell me the {a} {n}.",
        "Tell me which {n} is {at}.",
        "Give me the {n} {at}, please.",
        "Give the {a} {n}.",
        "Name the {n} {at}.",
        "Read the {a} {n}.",
        "Please read the {n} {at}.",
        "Can you tell me the {a} {n}?",
        "Can you read the {n} {at}?",
        "Could you read out the {a} {n} for me?",
        "Which {n} do you see {at}?",
        "What do you see {at}?",
        "What {n} stands {at}?",
        "What is written {at}?",
        "Look at the strip. Which {n} is {at}?",
        "In the picture, what is the {a} {n}?",
        "What {n} comes {order}?",
        "Which one comes {order}?",
        "What is the {a} one?",
        "Read the {a} one.",
        "Which {n} is the {a} one?",
        "What does it say {at}?",
        "I would like to know the {n} {at}.",
        "How do you read the {a} {n}?",
        "Do you know the {a} {n}?",
        "Say what the {a} {n} is.",
        "Which {n} can you find {at}?",
    ),
    "single": (
        "What is the {n}?",
        "Which {n} is it?",
        "What {n} is it?",
        "Which {n} is shown?",
        "What is the {n} in the picture?",
        "Which {n} is in the picture?",
        "Read the {n}.",
        "Tell me the {n}.",
        "The {n} is",
        "What do you see?",
        "What {n} do you see?",
        "What {n} is shown here?",
        "Can you read the {n}?",
        "Name the {n} in the strip.",
    ),
    "compare": (
        "Which {n} is {c}, {a} or {b}?",
        "Which is {c}, {a} or {b}?",
        "Which is {c}: the {a} {n} or the {b} {n}?",
        "Which one is {c}, the {a} or the {b}?",
        "Which is the {c} {n}, {a} or {b}?",
        "Which {n} is the {c} one, the {a} {n} or the {b} {n}?",
        "What is the {c} of {a} and {b}?",
        "What's the {c} of the {a} and the {b} {n}?",
        "What is the {c} one of the {a} and the {b} {n}?",
        "Of {a} and {b}, which is {c}?",
        "Of the {a} and the {b} {n}, which one is {c}?",
        "Between {a} and {b}, which {n} is {c}?",
        "Between the {a} and {b} {m}, which is the {c} one?",
        "Is {a} or {b} {c}?",
        "Is the {a} or the {b} {n} {c}?",
        "{a} or {b}: which is {c}?",
        "{a} or {b}, which {n} is {c}?",
        "The {c} of {a} and {b}",
        "The {c} {n}, {a} or {b}?",
        "{c}: {a} or {b}?",
        "Give the {c} of the {a} and {b} {m}.",
        "Give me the {c} {n}, {a} or {b}.",
        "Tell me which {n} is {c}, {a} or {b}.",
        "Tell me the {c} of the {a} {n} and the {b} {n}.",
        "Compare {a} and {b}: which is {c}?",
        "Compare the {a} {n} with the {b} {n} and take the {c}.",
        "Take the {c} of {a} and {b}.",
        "Pick the {c} one: {a} or {b}.",
        "Find the {c} {n} of {a} and {b}.",
        "Which of {a} and {b} is {c}?",
        "Which of the {m} {at} and {too} is {c}?",
        "Which of them is {c}, the {n} {at} or the {n} {too}?",
        "{a} and {b}: which has the {c} value?",
        "Who is {c}, {a} or {b}?",
        "Look at {a} and {b}. What is the {c} {n}?",
        "Say which is {c}, {a} or {b}.",
        "Of the {m} {a} and {b}, the {c} is",
        "Does {a} or {b} have the {c} {n}?",
    ),
    "add": (
        "What is {a} plus {b}?",
        "What's {a} plus {b}?",
        "{a} plus {b}?",
        "{a} + {b}",
        "What is {a} + {b}?",
        "{a} plus {b} =",
        "{a} + {b} is",
        "How much is {a} and {b}?",
        "How much is the {a} {n} plus the {b} {n}?",
        "How much are {a} and {b} together?",
        "What is the sum of {a} and {b}?",
        "What's the sum of the {a} and the {b} {n}?",
        "The sum of {a} and {b}?",
        "Sum of {a} {n} and {b} {n}",
        "Sum up {a} and {b}.",
        "What is the total of {a} and {b}?",
        "Total of the {a} and {b} {m}?",
        "Add {a} to {b}.",
        "Add the {a} {n} to the {b} {n}.",
        "Please add the {a} and the {b} {n}.",
        "Add up the {m} {at} and {too}.",
        "What do {a} and {b} add up to?",
        "What do the {a} and the {b} {n} make?",
        "What do you get when you add {a} to {b}?",
        "If you add {a} and {b}, what do you get?",
        "If I add {a} and {b}, how much is it?",
        "What comes out if the {a} and the {b} {n} are added?",
        "Calculate {a} plus {b}.",
        "Work out the sum of {a} and {b}.",
        "Give me the sum of {a} and {b}.",
        "Tell me what {a} plus {b} is.",
        "{a} and {b} together make",
        "Put {a} and {b} together.",
        "Which {n} is {a} plus {b}?",
        "What {n} do {a} and {b} make when added together?",
        "What does {a} plus {b} equal?",
        "{a} plus {b} equals",
        "When {a} and {b} are added, what does it come to?",
        "What is the result of adding {a} and {b}?",
        "Take {a} and {b}: what is the total?",
        "The {a} {n} and the {b} {n}, added up, come to",
    ),
    "lookup": (
        "Which code has the {a} {n}?",
        "What code has the {a} {n}?",
        "What is the code of the {n} {at}?",
        "What's the code of the {a} {n}?",
        "Which code goes with the {a} {n}?",
        "Which code belongs to the {n} {at}?",
        "Which letter belongs with the {a} {n}?",
        "What letter stands for the {a} {n}?",
        "What does the {a} {n} stand for in the table?",
        "What is the code for the {n} {at}?",
        "Which letter is the code for the {a} {n}?",
        "Code for the {a} {n}?",
        "{a} {n}: what code?",
        "{a} {n}, which code is it?",
        "Look up the {a} {n}.",
        "Look up the code of the {a} {n}.",
        "Look the {n} {at} up in the code table.",
        "Find the {a} {n} in the table: which code is it?",
        "Find the code of the {a} {n}.",
        "Give me the code for the {a} {n}.",
        "Tell me the code of the {n} {at}.",
        "Tell me which code the {a} {n} has.",
        "Read the {n} {at} and give its code.",
        "In the table, which code matches the {a} {n}?",
        "According to the code table, what is the {a} {n}?",
        "Use the table: what is the code for the {a} {n}?",
        "Which code does the table give for the {a} {n}?",
        "What code does the {n} {at} have?",
        "The row of the {a} {n} has which code?",
        "What is in the row of the {a} {n}?",
        "The {n} {at} has which letter?",
        "Please find the letter for the {a} {n} in the table.",
        "To which code does the {a} {n} belong?",
    ),
    "even": (
        "How many {m} are even?",
        "How many even {m} do you see?",
        "How many even {m} are in the picture?",
        "How many of these {m} are even?",
        "How many {m} in the strip are even?",
        "How many even {m} does the picture show?",
        "How many even {m} can you see?",
        "How many {m} here are even?",
        "How many of them are even {m}?",
        "How many are even {m}?",
        "How many even ones?",
        "Count the {m} that are even.",
        "Count how many {m} are even.",
        "What is the count of {m} that are even?",
        "What's the number of even {m}?",
        "The number of even {m}?",
        "Number of even {m} in the picture",
        "Give me the number of even {m}.",
        "Tell me how many even {m} there are.",
        "Can you count the even {m}?",
        "Please count even {m}.",
        "Of these {m}, how many are even?",
        "Of all the {m}, how many of them are even?",
        "Even {m} in the strip?",
        "Among the {m}, how many are even?",
        "How many even {m} do you find?",
        "Say how many of the {m} are even.",
        "What is the total number of even {m}?",
    ),
}  # fmt: skip
"""Family → its templates; `single` is a strip of one digit, read."""

NOUNS = (("digit", "digits"), ("number", "numbers"), ("numeral", "numerals"), ("figure", "figures"))
LARGER = ("larger", "bigger", "greater", "higher", "largest", "biggest", "greatest", "highest")
SMALLER = ("smaller", "lower", "less", "smallest", "lowest")

PLACES: dict[int, tuple[str, ...]] = {
    1: ("middle",),
    2: ("left", "right"),
    3: ("left", "middle", "right"),
    4: ("left", "second", "third", "right"),
}
"""Count of digits → their places, as rationales name them."""

_LEFT = (
    ("left", "leftmost", "first", "left-hand"),
    ("on the left", "at the left", "to the left", "on the far left", "at the left end",
     "at the start", "in the first place"),
    ("first",),
)  # fmt: skip
_RIGHT = (
    ("right", "rightmost", "last", "right-hand"),
    ("on the right", "at the right", "to the right", "on the far right", "at the right end",
     "at the end", "in the last place"),
    ("last",),
)  # fmt: skip
_SECOND = (("second",), ("in the second place", "in second place"), ("second",))
_THIRD = (("third",), ("in the third place", "in third place"), ("third",))
_MIDDLE = (
    ("middle", "central", "center", "centre", "second"),
    ("in the middle", "in the center", "in the centre", "in the second place"),
    ("second",),
)

CALLED: dict[int, tuple[tuple[tuple[str, ...], ...], ...]] = {
    1: (_MIDDLE,),
    2: (_LEFT, _RIGHT),
    3: (_LEFT, _MIDDLE, _RIGHT),
    4: (_LEFT, _SECOND, _THIRD, _RIGHT),
}
"""Count of digits → for each place, the words for `{a}`, for `{at}` and for `{order}`."""

_ORDINALS = {2: "second", 3: "third", 4: "fourth"}

_COUNTED = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty"""
NUMBERS = tuple(_COUNTED.split())
"""The words of the numbers 0 to 20."""


def read_number(word: str) -> str:
    """Return a number's word, in any case, in digits, and any other word as it is."""
    plain = word.lower()
    return str(NUMBERS.index(plain)) if plain in NUMBERS else word


def own_words(family: str, places: Sequence[str], compared: str = "larger") -> str:
    """Word a question as DigitsQA does; `places` are one or two places, or numbers."""
    return _fill(TEMPLATES[family][0], [(place, place, place) for place in places],
                 *NOUNS[0], compared)  # fmt: skip


def free_words(
    rng: np.random.Generator, family: str, places: Sequence[int | str], count: int,
    compared: str = "larger",
) -> str:  # fmt: skip
    """Word a question as a person might: another template, other words, with or without capitals.

    Args:
        rng: What the choices are drawn from.
        family: A key of `TEMPLATES`.
        places: The one or two places asked for, by their number from the left, or numbers as text.
        count: The number of digits in the strip.
        compared: "larger" or "smaller".
    """
    names = [_called(rng, place, count) for place in places]
    template = _one(rng, TEMPLATES[family])
    noun, nouns = NOUNS[0] if rng.random() < 0.6 else NOUNS[int(rng.integers(len(NOUNS)))]
    word = _one(rng, LARGER if compared == "larger" else SMALLER)
    text = _fill(template, names, noun, nouns, word)
    if rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    return text if rng.random() < 0.7 else text.rstrip("?.")


def _called(rng: np.random.Generator, place: int | str, count: int) -> tuple[str, str, str]:
    if isinstance(place, str):
        return place, place, place
    adjectives, phrases, adverbs = CALLED[count][place]
    if place == count - 1 and count in _ORDINALS:  # the last is the third, of three
        adjectives, adverbs = (*adjectives, _ORDINALS[count]), (*adverbs, _ORDINALS[count])
    # most people say left and right
    adjective = adjectives[0] if rng.random() < 0.4 else _one(rng, adjectives)
    return adjective, _one(rng, phrases), _one(rng, adverbs)


def _fill(
    template: str, names: Sequence[tuple[str, str, str]], noun: str, nouns: str, compared: str
) -> str:
    if names and names[0][0].isdecimal():  # "the digit 3", and not "the 3 digit"
        template = template.replace("{at}", "{a}").replace("{too}", "{b}")
        template = template.replace("{a} {n}", "{n} {a}").replace("{b} {n}", "{n} {b}")
    first, second = (*names, *names)[:2] if names else (("", "", ""),) * 2
    text = template.format(
        a=first[0], at=first[1], order=first[2], b=second[0], too=second[1],
        n=noun, m=nouns, c=compared,
    )  # fmt: skip
    return text[0].upper() + text[1:]


def _one(rng: np.random.Generator, of: Sequence[str]) -> str:
    return of[int(rng.integers(len(of)))]
