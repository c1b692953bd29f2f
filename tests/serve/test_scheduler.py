"""The scheduler: what each step computes, who is preempted, how requests end, and the invariants under random calls."""

import collections
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.serve.params import SamplingParams
from penstock.serve.plan import StepResult, TokenLogprobs
from penstock.serve.scheduler import NO_DRAFTS, FinishedEvent, RequestRefused, Scheduler, SchedulerConfig, TokenEvent
from tests.serve.simulated import SimulatedRunner


def build(**limits):
    """A scheduler and a runner that agree on the limits."""
    limits = {
        "num_pages": 64,
        "page_size": 4,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        **limits,
    }
    own = {name: limits.pop(name) for name in ("watermark", "enable_prefix_caching") if name in limits}
    return Scheduler(SchedulerConfig(**limits, **own)), SimulatedRunner(**limits)


def advance(scheduler, runner, drafts=NO_DRAFTS):
    """One step and its commit; the plan and the events."""
    plan = scheduler.step(drafts)
    events = scheduler.commit(runner.execute(plan))
    scheduler.check()
    return plan, events


def guess(scheduler, runner, kinds, num_tokens=5):
    """Drafts for the next step, of these kinds in turn: r ight tokens, w rong ones, or none (-)."""
    drafts = {}
    for index, request in enumerate(scheduler.draftable(num_tokens)):
        draft = []
        for kind in kinds[index % len(kinds)][: request.limit]:
            right = runner.next_token(request.seed, [*request.token_ids, *draft])
            draft += [] if kind == "-" else [right if kind == "r" else (right + 1) % runner.vocab_size]
        drafts[request.request_id] = draft
    return drafts


def run(scheduler, runner, limit=5000, kinds=("-",)):
    """All steps until nothing is left; the tokens and the end of each request."""
    tokens, ends = collections.defaultdict(list), {}
    for _ in range(limit):
        plan = scheduler.step(guess(scheduler, runner, kinds))
        if plan is None:
            return dict(tokens), ends
        for event in scheduler.commit(runner.execute(plan)):
            assert event.request_id not in ends, "an event after the end"
            if isinstance(event, TokenEvent):
                tokens[event.request_id].append(event.token_id)
            else:
                ends[event.request_id] = (event.reason, event.stop_reason)
        scheduler.check()
    raise AssertionError(f"not done after {limit} steps")


def params(max_tokens=8, **others):
    return SamplingParams(max_tokens=max_tokens, **others)


def work(plan):
    """(slot, start, tokens, sample) of each part of a plan, decodes and prefills."""
    return tuple(
        [(part.slot, part.start, len(part.token_ids), part.sample) for part in parts] for parts in (plan.decodes, plan.prefills)
    )


def commit_token(scheduler, token, logprobs=None):
    """Commit the same token for every slot; the events."""
    token_ids = {slot: [token] for slot in range(scheduler.config.max_num_seqs)}
    return scheduler.commit(StepResult(token_ids, {0: [logprobs]} if logprobs else {}))


# What a step holds


def test_decodes_come_first_and_prefills_share_what_is_left():
    scheduler, runner = build(max_num_seqs=4, max_num_batched_tokens=8)
    scheduler.add("a", [1] * 3, params(), 0)
    assert work(advance(scheduler, runner)[0]) == ([], [(0, 0, 3, True)])
    scheduler.add("b", [1] * 10, params(), 0)
    scheduler.add("c", [2] * 10, params(), 0)
    assert work(advance(scheduler, runner)[0]) == ([(0, 3, 1, True)], [(1, 0, 7, False)])
    assert work(advance(scheduler, runner)[0]) == ([(0, 4, 1, True)], [(1, 7, 3, True), (2, 0, 4, False)])
    assert work(advance(scheduler, runner)[0]) == ([(0, 5, 1, True), (1, 10, 1, True)], [(2, 4, 6, True)])


