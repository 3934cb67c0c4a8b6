"""Reads a freely worded question about digits, and words it as DigitsQA does.

A run has learned from DigitsQA's own words, and people have others. The words of a question that
matter are the places or numbers that it names, and those that say what is to be done with them:

    Could you add the first numeral and the last one?   →   What is left plus right?

Each of its words is one of these, or changes nothing by a list, or there is no such question in
DigitsQA; and the parts have to fit: two operands for a sum, one for a code. A question of which
only a part is understood is not read at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from modgraft.data.digit_wordings import (
    LARGER,
    NOUNS,
    NUMBERS,
    PLACES,
    SMALLER,
    own_words,
    read_number,
)

_TASKS = {
    "add": """plus + add adds added adding addition sum sums summed summing total totals together
        altogether combine combined combining""",
    "larger": " ".join(LARGER) + " max maximum more",
    "smaller": " ".join(SMALLER) + " min minimum least fewer lesser tinier tiniest",
    "lookup": "code codes coded decode encoded letter symbol table row lookup key",
    "even": "even evens",
}
_CUES = {word: task for task, words in _TASKS.items() for word in words.split()}
"""A word that says what is to be done → what that is."""

_SIDES = {
    "left": "left leftmost lefthand leftside start starts beginning",
    "right": "right rightmost righthand rightside last final end ends",
    "middle": "middle middlemost central center centre mid",
}
_SIDE = {word: side for side, words in _SIDES.items() for word in words.split()}
_ORDINALS = ("first", "second", "third", "fourth", "1st", "2nd", "3rd", "4th")

_PLAIN = """\
a about according all am among an and any appear appears are as at be been being between big box
both by calculate can check choose come comes compare compared comparing compute consider contain
contains could count counted counting decide depicted determine did display displayed do does
drawn each equal equals find for found from get gets give given gives go
goes going got had hand handwritten has have having hello here hey hi how i identify if image in
inside into is it its it's i'd i'm kindly know let lets let's like listed locate located look
looking make makes making many mark may me might much my name named need now of ok on one ones
only or our paired paper photo pick picture piece place placed please point position positioned
print printed put quick quickly read reading reads result say saying says scan see seen select
shall should show showing shown shows side sit sits sitting so spot stand standing stands state
strip take taken taking tell thank thanks that that's the their them then there there's these they
this those to up us use using value values very want was we well were what what's whats when where
which while who who's will with within work would write written yo you your"""
_SILENT = {*_PLAIN.split(), *(noun for pair in NOUNS for noun in pair), *"?!.,;:\"'()=-–—“”"}
"""Words and signs that change nothing of what is asked."""

_OF_LOOKUP = """assigned assign belong belonging belongs correspond corresponding corresponds entry
match matches matching mean means meaning translate translates"""
_SILENT_OF = {"lookup": frozenset(_OF_LOOKUP.split())}
"""What is to be done → more such words beside it."""

