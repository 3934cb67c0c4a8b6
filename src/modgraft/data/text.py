"""Text forms: how a record becomes an input and a target string, and how an answer is read back.

A form is named as in Lu et al. 2022 and Zhang et al. 2023: what goes in, a dash, what comes out.
Q question, C context, M options ("multiple choice"), G generated rationale, A answer, L lecture, E
solution ("explanation"), V the answer's value. Runs of white space become one blank, after the
fields are filled in.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data.records import LETTERS, Record

_HEAD = "Question: {question}\nContext: {context}\nOptions: {options}\n"
SOLUTION = "Solution:"


@dataclass(frozen=True, slots=True)
class Form:
    """One pair of templates: a row of `FORMS`.

    Fields of a template: question, context (hint and caption, or N/A), options ("(A) x (B) y"),
    rationale, lecture, solution, letter and choice (the right answer's).
    """

    name: str
    input_template: str
    target_template: str

    @property
    def reads_rationale(self) -> bool:
        """Whether the input holds a rationale, that is, whether this is a second stage."""
        return "{rationale}" in self.input_template

    @property
    def writes_answer(self) -> bool:
        """Whether the target holds the answer, so that one can be read from what a model writes."""
        return "{letter}" in self.target_template

    def input(self, record: Record, rationale: str | None = None) -> str:
        """The model's input for `record`, and for a rationale where the form reads one.

        Raises:
            DataError: a form that reads a rationale got none, or one that reads none got one.
        """
        return self.render_input(self.input_fields(record, rationale))

    def target(self, record: Record) -> str:
        """What the model should write for `record`."""
        return squeeze(self.target_template.format_map(_fields(record)))

    def input_fields(self, record: Record, rationale: str | None = None) -> dict[str, str]:
        """The input template's fields; `render_input` fills them in. Raises as `input` does."""
        if self.reads_rationale and rationale is None:
            remedy = "Hand one over, by id: QADataset(questions, rationales={id: text})"
            raise DataError(
                f"form {self.name} reads a rationale and got none", id=record.id, remedy=remedy
            )
        if not self.reads_rationale and rationale is not None:
            remedy = "Use a form that reads one, such as QCMG-A"
            raise DataError(
                f"form {self.name} has no place for a rationale", id=record.id, remedy=remedy
            )
        fields = _fields(record) | {"rationale": rationale_text(rationale or "")}
        return {name: fields[name] for name in _names(self.input_template)}

    def render_input(self, fields: dict[str, str]) -> str:
        """The input from its fields, white space squeezed."""
        return squeeze(self.input_template.format_map(fields))


def _rows(*rows: tuple[str, str, str]) -> dict[str, Form]:
    return {name: Form(name, text, target) for name, text, target in rows}


FORMS: dict[str, Form] = _rows(
    # name, input, target: the published forms
    ("QCM-A", _HEAD + "Answer:", "The answer is ({letter})."),
    ("QCM-LE", _HEAD + "Solution:", "Solution: {lecture} {solution}."),
    ("QCM-E", _HEAD + "Solution:", "Solution: {solution}"),
    ("QCMG-A", _HEAD + "Solution: {rationale}\nAnswer:", "The answer is ({letter})."),
    ("QCM-LEA", _HEAD + "Solution:", "{lecture} {solution} The answer is ({letter})."),
    ("QCM-EA", _HEAD + "Solution:", "{solution} The answer is ({letter})."),
    ("QCM-ALE", _HEAD + "Solution:", "The answer is ({letter}). BECAUSE: {lecture} {solution}"),
    # the recipe's own, for small models: the value before its letter, so that finding what the
    # answer is and finding where it stands among the options are two steps
    ("QCM-VA", _HEAD + "Answer:", "{choice} . The answer is ({letter}) ."),
    ("QCMG-VA", _HEAD + "Solution: {rationale}\nAnswer:", "{choice} . The answer is ({letter}) ."),
    ("QCM-EVA", _HEAD + "Solution:", "{solution} {choice} . The answer is ({letter}) ."),
)


def find_form(name: str | Form) -> Form:
    """The form of this name; a `Form` is itself.

    Raises:
        UnknownNameError: there is none; the message lists those there are.
    """
    if isinstance(name, Form):
        return name
    if name not in FORMS:
        raise UnknownNameError.among("text form", name, FORMS)
    return FORMS[name]


def squeeze(text: str) -> str:
    """`text` with every run of white space, line ends included, made one blank, and none at the
    ends.
    """
    return " ".join(text.split())


def context_text(record: Record) -> str:
    """Hint and caption, or "N/A" where there is neither."""
    return squeeze(f"{record.hint} {record.caption}") or "N/A"


def options_text(choices: tuple[str, ...]) -> str:
    """The options as a form shows them: "(A) x (B) y"."""
    return " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def rationale_text(text: str) -> str:
    """A rationale without its leading cue "Solution:", which a second stage adds itself."""
    text = squeeze(text)
    return text.removeprefix(SOLUTION).removeprefix("Solution :").strip()


def rationale_of(text: str, form: Form) -> str:
    """The rationale in a text of this form, gold or written by a model, as a second stage reads it.

    Of a one-stage form it is what stands beside the stated answer.
    """
    if form.writes_answer:
        _, because, after = text.partition(_BECAUSE)
        # in QCM-ALE the answer comes first, in all others last
        text = after if because else text[: answer.start()] if (answer := _last(text)) else text
    return rationale_text(text)


def gold_rationale(record: Record, form: Form) -> str:
    """The rationale that a model of this form learns to write, as a second stage reads it."""
    return rationale_of(form.target(record), form)


def extract_answer(text: str, choices: tuple[str, ...] | list[str]) -> int | None:
    """The choice that `text` states ("The answer is (B)"), or None where it states none.

    None is an answer in the wrong format, and so a wrong answer: it never becomes a guess. Blanks
    around the letter are let through, as tokenizers of whole words put them. A text that states
    several answers states one only if they agree.
    """
    letters = set(_ANSWER.findall(text))
    if len(letters) != 1:
        return None
    index = LETTERS.index(letters.pop())
    return index if index < len(choices) else None


_ANSWER = re.compile(r"The answer is\s*\(\s*([A-Z])\s*\)")
_BECAUSE = "BECAUSE:"


def _last(text: str) -> re.Match[str] | None:
    return max(_ANSWER.finditer(text), key=re.Match.start, default=None)


def _fields(record: Record) -> dict[str, str]:
    return {
        "question": record.question,
        "context": context_text(record),
        "options": options_text(record.choices),
        "lecture": record.lecture,
        "solution": record.solution,
        "letter": record.letter,
        "choice": record.choices[record.answer],
    }


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