def test_a_chunk_is_bounded_by_max_prefill_chunk():
    scheduler, runner = build(max_prefill_chunk=3, max_num_seqs=2, max_num_batched_tokens=8)
    scheduler.add("a", [1] * 7, params(), 0)
    scheduler.add("b", [1] * 2, params(), 0)
    assert work(advance(scheduler, runner)[0]) == ([], [(0, 0, 3, False), (1, 0, 2, True)])
    assert work(advance(scheduler, runner)[0]) == ([(1, 2, 1, True)], [(0, 3, 3, False)])


def test_pages_are_taken_only_for_the_next_chunk():
    scheduler, runner = build(num_pages=16, max_num_batched_tokens=8)
    scheduler.add("a", [1] * 20, params(30), 0)
    plan, _ = advance(scheduler, runner)
    assert (plan.prefills[0].page_index, plan.prefills[0].new_pages) == (0, [0, 1])
    assert scheduler.num_free_pages == 14
    plan, _ = advance(scheduler, runner)
    assert (plan.prefills[0].page_index, plan.prefills[0].new_pages) == (2, [2, 3])


def test_slots_limit_how_many_run_and_come_back():
    scheduler, runner = build(max_num_seqs=2)
    for name in "abc":
        scheduler.add(name, [1, 2], params(2), 0)
    advance(scheduler, runner)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    plan, events = advance(scheduler, runner)
    assert [event.request_id for event in events if isinstance(event, FinishedEvent)] == ["a", "b"]
    plan, _ = advance(scheduler, runner)
    assert plan.freed == [0, 1] and [init.request_id for init in plan.new] == ["c"]


def test_nothing_to_do_is_no_plan():
    scheduler, _ = build()
    assert scheduler.step() is None
    scheduler.add("a", [1], params(), 0)
    scheduler.abort("a")
    assert scheduler.step() is None
    assert scheduler.drain() == [FinishedEvent("a", "abort", None)]
    assert scheduler.drain() == []


# Out of pages


def test_the_youngest_is_preempted_and_computed_again_from_the_start():
    scheduler, runner = build(num_pages=4, max_num_seqs=2)
    scheduler.add("old", [1] * 6, params(8), 7)
    scheduler.add("young", [2] * 4, params(8), 8)
    advance(scheduler, runner)  # 2 + 1 pages
    advance(scheduler, runner)  # "young" takes the last one
    advance(scheduler, runner)
    before = list(runner.rows[1].sampled)
    plan, _ = advance(scheduler, runner)  # "old" needs a third page
    assert scheduler.num_preemptions == 1 and (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    assert plan.freed == [1] and not plan.new and work(plan) == ([(0, 8, 1, True)], [])
    while not (plan := advance(scheduler, runner)[0]).new:
        pass
    assert plan.new[0].output_token_ids == before and plan.prefills[0].start == 0
    assert plan.prefills[0].num_output == 3
    _, ends = run(scheduler, runner)
    assert ends == {"young": ("length", None)}


def test_the_youngest_waits_in_place_while_nobody_older_needs_its_pages():
    scheduler, runner = build(num_pages=3, max_num_seqs=2)
    scheduler.add("old", [1] * 5, params(3), 0)  # two pages, never a third
    scheduler.add("young", [1] * 3, params(5), 0)
    tokens, _ = run(scheduler, runner)
    assert scheduler.num_preemptions == 0
    assert [len(tokens[name]) for name in ("old", "young")] == [3, 5]


def test_preempted_requests_come_back_in_first_come_order():
    scheduler, runner = build(num_pages=6, max_num_seqs=4)
    for name in "abcd":
        scheduler.add(name, [1] * 4, params(20), 0)
    order = []
    while (plan := scheduler.step()) is not None:
        order += [init.request_id for init in plan.new]
        scheduler.commit(runner.execute(plan))
    assert scheduler.num_preemptions >= 2
    # among those waiting at the same time the older always came first, so the last admissions are in order
    assert order[:3] == ["a", "b", "c"] and order[-1] == "d"


def test_admission_leaves_the_watermark_to_those_running():
    scheduler, runner = build(num_pages=8, watermark=3)
    scheduler.add("a", [1] * 12, params(), 0)
    scheduler.add("b", [2] * 12, params(), 0)
    advance(scheduler, runner)  # 3 of 8 pages; b would leave 2
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler, runner = build(num_pages=8, watermark=2)
    scheduler.add("a", [1] * 12, params(), 0)
    scheduler.add("b", [2] * 12, params(), 0)
    advance(scheduler, runner)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)


