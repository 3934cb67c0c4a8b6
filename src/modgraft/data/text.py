"""Text forms: turn a record into an input and a target text, and read an answer back.

Names of forms are as in Lu et al. 2022 and Zhang et al. 2023: input, dash, output. Q is the
question, C the context, M the options ("multiple choice"), G a generated rationale, A the answer, L
the lecture, E the solution ("explanation"), V the answer's value. After the fields are filled in,
white space becomes single blanks.
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
    """A template of the input and one of the target: a row of `FORMS`.

    The fields of a template are question, context (hint and caption, or N/A), options
    ("(A) x (B) y"), rationale, lecture, solution, and letter and choice of the right answer.
    """

    name: str
    input_template: str
    target_template: str

    @property
    def reads_rationale(self) -> bool:
        """Whether the input contains a rationale, as in a second stage."""
        return "{rationale}" in self.input_template

    @property
    def writes_answer(self) -> bool:
        """Whether the target contains the answer."""
        return "{letter}" in self.target_template

    def input(self, record: Record, rationale: str | None = None) -> str:
        """Return the model's input for `record` and, if the form reads one, a rationale.

        Raises:
            DataError: The rationale is missing, or the form does not read one.
        """
        return self.render_input(self.input_fields(record, rationale))

    def target(self, record: Record) -> str:
        """Return what the model should write for `record`."""
        return squeeze(self.target_template.format_map(_fields(record)))

    def input_fields(self, record: Record, rationale: str | None = None) -> dict[str, str]:
        """Return the fields for `render_input`. Raises the errors of `input`."""
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
        """Fill fields into the input template, and squeeze white space."""
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
    # for small models, of this library: the value comes before its letter, so that finding the
    # answer and finding its place among the options are two steps
    ("QCM-VA", _HEAD + "Answer:", "{choice} . The answer is ({letter}) ."),
    ("QCMG-VA", _HEAD + "Solution: {rationale}\nAnswer:", "{choice} . The answer is ({letter}) ."),
    ("QCM-EVA", _HEAD + "Solution:", "{solution} {choice} . The answer is ({letter}) ."),
)


def find_form(name: str | Form) -> Form:
    """Return the form of this name; a `Form` is returned as it is.

    Raises:
        UnknownNameError: There is none; the message lists all forms.
    """
    if isinstance(name, Form):
        return name
    if name not in FORMS:
        raise UnknownNameError.among("text form", name, FORMS)
    return FORMS[name]


def squeeze(text: str) -> str:
    """Make every run of white space, line ends included, one blank, and strip both ends."""
    return " ".join(text.split())


def context_text(record: Record) -> str:
    """Join hint and caption, or return "N/A" if there is neither."""
    return squeeze(f"{record.hint} {record.caption}") or "N/A"


def options_text(choices: tuple[str, ...]) -> str:
    """Join the options as "(A) x (B) y"."""
    return " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def rationale_text(text: str) -> str:
    """Remove the leading cue "Solution:", which the template of a second stage adds."""
    text = squeeze(text)
    return text.removeprefix(SOLUTION).removeprefix("Solution :").strip()


def rationale_of(text: str, form: Form) -> str:
    """Return the rationale in a text of this form, gold or generated, as a second stage reads it.

    In a one-stage form, that is the text without the stated answer.
    """
    if form.writes_answer:
        _, because, after = text.partition(_BECAUSE)
        # in QCM-ALE the answer comes first, in all others last
        text = after if because else text[: answer.start()] if (answer := _last(text)) else text
    return rationale_text(text)


def gold_rationale(record: Record, form: Form) -> str:
    """Return the rationale that a model learns to write, as a second stage reads it."""
    return rationale_of(form.target(record), form)


def extract_answer(text: str, choices: tuple[str, ...] | list[str]) -> int | None:
    """Return the choice that `text` states ("The answer is (B)"), or None if it states none.

    None counts as a wrong answer, and never becomes a guess. Blanks around the letter are allowed,
    because tokenizers of whole words write them. Several stated answers must agree.
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