_NOUNS_OF_ONE = "|".join(noun for noun, _ in NOUNS)
_PLURALS = f"(?:{'|'.join(plural for _, plural in NOUNS)})"
_TWO = re.compile(
    r"\b(?:(first|last|leftmost|rightmost|middle|central|inner) (?:two|2)|(outer)(?: (?:two|2))?"
    r"|(?:two|2) (middle|inner|central))\b"
)
_NUMBERED = re.compile(
    r"\b(?:(?:digit|numeral|figure) (?:number|no\.?|nr\.?|#)|(?:place|position)(?: number| no\.?)?)"
    r" ?(one|two|three|four|[1-4])\b"
)
_FROM = re.compile(
    rf"\b({'|'.join(_ORDINALS)})(?: (?:{'|'.join(n for p in NOUNS for n in p)}|one))?"
    r",?(?: count(?:ing|ed))? from (?:the )?(left|right)\b"
)
_TOKEN = re.compile(r"@\d|\d+(?:st|nd|rd|th)\b|\d+|[^\W\d_]+(?:['-][^\W\d_]+)*|[^\w\s]")
_OPENING = "is are plus + add and or of to between compare has have for row digit number"
_BEFORE_A_NUMBER = frozenset(_OPENING.split())
_HOW_MANY = re.compile(r"\bhow many\b|\bquantity of\b|\bnumber of\b|\bcount\w*\b|^\W*evens?\b")
_ALL_OR_HOW_MANY = re.compile(rf"\ball\b|\bhow many\b|\bcounts?\b|\bnumber of (?:the )?{_PLURALS}")
_OF_AN_EVEN = re.compile(r"\ban? even\b|^\W*(?:is|are|do|does|has|have|was|were)\b")
_DIFFERENCE = re.compile(
    r"\b(?:get|gets|give|gives|make|makes) (?:the |a )?[@\d]"
    r"|\d(?: (?:digit|number|one))? (?:less|fewer)\b(?!\W*$)"
)
_SUM = re.compile(
    r"\bhow much (?:is|are)\b(?=.*\b(?:and|with)\b)"
    r"(?!.*\b(?:take[ns]?|taking|from|by|between|to)\b)|\bmakes?\W*$"
)
_NOT_WHAT_IS_THERE = re.compile(
    r"\b(?:which|what)(?: is| are|'s)?(?: the)? (?:position|place|spot)\b|\bhands?\b"
)
"""Where a digit is, or what wrote it."""
_NOT_A_DIGIT = re.compile(
    r"(?:^|[^\w@])[-−]\d|\d*[.,]\d|\d!(?! *$)|\d-\d|@\d (?:code|letter|row|symbol)\b"
)
"""Negative numbers, fractions, factorials; and a place in the table, not in the picture."""
_PAIR = re.compile(
    rf"\b(?:both|(?:the|these|those) (?:two|2)(?! and| or| plus)|(?:two|2)(?= {_PLURALS}))"
    rf"(?: of (?:the|them|these))?(?: {_PLURALS})?\b"
)
_ALIKE = (
    (re.compile(r"\blook(?:ing)? up\b|\bstands? for\b"), "lookup"),
    (re.compile(r"\b(?:far|farthest|furthest)(?: (?:to|on|at) the)? (left|right)\b"), r"\1"),
    (re.compile(rf"\b(left|right)[ -]hand (?=side|end|one|{_NOUNS_OF_ONE})"), r"\1 "),
    (re.compile(r"\b(left|right)[ -](?:end|side|most)\b"), r"\1"),
    (re.compile(r"\b(read|work|find|point|pick|figure|comes?|make) (?:out|off)\b"), r"\1"),
    (re.compile(r"\bout of\b"), "of"),
    (re.compile(r"\b(?:of|is|are) the (?:two|2)\b(?! and| or| plus| middle| inner| central)"), ""),
)
_TABLE_ROW = re.compile(r"\b\d [A-Z]\b")


@dataclass
class _Parts:
    """What a question is made of."""

    tasks: set[str] = field(default_factory=set)
    places: list[int] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    said: int = 0  # how often it names a place


def restated(question: str, hint: str = "", count: int = 3) -> str | None:
    """Return a question in DigitsQA's own words, None where it is none of DigitsQA's.

    Args:
        question: The question, in any words.
        hint: Its context, in which a code table may stand.
        count: The number of digits in the picture.
    """
    text = _marked(question, count)
    parts = _parts_of(_PAIR.sub("", text) if count == 2 else text)
    names = [PLACES[count][place] for place in sorted(_places(parts, count))] or parts.numbers
    if _is_another(text, parts, len(names)):
        return None
    if "even" in parts.tasks and parts.tasks <= {"even", "add"}:  # "the total number of even ones"
        asked = _HOW_MANY.search(text) and not names and not _OF_AN_EVEN.search(text)
        return own_words("even", ()) if asked else None
    if len(parts.tasks) > 1 or _ALL_OR_HOW_MANY.search(text):
        return None
    task = next(iter(parts.tasks), "add" if len(names) == 2 and _SUM.search(text) else "read")
    if task == "read":
        if parts.numbers or len(names) > 1 or (not names and count > 1):
            return None
        return own_words("read" if count > 1 else "single", names)
    if task == "lookup":
        return own_words(task, names) if len(names) == 1 and _TABLE_ROW.search(hint) else None
    if len(names) != 2 or _is_difference(text, task):
        return None
    return own_words(task if task == "add" else "compare", names, task)