def test_a_preempted_request_comes_back_only_when_all_of_it_fits():
    scheduler, runner = build(num_pages=8, max_prefill_chunk=4, watermark=1)
    scheduler.add("old", [1] * 4, params(28), 0)
    scheduler.add("young", [1] * 12, params(12), 0)
    tokens, _ = run(scheduler, runner)
    assert scheduler.num_preemptions == 1
    assert sum(plan.num_tokens for plan in runner.plans) < 4 + 27 + 2 * (12 + 11)
    assert [len(tokens[name]) for name in ("old", "young")] == [28, 12]


def test_an_older_prefill_takes_pages_from_a_younger_decode():
    scheduler, runner = build(num_pages=6, max_prefill_chunk=4, max_num_seqs=2, watermark=0)
    scheduler.add("long", [1] * 21, params(2), 0)
    scheduler.add("short", [2] * 4, params(12), 0)
    tokens, _ = run(scheduler, runner)
    assert scheduler.num_preemptions == 1 and [len(tokens[name]) for name in ("long", "short")] == [2, 12]


# Pages found again


def hits(scheduler):
    statistics = scheduler.statistics()
    return statistics.prefix_hit_tokens, statistics.prompt_tokens


def test_a_later_request_goes_on_after_the_pages_of_an_earlier_one():
    scheduler, runner = build()
    scheduler.add("a", range(10), params(4), 0)
    run(scheduler, runner)
    assert scheduler.statistics().num_cached_pages == 3 and scheduler.num_free_pages == 64  # 13 tokens were computed
    scheduler.add("b", [*range(10), 7, 7], params(4), 0)
    scheduler.add("c", [*range(4), 7, 7, 7], params(4), 0)
    scheduler.add("d", [7, *range(1, 10)], params(4), 0)
    plan, _ = advance(scheduler, runner)
    assert work(plan)[1] == [(1, 8, 4, True), (2, 4, 3, True), (3, 0, 10, True)]
    assert (plan.prefills[0].page_index, len(plan.prefills[0].new_pages)) == (0, 3)
    assert hits(scheduler) == (12, 10 + 12 + 7 + 10)


def test_the_answer_is_part_of_what_the_next_turn_finds():
    scheduler, runner = build()
    scheduler.add("turn 1", range(6), params(7), 5)
    tokens, _ = run(scheduler, runner)
    scheduler.add("turn 2", [*range(6), *tokens["turn 1"], 30, 31], params(2), 6)
    plan, _ = advance(scheduler, runner)
    assert plan.prefills[0].start == 12  # 6 + 7 tokens, the last of which was not computed


@pytest.mark.parametrize("length", [8, 9])
def test_the_last_token_of_a_prompt_is_always_computed(length):
    scheduler, runner = build()
    for name in "ab":
        scheduler.add(name, range(length), params(1), 0)
        run(scheduler, runner)
    assert work(runner.plans[-1])[1] == [(1, 4 if length == 8 else 8, 4 if length == 8 else 1, True)]


def test_completions_of_one_prompt_share_its_pages_in_the_step_that_computes_them():
    scheduler, runner = build()
    for seed in range(3):
        scheduler.add(str(seed), range(11), params(2), seed)
    plan, _ = advance(scheduler, runner)
    assert work(plan)[1] == [(0, 0, 11, True), (1, 8, 3, True), (2, 8, 3, True)]
    assert plan.prefills[0].new_pages[:2] == plan.prefills[1].new_pages[:2] == plan.prefills[2].new_pages[:2]
    assert 64 - scheduler.num_free_pages == 2 + 3 and hits(scheduler) == (16, 33)


def test_equal_prompts_in_chunks_are_computed_once_between_them():
    scheduler, runner = build(max_prefill_chunk=4)
    for seed in range(2):
        scheduler.add(str(seed), range(17), params(1), seed)
    run(scheduler, runner)
    assert sum(plan.num_tokens for plan in runner.plans) == 17 + 1


