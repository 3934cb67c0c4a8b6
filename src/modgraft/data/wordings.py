"""The instructions of the families' tasks, with ``{x}`` for an item's input.

FLAN has ten templates for each task; here there are eight, and training lacks the last two.
"""

from __future__ import annotations

KEPT = 2
"""The number of wordings of each task that training lacks."""

WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "dates": {
        "long": (
            "write the date {x} with the name of its month :",
            "{x} as a long date :",
            "which day is {x} ?",
            "give the day , {x} , in full .",
            "spell out the month in {x} .",
            "in a letter , how would {x} look ?",
            "put {x} into plain english :",
            "{x} , as people say it :",
        ),
        "iso": (
            "write the date {x} in digits :",
            "{x} as an iso date :",
            "year , month and day of {x} :",
            "give {x} as a computer stores it .",
            "turn {x} into numbers .",
            "how is {x} written in a log file ?",
            "put {x} into the form with dashes :",
            "{x} , for sorting :",
        ),
    },
    "words": {
        "reverse": (
            "write these words backwards : {x}",
            "{x} , from the last to the first :",
            "reverse the order : {x}",
            "give the words {x} in the opposite order .",
            "turn the line around : {x} .",
            "what is {x} , read from its end ?",
            "put the last one first and so on : {x}",
            "{x} , from right to left :",
        ),
        "last": (
            "write the last of these words : {x}",
            "{x} , the last word :",
            "what comes last : {x} ?",
            "give the final word of {x} .",
            "take the words {x} and keep the last .",
            "which word ends {x} ?",
            "put down only the end of {x} :",
            "{x} , nothing but the final one :",
        ),
    },
    "names": {
        "kind": (
            "write the class of the character {x} :",
            "{x} is a",
            "what kind of character is {x} ?",
            "give the category of {x} .",
            "sort {x} among the signs .",
            "how does unicode class {x} ?",
            "put {x} into its group :",
            "{x} , what sort of sign :",
        ),
        "capital": (
            "write the capital of {x} :",
            "{x} in upper case :",
            "what is {x} at the start of a sentence ?",
            "give the upper case of {x} .",
            "turn {x} into a capital .",
            "how is the large form of {x} called ?",
            "put {x} into capitals :",
            "{x} , with the shift key :",
        ),
    },
    "signatures": {
        "second": (
            "write the second parameter of {x} :",
            "{x} : what is its second argument ?",
            "def {x} takes second :",
            "give parameter number two of {x} .",
            "name the second thing that {x} takes .",
            "what comes second in {x} ?",
            "put down the second parameter of {x} :",
            "{x} , second place :",
        ),
        "optional": (
            "write the parameters of {x} that have a default :",
            "{x} : what may be left out ?",
            "def {x} has defaults for :",
            "give the optional parameters of {x} .",
            "name what {x} does not need .",
            "which arguments of {x} can be omitted ?",
            "put down what has a default in {x} :",
            "{x} , what is optional :",
        ),
    },
    "identifiers": {
        "plain": (
            "write the identifier {x} as plain words :",
            "{x} without underscores :",
            "what does the name {x} say ?",
            "give the words in {x} .",
            "turn {x} into a phrase .",
            "how is {x} read aloud ?",
            "put {x} apart :",
            "{x} , with blanks :",
        ),
        "snake": (
            "write an identifier of {x} :",
            "{x} with underscores :",
            "what would a variable for {x} be called ?",
            "give {x} as one name .",
            "turn {x} into a python name .",
            "how is {x} joined ?",
            "put {x} together :",
            "{x} , as a function :",
        ),
    },
}