def _is_another(text: str, parts: _Parts, operands: int) -> bool:
    """Return whether a question asks for what none of DigitsQA's does, whatever its task."""
    if _NOT_A_DIGIT.search(text) or _NOT_WHAT_IS_THERE.search(text) or parts.unknown:
        return True
    if (parts.places and parts.numbers) or parts.said > max(2, len(parts.places)):
        return True
    return operands != 2 and bool(re.search(r"\bmakes?\b", text))  # what several make together


def _places(parts: _Parts, count: int) -> list[int]:
    """Return the places that a question is of; where it names nothing, those that it must mean."""
    if not parts.places and not parts.numbers:
        if count == 2 and parts.tasks in ({"add"}, {"larger"}, {"smaller"}):
            return [0, 1]
        if count == 1 and parts.tasks == {"lookup"}:
            return [0]
    return parts.places


def _is_difference(text: str, task: str) -> bool:
    """Return whether a question is "how much larger", "left less right", or "what is added to left
    to get right"."""
    return bool(_DIFFERENCE.search(text)) or (task != "add" and "how" in text.split())


def unread(question: str, count: int = 3) -> list[str]:
    """Return the words of a question that stand in none of DigitsQA's."""
    return _parts_of(_marked(question, count)).unknown


def _marked(question: str, count: int) -> str:
    """Return a question in lower case, with "@0" for the first place, "@1" for the next, …"""

    def from_a_side(found: re.Match[str]) -> str:
        index = _ORDINALS.index(found[1]) % 4
        return f"@{index if found[2] == 'left' else max(0, count - 1 - index)}"

    def two(found: re.Match[str]) -> str:
        if found[2]:
            return f"@0 @{count - 1}"
        if found[3] or found[1] in ("middle", "central", "inner"):
            return "@1 @2" if count == 4 else found[0]
        return "@0 @1" if found[1] in ("first", "leftmost") else f"@{count - 2} @{count - 1}"

    def numbered(found: re.Match[str]) -> str:
        index = int(read_number(found[1])) - 1
        return f"@{index}" if index < count else found[0]

    text = question.lower().replace("’", "'")
    for pattern, plain in _ALIKE:
        text = pattern.sub(plain, text)
    text = _NUMBERED.sub(numbered, text)
    text = _FROM.sub(from_a_side, text)
    text = _TWO.sub(two, text) if count > 2 else text

    def place(found: re.Match[str]) -> str:
        index = _place(found[0].replace("-", ""), count)
        return found[0] if index is None else f"@{index}"

    return re.sub(r"(?<!@)\b[\w'-]+", place, text)


def _place(word: str, count: int) -> int | None:
    """Return the place that a word names, counted from the left."""
    if word in _ORDINALS:
        index = _ORDINALS.index(word) % 4
        return index if index < count else None
    side = _SIDE.get(word)
    if side == "middle":
        return count // 2 if count % 2 else None
    return {"left": 0, "right": count - 1}.get(side or "")


def _parts_of(text: str) -> _Parts:
    """Take a marked question apart."""
    parts, before = _Parts(), "is"
    for token in _TOKEN.findall(text):
        word = token.replace("-", "") if len(token) > 1 else token
        if word[0] == "@":
            parts.said += 1
            if int(word[1:]) not in parts.places:
                parts.places.append(int(word[1:]))
        elif word in _CUES:
            parts.tasks.add(_CUES[word])
        elif word.isdecimal() or (
            word in NUMBERS and (word != "one" or before in _BEFORE_A_NUMBER)
        ):
            parts.numbers.append(read_number(word))
        elif word not in _SILENT:
            parts.unknown.append(token)
        before = word
    silent = frozenset().union(*(_SILENT_OF.get(task, ()) for task in parts.tasks))
    parts.unknown = [word for word in parts.unknown if word not in silent]
    return parts