def test_a_preempted_request_finds_its_own_pages():
    scheduler, runner = build(num_pages=8, max_num_seqs=2, watermark=0)
    scheduler.add("old", [1] * 10, params(14), 7)
    scheduler.add("young", [2] * 16, params(4), 8)
    tokens, _ = run(scheduler, runner)
    back = [plan for plan in runner.plans if plan.new][-1]
    assert scheduler.num_preemptions == 1 and back.new[0].request_id == "young"
    assert back.prefills[0].start > 0 and back.prefills[0].page_index == 0
    assert [len(tokens[name]) for name in ("old", "young")] == [14, 4]
    assert hits(scheduler) == (0, 26)  # what is found after a preemption is no hit of the prompt


def test_requests_of_another_salt_share_nothing():
    scheduler, runner = build()
    for name, salt in (("a", b""), ("b", b"x"), ("c", b"x")):
        scheduler.add(name, range(9), params(1), 0, salt=salt)
    assert work(advance(scheduler, runner)[0])[1] == [(0, 0, 9, True), (1, 0, 9, True), (2, 8, 1, True)]


def test_without_prefix_caching_nothing_is_found():
    scheduler, runner = build(enable_prefix_caching=False)
    for _ in range(2):
        scheduler.add("a", range(9), params(3), 0)
        assert work(advance(scheduler, runner)[0])[1][0][1:] == (0, 9, True)
        run(scheduler, runner)
    assert hits(scheduler) == (0, 18) and scheduler.statistics().num_cached_pages == 0


def test_an_aborted_request_leaves_its_pages_to_be_found():
    scheduler, runner = build(max_prefill_chunk=6)
    scheduler.add("a", range(20), params(), 0)
    advance(scheduler, runner)
    scheduler.abort("a")
    scheduler.add("b", range(20), params(), 0)
    assert work(advance(scheduler, runner)[0])[1] == [(1, 4, 6, False)]


def test_reset_forgets_the_pages():
    scheduler, runner = build()
    scheduler.add("a", range(9), params(), 0)
    scheduler.step()  # published, never computed
    scheduler.reset()
    scheduler.add("b", range(9), params(), 0)
    assert work(advance(scheduler, runner)[0])[1] == [(0, 0, 9, True)]


def test_statistics():
    scheduler, runner = build(max_num_seqs=1)
    for name in "ab":
        scheduler.add(name, range(6), params(3), 0)
    advance(scheduler, runner)
    got = scheduler.statistics()
    assert (got.prompt_tokens, got.output_tokens, got.num_preemptions) == (6, 1, 0)
    assert (got.num_running, got.num_waiting, got.num_pages, got.num_free_pages, got.num_cached_pages) == (1, 1, 64, 62, 0)


# Guesses


@pytest.mark.parametrize(("kinds", "steps"), [("rrrrr", 3), ("-", 13), ("wrrrr", 13), ("rwrrr", 7)])
def test_right_guesses_save_steps_and_wrong_ones_change_nothing(kinds, steps):
    plain = build()
    plain[0].add("a", range(6), params(13), 5)
    wanted = run(*plain)
    scheduler, runner = build()
    scheduler.add("a", range(6), params(13), 5)
    assert run(scheduler, runner, kinds=[kinds]) == wanted
    assert len(runner.plans) == steps
    got = scheduler.statistics()
    drafted = sum(part.num_draft for plan in runner.plans for part in plan.decodes)
    assert (got.draft_tokens, got.accepted_tokens, got.output_tokens) == (drafted, 13 - steps, 13)


def test_the_end_token_among_right_guesses_ends_the_request():
    scheduler, runner = build()
    tokens = [runner.next_token(5, [])]
    scheduler.add("a", range(6), params(13), 5)
    tokens = run(scheduler, runner)[0]["a"]
    end = tokens[4]
    scheduler, runner = build()
    scheduler.add("a", range(6), params(13, stop_token_ids=[end]), 5)
    advance(scheduler, runner)
    plan, events = advance(scheduler, runner, {"a": tokens[1:7]})
    assert plan.decodes[0].draft == tokens[1:7]
    assert [event.token_id for event in events[:-1]] == tokens[1:5]
    assert events[-1] == FinishedEvent("a", "stop", end) and scheduler.num_free_pages == 64


