"""The cleaning, deduplication and splitting behind the bundled checkpoint's training text."""

import ast
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_text.py"
spec = importlib.util.spec_from_file_location("demo_text", SCRIPT)
demo_text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo_text)


def test_markup_is_removed():
    text = "Call :func:`~os.path.join` with ``None`` or `name'; see `PEP 8`_ for “style”::"
    assert demo_text.strip_markup(text) == 'Call os.path.join with None or name; see PEP 8 for "style":'
    assert demo_text.strip_markup(":param timeout: The seconds to wait.") == "The seconds to wait."


def test_hard_line_breaks_are_removed_and_list_items_kept_apart():
    text = """Heading
    =======

    The first sentence of a
    paragraph goes on here.

    * The first item in a list
      which has two lines.
    * The second item of that list.
    """
    assert demo_text.clean(text) == [
        "The first sentence of a paragraph goes on here.",
        "* The first item in a list which has two lines.",
        "* The second item of that list.",
    ]


def test_code_goes_together_with_what_introduces_it():
    text = """This sentence stays where it is.

    The following code is an example:

    >>> print("hello")
    hello

    And this sentence stays as well."""
    assert demo_text.clean(text) == ["This sentence stays where it is.", "And this sentence stays as well."]


@pytest.mark.parametrize(
    "paragraph",
    ["", "x", "a = b", "0 1 2 3 4 5 6 7 8 9", "|--|--|--|--|", "Ceci n'est pas écrit en anglais du tout"],
)
def test_not_prose(paragraph):
    assert not demo_text.is_prose(paragraph)


def test_duplicates_are_dropped_across_documents():
    first, again, other = "The same sentence.", "the  same\nSentence", "Another sentence."
    assert demo_text.deduplicate([[first, other], [again], ["open()", again]]) == [[first, other]]
    assert demo_text.deduplicate([["open()", first], ["open()", other]]) == [["open()", first], [other]]


def test_docstrings_are_found_without_importing():
    source = '''
"""This module must never be imported here."""
raise SystemExit

class Queue:
    """A queue of things that wait for their turn."""

    def put(self, item, timeout=None):
        """Put an item into the queue, waiting for room."""
'''
    assert [document for document in demo_text.docstrings(ast.parse(source), "waiting") if document] == [
        ["This module must never be imported here."],
        [
            "waiting.Queue",
            "A queue of things that wait for their turn.",
            "Queue.put(item, timeout)",
            "Put an item into the queue, waiting for room.",
        ],
    ]


def test_comments_need_whole_sentences():
    source = """x = 1
# This comment is a whole sentence which is long enough
# to be worth reading.
y = 2
# Too short to keep here.
"""
    assert demo_text.comments(source) == ["This comment is a whole sentence which is long enough to be worth reading."]


def test_held_out_documents_are_not_trained_on():
    documents = [[f"module.name{number}(x)", f"Return the number {number} as it was given."] for number in range(500)]
    train, validation = demo_text.split(documents)
    answers = [{line for text in part for line in text.split("\n")[1:]} for part in (train, validation)]
    assert validation and not answers[0] & answers[1]
    assert sum("<|user|>" not in text for text in train + validation) == 500
    assert all(text.startswith("<|bos|>") and text.endswith("<|eos|>") for text in train + validation)
