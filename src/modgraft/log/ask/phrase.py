"""Phrase an answer with a language model, which may say what was verified and nothing else.

An OpenAI-compatible server gets the question and the verified lines, and is asked for sentences
that each end with the number of the line they rest on. They are shown only if every one passes:

- it ends with numbers of lines that were sent;
- each of its content words is in those lines or in the question, compared by stem;
- each number and each name in it is in those lines, as it is, a number with its sign;
- it denies something exactly where those lines do.

Otherwise the lines are shown as they are, and a remark says why. This holds a model to the words of
its evidence; it cannot see whether words that are all there were put together into something else,
so the lines are shown beside the sentences, always.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from modgraft.core.errors import ModgraftError
from modgraft.log.ask.answer import Answer, Evidence
from modgraft.log.ask.lexicon import STOP_WORDS, stem

KEY = "MODGRAFT_LOG_KEY"
"""The environment variable with the API key, for servers that ask for one."""
WAIT = 30.0
"""Seconds to wait for the server."""
LARGEST = 1_000_000
"""The most bytes that are read of the server's answer."""
INSTRUCTION = (
    "Answer the question from the numbered lines alone, in at most three short sentences. Use the "
    "words of the lines. End each sentence with the number of its line, as [1]. Add nothing."
)
_SENTENCE = re.compile(r"(.+?)((?:\s*\[\d+\])+)[.!?]?(?:\s+|$)", re.DOTALL)
# with the signs that make it another number: a minus, a percent sign
_WORD = re.compile(r"(?:(?<![^\W_])-(?=\d))?[^\W_]+(?:['’.,-][^\W_]+)*(?:(?<=\d)%)?")
_DENIES = re.compile(
    r"\b(?:not|no|never|neither|nor|without|cannot|hardly)\b|n['’]t\b", re.IGNORECASE
)
_GLUE = STOP_WORDS | frozenset(
    ["according", "line", "lines", "question", "answer", "states", "stated"]
)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirections: verified lines go to the configured server and to no other."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """Return None, which turns the redirection into an error with its code."""


def phrase(answer: Answer, endpoint: str, model: str | None) -> Answer:
    """Put the answer into a model's words if these pass; else keep it and remark why."""
    try:
        text = _complete(endpoint, model, answer)
    except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        return _remark(answer, f"{endpoint} did not phrase it ({why}); the lines are as they are")
    reason = objection(text, answer.evidence, answer.question)
    if reason is not None:
        return _remark(answer, f"a phrasing by {endpoint} was rejected: {reason}")
    return replace(answer, text=text.strip(), remarks=(*answer.remarks, f"phrased by {endpoint}"))


def objection(text: str, evidence: Sequence[Evidence], question: str) -> str | None:
    """Return why a phrasing says more than its lines, or None if it does not."""
    sentences, end = [], 0
    for match in _SENTENCE.finditer(text):
        if match.start() != end:
            break
        sentences.append(match)
        end = match.end()
    if not sentences or text[end:].strip():
        return f"{(text[end:].strip() or text)[:80]!r} does not end with the number of a line"
    for match in sentences:
        numbers = [int(n) for n in re.findall(r"\[(\d+)\]", match[2])]
        wrong = [n for n in numbers if not 1 <= n <= len(evidence)]
        if wrong:
            return f"there is no line [{wrong[0]}]"
        lines = " ".join(evidence[n - 1].quote for n in numbers)
        reason = _unsupported(match[1], lines, question)
        if reason is not None:
            return reason
    return None


def _unsupported(sentence: str, lines: str, question: str) -> str | None:
    """Return the reason why a sentence is not supported by its lines; None if it is."""
    there = {w.lower() for w in _words(lines)}
    stems = {stem(w) for w in there} | {stem(w.lower()) for w in _words(question)}
    for position, word in enumerate(_words(sentence)):
        low = word.lower()
        exact = any(c.isdigit() for c in word) or any(
            c.isupper() for c in word[1 if position else 2 :]
        )
        if exact and low not in there:
            return f"{word!r} is not in its line"
        if low not in _GLUE and stem(low) not in stems:
            return f"{word!r} is not in its line"
    if bool(_DENIES.search(sentence)) != bool(_DENIES.search(lines)):
        return "it denies what its line does not, or leaves a denial out"
    return None


def _words(text: str) -> list[str]:
    return [part for word in _WORD.findall(text.replace("−", "-")) for part in _parts(word)]


def _parts(word: str) -> list[str]:
    """Split a compound into its parts (co-occurrence); a number stays whole (84.91)."""
    if any(c.isdigit() for c in word):
        return [word]
    return [p for p in re.split(r"[-.,]", word) if p]


def _complete(endpoint: str, model: str | None, answer: Answer) -> str:
    if urlsplit(endpoint).scheme not in ("http", "https"):
        raise ModgraftError("an endpoint starts with http:// or https://")
    lines = "\n".join(f"[{i}] {e.quote.strip()}" for i, e in enumerate(answer.evidence, 1))
    body = {
        "model": model or "default",
        "temperature": 0,
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"Question: {answer.question}\n\nLines:\n{lines}"},
        ],
    }
    request = urllib.request.Request(  # noqa: S310  (the scheme was looked at)
        endpoint.rstrip("/") + "/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if key := os.environ.get(KEY):  # it is read from the environment, never from a file
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(request, timeout=WAIT) as response:
        said = json.loads(response.read(LARGEST))
    text = said["choices"][0]["message"]["content"]
    if not isinstance(text, str) or not text.strip():
        raise ModgraftError("it sent no text")
    return text


def _remark(answer: Answer, remark: str) -> Answer:
    return replace(answer, remarks=(*answer.remarks, remark))