def test_guesses_end_where_the_request_does():
    scheduler, runner = build(max_model_len=12)
    scheduler.add("a", range(6), params(4), 5)
    scheduler.add("b", range(6), params(100), 5)
    advance(scheduler, runner)
    assert [(each.request_id, each.limit) for each in scheduler.draftable(9)] == [("a", 2), ("b", 4)]
    plan, _ = advance(scheduler, runner, {"a": [1] * 9, "b": [1] * 9, "gone": [1]})
    assert [part.num_draft for part in plan.decodes] == [2, 4]
    assert [each.limit for each in scheduler.draftable(2)] == [1, 2]


def test_guesses_take_nobodys_pages_and_leave_half_the_step_to_prompts():
    scheduler, runner = build(num_pages=8, max_num_seqs=2, max_num_batched_tokens=10, watermark=0)
    scheduler.add("a", [1] * 4, params(20), 5)
    advance(scheduler, runner)
    scheduler.add("b", [2] * 20, params(8), 6)
    plan, _ = advance(scheduler, runner, {"a": [1] * 9})
    assert work(plan) == ([(0, 4, 5, True)], [(1, 0, 5, False)])
    while len(scheduler.draftable(9)) < 2:
        advance(scheduler, runner)
    while scheduler.num_free_pages > 2:
        advance(scheduler, runner)
    before = scheduler.num_preemptions
    plan, _ = advance(scheduler, runner, {"a": [1] * 9, "b": [2] * 9})
    assert scheduler.num_preemptions == before
    assert sum(len(part.new_pages) for part in plan.decodes) <= 2 and sum(part.num_draft for part in plan.decodes) > 0


def test_pages_are_published_with_right_guesses_only():
    scheduler, runner = build()
    scheduler.add("a", range(6), params(9), 5)
    tokens, _ = run(scheduler, runner, kinds=["rrwww"])
    scheduler.add("b", [*range(6), *tokens["a"]], params(1), 5)
    plan, _ = advance(scheduler, runner)
    assert plan.prefills[0].start == 12


# Refusals


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "sentence"),
    [
        (0, 4, "the prompt is empty; a request needs at least one token"),
        (20, 4, "the prompt has 20 tokens; max_model_len=20 takes at most 19 and one token of output"),
        (8, 6, r"the prompt of 8 tokens may grow to 14; the KV cache holds 13 \(3 pages of 4\)"),
        (13, None, r"the prompt of 13 tokens may grow to 14; the KV cache holds 13 \(3 pages of 4\)"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(num_prompt, max_tokens, sentence):
    scheduler, _ = build(num_pages=3, max_model_len=20)
    with pytest.raises(RequestRefused, match=sentence):
        scheduler.add("a", [1] * num_prompt, params(max_tokens), 0)
    assert scheduler.step() is None and scheduler.num_waiting == 0


def test_the_longest_that_fits_runs_alone_to_its_end():
    scheduler, runner = build(num_pages=3, max_model_len=20)
    scheduler.add("a", [1] * 8, params(5), 0)
    scheduler.add("b", [1] * 8, params(None), 0)
    tokens, ends = run(scheduler, runner)
    assert [len(tokens[name]) for name in "ab"] == [5, 5] and ends == dict.fromkeys("ab", ("length", None))


def test_a_name_in_use_is_refused():
    scheduler, _ = build()
    scheduler.add("a", [1], params(), 0)
    with pytest.raises(RequestRefused, match="'a' is already here"):
        scheduler.add("a", [1], params(), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_pages", 0),
        ("page_size", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 7),
        ("max_model_len", 1),
        ("max_prefill_chunk", 0),
        ("watermark", -1),
    ],
)
def test_impossible_limits_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"SchedulerConfig: `{field}` must be ≥ .*, got {value}"):
        build(**{field: value})


# How requests end


