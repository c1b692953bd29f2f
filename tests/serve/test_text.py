"""Text in and out: characters split over tokens, stop strings split over pieces, templates, unreadable folders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.serve.text import (
    ChatError,
    IncrementalDetokenizer,
    StopScanner,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from tests.serve.small_tokenizer import CHAT, byte_level, sentencepiece_like

BYTES, WORDS = byte_level(), sentencepiece_like()


def pieces(tokenizer, token_ids, prompt=(), **options):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


# Detokeniser


def test_a_character_split_over_tokens_comes_out_once_and_whole():
    token_ids = BYTES.encode("é🙂")
    assert len(token_ids) == 6
    assert pieces(BYTES, token_ids) == ["", "é", "", "", "", "🙂", ""]


def test_what_is_incomplete_at_the_end_is_flushed_once():
    detokenizer = IncrementalDetokenizer(BYTES)
    assert [detokenizer.feed(token_id) for token_id in BYTES.encode("a🙂")[:3]] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_the_prompt_decides_about_the_leading_space():
    words = [2, 3]  # " wheel", " turns"
    assert pieces(WORDS, words, prompt=[1]) == [" wheel", " turns", ""]
    assert pieces(WORDS, words) == ["wheel", " turns", ""]


def test_a_prompt_that_ends_inside_a_character_is_not_repeated():
    prompt = [*BYTES.encode("turn back"), *BYTES.encode("🙂")[:2]]
    assert "".join(pieces(BYTES, BYTES.encode(" stop"), prompt)) == " stop"


def test_special_tokens_are_left_out_unless_asked_for():
    token_ids = [*BYTES.encode("stop"), 0]
    assert "".join(pieces(BYTES, token_ids)) == "stop"
    assert "".join(pieces(BYTES, token_ids, skip_special_tokens=False)) == "stop<eos>"


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    lone = BYTES.encode("🙂")[1]
    got = pieces(BYTES, [lone] * 200 + BYTES.encode("stop"))
    assert "".join(got) == "\ufffd" * 200 + "stop"
    assert any(got[: IncrementalDetokenizer.HELD])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=40), st.text(max_size=6), st.booleans())
def test_the_pieces_are_the_text_bytes(token_ids, prompt, skip):
    got = pieces(BYTES, token_ids, BYTES.encode(prompt), skip_special_tokens=skip)
    assert "".join(got) == BYTES.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_the_pieces_are_the_text_words(text):
    token_ids = WORDS.encode(text)
    assert "".join(pieces(WORDS, token_ids)) == WORDS.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 261), max_size=30))
def test_any_bytes_pass_and_the_words_after_them_are_whole(token_ids):
    # byte fallback takes back characters already shown when an invalid byte follows them, so equality is not to be had
    assert "".join(pieces(WORDS, [*token_ids, 2, 3], [1])).endswith(" wheel turns")


# Stop strings


def scan(stop, parts, **options):
    scanner = StopScanner(stop, **options)
    shown = []
    for part in parts:
        text, found = scanner.feed(part)
        shown.append(text)
        if found is not None:
            return shown, found
    return [*shown, scanner.flush()], None


def test_a_stop_string_in_pieces_is_never_shown():
    assert scan(["END"], ["a", "E", "N", "D", "x"]) == (["a", "", "", ""], "END")
    assert scan(["END"], ["aEN", "Ex", "EN"]) == (["a", "ENEx", "", "EN"], None)
    assert scan(["END"], ["one EN", "D two"], include=True) == (["one ", "END"], "END")


def test_the_first_to_be_complete_wins_and_of_those_the_longest():
    assert scan(["abcX", "c"], ["abc"]) == (["ab"], "c")
    assert scan(["b", "ab"], ["xab"]) == (["x"], "ab")
    assert scan(["bcd", "abcde"], ["abcde"]) == (["a"], "bcd")


def test_without_stop_strings_nothing_is_held():
    assert scan([], ["a", "b"]) == (["a", "b", ""], None)


@settings(max_examples=500, deadline=None)
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    parts=st.lists(st.text("abc", max_size=5), max_size=8),
    include=st.booleans(),
)
def test_the_pieces_do_not_matter(stop, parts, include):
    text = "".join(parts)
    shown, found = scan(stop, parts, include=include)
    ends = sorted((text.find(word) + len(word), -len(word), word) for word in stop if word in text)
    if ends:
        end, _, word = ends[0]
        assert found == word and "".join(shown) == text[: end if include else end - len(word)]
    else:
        assert found is None and "".join(shown) == text
        assert all(len(piece) < max(map(len, stop)) for piece in shown[-1:])


# Tokenizer and chat


def test_a_saved_tokenizer_is_loaded(tmp_path):
    BYTES.hf_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    token_ids = tokenizer.encode("the turbine é")
    assert token_ids == BYTES.encode("the turbine é") and tokenizer.decode(token_ids) == "the turbine é"
    assert tokenizer.eos_token_ids == (0,) and WORDS.eos_token_ids == ()


def test_a_begin_token_is_added_unless_told_otherwise():
    tokenizer = byte_level(begin=True)
    assert tokenizer.encode("stop") == [1, *tokenizer.encode("stop", add_special_tokens=False)]


def test_a_tokenizer_that_is_absent_or_unreadable_says_so(tmp_path):
    with pytest.raises(TokenizerError, match=r"there is no folder '.*nowhere'"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"cannot read one from .*skip_tokenizer_init=True"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError, match="cannot read one from"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="object is not a fast tokenizer"):
        Tokenizer(object())


def test_the_chat_template_makes_the_prompt():
    tokenizer = byte_level(CHAT)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.render_chat(messages) == "[system]s[user]u[assistant]"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "[system]s[user]u"
    assert tokenizer.render_chat(messages, chat_template="{{ word }}", word="w") == "w"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must be a non-empty list"),
        ("hello", "messages must be a non-empty list"),
        (["hello"], 'message 0 must be a dict with a "role" string'),
        ([{"role": "user", "content": ""}, {"content": "x"}], 'message 1 must be a dict with a "role" string'),
        ([{"role": "user"}], 'message 0 must have "content", got only role'),
        ([{"role": "bad", "content": ""}], "the chat template refuses the messages: no such role"),
    ],
)
def test_messages_that_cannot_be_rendered(messages, sentence):
    with pytest.raises(ChatError, match=sentence):
        byte_level(CHAT).render_chat(messages)


def test_no_chat_template():
    with pytest.raises(ChatError, match="has no chat template"):
        BYTES.render_chat([{"role": "user", "content": "u"}])