@pytest.mark.parametrize(
    ("token", "extra", "ends"),
    [
        (9, {}, ("stop", None)),
        (9, {"ignore_eos": True}, ("length", None)),
        (7, {"stop_token_ids": [7]}, ("stop", 7)),
        (7, {"stop_token_ids": [7], "ignore_eos": True}, ("stop", 7)),
        (5, {"stop_token_ids": [7]}, ("length", None)),
    ],
)
def test_the_end_token_and_stop_tokens(token, extra, ends):
    scheduler, _ = build()
    scheduler.add("a", [1], params(3, **extra), 0, eos_token_ids=[9])
    events = []
    while scheduler.step():
        events += commit_token(scheduler, token)
    assert events[-1] == FinishedEvent("a", *ends)
    assert events[-2].is_stop_token == (ends[0] == "stop")
    assert len(events) == (2 if ends[0] == "stop" else 4)
    assert scheduler.num_free_pages == 64


def test_min_tokens_holds_the_end_back():
    scheduler, _ = build()
    scheduler.add("a", [1], params(8, min_tokens=3, stop_token_ids=[7]), 0, eos_token_ids=[9])
    for token in (9, 7):
        scheduler.step()
        assert commit_token(scheduler, token) == [TokenEvent("a", token, None, False)]
    scheduler.step()
    assert commit_token(scheduler, 9) == [TokenEvent("a", 9, None, True), FinishedEvent("a", "stop", None)]


def test_the_model_length_ends_a_request():
    scheduler, runner = build(max_model_len=10)
    scheduler.add("a", [1] * 4, params(100), 0)
    scheduler.add("b", [1] * 4, params(None), 0)
    tokens, ends = run(scheduler, runner)
    assert [len(tokens[name]) for name in "ab"] == [6, 6] and ends["a"] == ("length", None)


def test_logprobs_travel_with_their_token():
    scheduler, _ = build()
    scheduler.add("a", [1], params(logprobs=1), 0)
    scheduler.step()
    logprobs = TokenLogprobs([5], [-0.1], 1, -0.1)
    assert commit_token(scheduler, 5, logprobs) == [TokenEvent("a", 5, logprobs, False)]


# Abort and finish at any moment


@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding", "planned first", "planned later"])
def test_abort_frees_everything_and_ends_once(moment):
    scheduler, runner = build(max_num_seqs=2, max_num_batched_tokens=4)
    scheduler.add("a", [1] * 6, params(), 0)
    if moment == "planned first":
        scheduler.step()
    if moment in ("prefilling", "decoding", "planned later"):
        advance(scheduler, runner)
    if moment == "decoding":
        advance(scheduler, runner)
    if moment == "planned later":
        scheduler.step()
    assert scheduler.abort("a") is True
    assert scheduler.abort("a") is False
    scheduler.check()
    assert (scheduler.num_free_pages, scheduler.num_running, scheduler.num_waiting) == (64, 0, 0)
    if moment.startswith("planned"):
        assert scheduler.commit(StepResult({0: [3]})) == [FinishedEvent("a", "abort", None)]
    else:
        assert scheduler.drain() == [FinishedEvent("a", "abort", None)]
    assert scheduler.step() is None


def test_a_new_request_of_the_same_name_does_not_get_the_old_result():
    scheduler, runner = build()
    scheduler.add("a", [1], params(), 0)
    result = runner.execute(scheduler.step())
    scheduler.abort("a")
    scheduler.add("a", [2, 3], params(2), 0)
    assert scheduler.commit(result) == [FinishedEvent("a", "abort", None)]
    tokens, _ = run(scheduler, runner)
    assert len(tokens["a"]) == 2


def test_finish_from_outside_carries_its_reason():
    scheduler, runner = build()
    scheduler.add("a", [1], params(), 0)
    advance(scheduler, runner)
    assert scheduler.finish("a", "stop", "\n\n")
    assert scheduler.drain() == [FinishedEvent("a", "stop", "\n\n")]
    assert not scheduler.finish("a", "stop", "\n\n") and not scheduler.abort("nobody")


def test_step_and_commit_take_turns():
    scheduler, runner = build()
    scheduler.add("a", [1], params(), 0)
    with pytest.raises(RuntimeError, match="no plan is in flight"):
        scheduler.commit(StepResult({}))
    plan = scheduler.step()
    with pytest.raises(RuntimeError, match="was not committed"):
        scheduler.step()
    with pytest.raises(ValueError, match=r"no token for slots \[0\]"):
        scheduler.commit(StepResult({1: [5]}))
    assert len(scheduler.commit(runner.execute(plan))) == 1


def test_reset_takes_everything_back_and_frees_every_slot():
    scheduler, runner = build(max_num_seqs=3)
    for name in "abcd":
        scheduler.add(name, [1] * 5, params(), 0)
    advance(scheduler, runner)
    scheduler.step()
    scheduler.reset()
    scheduler.check()
    assert (scheduler.num_free_pages, scheduler.num_running, scheduler.num_waiting) == (64, 0, 0)
    scheduler.add("a", [1] * 5, params(2), 0)
    plan, _ = advance(scheduler, runner)
    assert plan.freed == [0, 1, 2] and plan.new[0].output_token_ids == []


def test_check_sees_a_lost_page():
    scheduler, runner = build()
    scheduler.add("a", [1] * 5, params(), 0)
    advance(scheduler, runner)
    scheduler._running[0].pages.pop()
    with pytest.raises(AssertionError):
        scheduler.check()


def test_check_sees_a_page_of_two_that_will_be_written():
    scheduler, runner = build(enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(name, [1] * 5, params(), 0)
    advance(scheduler, runner)
    old, young = scheduler._running
    scheduler._pages._holders[young.pages[1]] -= 1
    scheduler._pages._free.append(young.pages[1])
    scheduler._pages._holders[old.pages[1]] += 1
    young.pages[1] = old.pages[1]
    with pytest.raises(AssertionError, match="a page is shared and written"):
        scheduler.check()


def test_it_imports_no_torch():
    code = "import sys, penstock.serve.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Random calls

guesses = st.lists(st.text("rw", max_size=5), min_size=1, max_size=3)
requests = st.tuples(st.integers(1, 14), st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 14))


def prompt(length, parts_at):
    """Prompts of which any two agree up to where the first of them parts."""
    return [*range(min(length, parts_at)), *range(20 + parts_at, 20 + length)]


@settings(max_examples=150, deadline=None)
@given(
    wanted=st.lists(requests, min_size=1, max_size=8),
    num_pages=st.integers(13, 20),
    slots=st.integers(1, 5),
    spare=st.integers(0, 12),
    chunk=st.none() | st.integers(1, 9),
    watermark=st.none() | st.integers(0, 3),
    page_size=st.sampled_from([2, 4]),
    kinds=guesses,
)
def test_the_tokens_do_not_depend_on_pool_chunks_slots_or_guesses(
    wanted, num_pages, slots, spare, chunk, watermark, page_size, kinds
):
    tight = build(
        num_pages=num_pages,
        page_size=page_size,
        max_num_seqs=slots,
        max_num_batched_tokens=slots + spare,
        max_prefill_chunk=chunk,
        watermark=watermark,
    )
    wide = build(num_pages=1000, max_num_seqs=8, max_num_batched_tokens=1000, enable_prefix_caching=False)
    got = []
    for scheduler, runner in (tight, wide):
        for index, (num_prompt, max_tokens, seed, parts_at) in enumerate(wanted):
            scheduler.add(str(index), prompt(num_prompt, parts_at), params(max_tokens), seed, eos_token_ids=[3])
        got.append(run(scheduler, runner, kinds=kinds if scheduler is tight[0] else ["-"]))
        assert scheduler.num_free_pages == scheduler.config.num_pages
    assert wide[0].num_preemptions == 0
    assert got[0] == got[1] and len(got[0][1]) == len(wanted)


class AnyCalls(RuleBasedStateMachine):
    """Calls in any order; the model of the test is the list of unfinished requests in order of arrival."""

    @initialize(
        num_pages=st.integers(2, 9),
        page_size=st.sampled_from([1, 2, 4]),
        slots=st.integers(1, 4),
        spare=st.integers(0, 8),
        chunk=st.none() | st.integers(1, 5),
        watermark=st.none() | st.integers(0, 2),
        caching=st.booleans(),
    )
    def start(self, num_pages, page_size, slots, spare, chunk, watermark, caching):
        self.scheduler, self.runner = build(
            num_pages=num_pages,
            page_size=page_size,
            max_model_len=24,
            max_num_seqs=slots,
            max_num_batched_tokens=slots + spare,
            max_prefill_chunk=chunk,
            watermark=watermark,
            enable_prefix_caching=caching,
        )
        self.capacity = num_pages * page_size + 1
        self.unfinished, self.count, self.result = [], 0, None
        self.max_tokens, self.num_tokens, self.terminal = {}, collections.Counter(), collections.Counter()

    @rule(
        num_prompt=st.integers(1, 24),
        max_tokens=st.none() | st.integers(1, 10),
        stop=st.integers(0, 49),
        parts_at=st.integers(0, 24),
        salt=st.sampled_from([b"", b"", b"x"]),
    )
    def add(self, num_prompt, max_tokens, stop, parts_at, salt):
        name = str(self.count)
        self.count += 1
        wanted = params(max_tokens, stop_token_ids=[stop])
        longest = min(24, num_prompt + (max_tokens or 1))
        if num_prompt >= 24 or longest > self.capacity:
            with pytest.raises(RequestRefused):
                self.scheduler.add(name, prompt(num_prompt, parts_at), wanted, self.count)
        else:
            self.scheduler.add(name, prompt(num_prompt, parts_at), wanted, self.count, salt=salt)
            self.unfinished.append(name)
            self.max_tokens[name] = max_tokens or 24

    @precondition(lambda self: self.result is None)
    @rule(kinds=guesses)
    def step(self, kinds):
        plan = self.scheduler.step(guess(self.scheduler, self.runner, kinds))
        assert (plan is None) == (not self.unfinished), "work is left but no step, or the other way round"
        if plan is None:
            return
        self.result = self.runner.execute(plan)
        # nobody is overtaken: those that run are the oldest
        running = [row.init.request_id for row in self.runner.rows.values()]
        assert sorted(running, key=int) == self.unfinished[: len(running)]
        for parts in (plan.decodes, plan.prefills):
            arrivals = [int(self.runner.rows[part.slot].init.request_id) for part in parts]
            assert arrivals == sorted(arrivals)
        oldest = next(slot for slot, row in self.runner.rows.items() if row.init.request_id == self.unfinished[0])
        assert oldest in [part.slot for part in [*plan.decodes, *plan.prefills]], "the oldest makes no progress"

    @precondition(lambda self: self.result is not None)
    @rule()
    def commit(self):
        result, self.result = self.result, None
        self.take(self.scheduler.commit(result))

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def end(self, data, reason):
        name = data.draw(st.sampled_from(self.unfinished))
        if reason == "abort":
            assert self.scheduler.abort(name) is True
        else:
            assert self.scheduler.finish(name, "stop", "text") is True
        self.unfinished.remove(name)
        assert self.scheduler.abort(name) is False

    @rule()
    def drain(self):
        self.take(self.scheduler.drain())

    def take(self, events):
        for event in events:
            assert self.terminal[event.request_id] == 0, "an event after the end"
            if isinstance(event, TokenEvent):
                self.num_tokens[event.request_id] += 1
                continue
            self.terminal[event.request_id] += 1
            if event.request_id in self.unfinished:
                self.unfinished.remove(event.request_id)
            if event.reason == "length":
                assert 0 < self.num_tokens[event.request_id] <= self.max_tokens[event.request_id]

    @invariant()
    def consistent(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        if self.result is not None:
            self.commit()
        for _ in range(3000):
            if not self.unfinished:
                break
            self.step(kinds=["rw"])
            self.commit()
        self.take(self.scheduler.drain())
        assert not self.unfinished and self.scheduler.step() is None
        assert set(self.terminal.values()) <= {1} and set(self.terminal) == set(self.max_tokens)
        assert self.scheduler.num_free_pages == self.scheduler.config.num_pages


AnyCalls.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_calls = AnyCalls.TestCase
