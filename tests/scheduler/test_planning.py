"""What a step computes: the token budget, windows, logits, pages and who gives way."""

from __future__ import annotations

from scheduler.plan import Advance, Preempted
from scheduler.types import Visibility, Window
from tests.scheduler.driver import TOKEN, Driver, block, line, request


def test_a_prompt_is_computed_in_chunks_and_only_its_end_has_logits() -> None:
    driver = Driver(max_num_batched_tokens=6)
    driver.add(request("a", 14, max_tokens=2))
    pieces = [driver.step()["a.0"] for _ in range(4)]
    assert [(piece.start, len(piece.tokens), piece.num_logits) for piece in pieces] == [
        (0, 6, 0),
        (6, 6, 0),
        (12, 2, 1),
        (14, 1, 1),
    ]
    assert [tuple(piece.positions) for piece in pieces[2:]] == [(12, 13), (14,)]
    assert pieces[3].tokens == (TOKEN,)


def test_slices_carry_only_new_pages() -> None:
    driver = Driver(max_num_batched_tokens=6)
    driver.add(request("a", 14, max_tokens=3))
    pieces = [driver.step()["a.0"] for _ in range(5)]
    assert [(piece.first_new_page, len(piece.new_pages)) for piece in pieces] == [
        (0, 2),
        (2, 1),
        (3, 1),
        (4, 0),
        (4, 0),
    ]


def test_decodes_come_before_chunks() -> None:
    driver = Driver(max_num_batched_tokens=8, num_pages=32)
    driver.add(request("a", 4, max_tokens=9, arrival_s=1.0), request("b", 3, max_tokens=9, arrival_s=2.0))
    driver.step()
    driver.add(request("long", 30, max_tokens=1, arrival_s=3.0))
    assert driver.counts() == {"a.0": 1, "b.0": 1, "long.0": 6}


def test_a_chunk_at_the_head_of_the_order_is_not_starved_by_decodes() -> None:
    driver = Driver(max_num_batched_tokens=3, num_pages=32)
    driver.add(*[request(name, 1, max_tokens=20, arrival_s=5.0) for name in "abc"])
    driver.step()
    driver.add(request("long", 12, max_tokens=1, arrival_s=1.0))  # accepted late, but it came first
    driver.scheduler.abort("c")
    driver.step()
    assert driver.counts() == {"long.0": 1, "a.0": 1, "b.0": 1}


def test_requests_with_the_same_prompt_wait_to_find_it_computed() -> None:
    driver = Driver(max_num_batched_tokens=8)
    prompt = tuple(range(17))
    driver.add(*[request(name, prompt, max_tokens=2) for name in "ab"])
    steps = [driver.counts() for _ in range(4)]
    assert steps == [{"a.0": 8}, {"a.0": 8}, {"a.0": 1, "b.0": 1}, {"a.0": 1, "b.0": 1}]


def test_admissions_keep_the_order_even_if_someone_behind_would_fit() -> None:
    driver = Driver(num_pages=8)
    driver.add(request("a", 16, max_tokens=4), request("big", 20, max_tokens=4), request("small", 1))
    assert driver.counts() == {"a.0": 16}


def test_a_window_goes_with_the_last_committed_token() -> None:
    driver = Driver()
    driver.add(request("a", 4, max_tokens=9))
    driver.step(window=line(8, 9))
    piece = driver.step()["a.0"]
    assert piece.tokens == (TOKEN, 8, 9)
    assert tuple(piece.positions) == (4, 5, 6)
    assert (piece.num_logits, piece.num_window, piece.visibility) == (3, 2, Visibility.CAUSAL)


def test_positions_of_a_tree_are_its_depths() -> None:
    driver = Driver()
    tree = Window((8, 9, 10), (0, 1, 0), Visibility.ANCESTORS, (0b001, 0b011, 0b100))
    driver.add(request("a", 4, max_tokens=9))
    driver.step(window=tree)
    piece = driver.step()["a.0"]
    assert tuple(piece.positions) == (4, 5, 6, 5)
    assert piece.ancestors == tree.ancestors


def test_a_window_that_does_not_fit_the_budget_waits_whole() -> None:
    driver = Driver(max_num_batched_tokens=5)
    driver.add(request("a", 2, max_tokens=9), request("b", 2, max_tokens=9))
    driver.step(window=line(8, 9, 10))
    assert driver.counts() == {"a.0": 4}


def test_after_a_preemption_known_tokens_go_ahead_of_a_window_that_does_not_fit() -> None:
    driver = Driver(max_num_batched_tokens=6)
    driver.add(request("long", 10, max_tokens=20))
    driver.step()
    driver.step(window=line(8, 9, 10))
    driver.set_aside(0)
    driver.forget_cached_content()
    pieces = [driver.step()["long.0"] for _ in range(3)]
    assert [(len(piece.tokens), piece.num_window, piece.num_logits) for piece in pieces] == [
        (6, 0, 0),
        (4, 0, 0),
        (4, 3, 4),
    ]


def test_a_block_whose_prefix_is_computed_goes_alone() -> None:
    driver = Driver()
    driver.add(request("a", 4, max_tokens=9))
    driver.step(window=block(0, 0))
    plan = driver.plan()
    driver.apply(plan, Advance(0, (5, 6), 3, block(0, 0, 0)))
    piece = driver.step()["a.0"]
    assert (piece.start, piece.tokens, piece.num_logits) == (7, (0, 0, 0), 3)
    assert tuple(piece.positions) == (7, 8, 9)


def test_prompt_logits_are_wanted_of_every_chunk_and_of_no_hit() -> None:
    driver = Driver(max_num_batched_tokens=8)
    prompt = tuple(range(12))
    driver.add(request("a", prompt, max_tokens=1))
    driver.finish()
    driver.add(request("b", prompt, max_tokens=2, prompt_logprobs=0, num_choices=2))
    pieces = [driver.step() for _ in range(3)]
    assert [(piece["b.0"].start, piece["b.0"].num_logits) for piece in pieces] == [(0, 8), (8, 4), (12, 1)]
    assert (pieces[2]["b.1"].start, pieces[2]["b.1"].num_logits) == (8, 1)


def test_prompt_logits_are_not_made_twice_after_a_preemption() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add(request("a", 20, max_tokens=2, prompt_logprobs=0))
    driver.step()
    driver.set_aside(0)
    resumed = driver.step()["a.0"]
    assert (resumed.start, resumed.num_logits) == (8, 8)  # found what it had reported
    driver.set_aside(0)
    driver.forget_cached_content()
    again = driver.step()["a.0"]
    assert (again.start, len(again.tokens), again.num_logits) == (0, 8, 0)


def test_the_prompt_alone_can_be_scored() -> None:
    driver = Driver()
    driver.add(request("a", 6, max_tokens=0, prompt_logprobs=0))
    plan = driver.plan()
    assert plan.slices[0].num_logits == 6
    (news,) = driver.apply(plan)
    assert (news.tokens, news.finish) == ((), "length")


def _two_that_outgrow_the_pool() -> Driver:
    driver = Driver(num_pages=8, max_num_batched_tokens=32)
    driver.add(request("a", 10, max_tokens=20), request("b", 10, max_tokens=20))
    return driver


def test_the_last_of_the_order_gives_its_pages_up() -> None:
    driver = _two_that_outgrow_the_pool()
    plan = driver.plan()
    while not plan.preempted:
        driver.apply(plan)
        plan = driver.plan()
    assert plan.preempted == (Preempted(1, "pages", 0),)
    assert [piece.seq_id for piece in plan.slices] == [0]
    assert driver.scheduler.sequence(1).pages == []


def test_whoever_gave_way_still_says_everything_once() -> None:
    driver = _two_that_outgrow_the_pool()
    news = driver.finish()
    for name in "ab":
        tokens = [token for one in news if one.request_id == name for token in one.tokens]
        assert tokens == [TOKEN] * 20
    stats = driver.scheduler.stats()
    assert stats.num_preemptions >= 1
    assert stats.num_pages_held == 0


def test_the_cache_makes_room_before_anyone_is_put_aside() -> None:
    driver = Driver(num_pages=8)
    driver.add(request("a", 28, max_tokens=1))
    driver.finish()
    assert driver.scheduler.stats().num_pages_cached == 7
    driver.add(request("b", 28, max_tokens=4))
    driver.finish()
    assert driver.scheduler.stats().num_preemptions == 0


def test_no_more_sequences_than_places() -> None:
    driver = Driver(max_num_seqs=2)
    driver.add(*[request(name, 1, max_tokens=3) for name in "abc"])
    assert set(driver.step()) == {"a.0", "b.0"}


def test_a_plan_without_work_is_empty_and_needs_no_answer() -> None:
    driver = Driver()
    assert driver.plan().slices == ()
    assert driver.plan().num_tokens == 0


def test_a_step_costs_the_same_whatever_the_queue() -> None:
    """Counted, not timed: planning beside a long queue asks the policy no more often."""

    def keys_asked(num_waiting: int) -> int:
        driver = Driver(policy="fcfs", max_num_seqs=2, num_pages=64, max_queued_requests=10_000)
        for k in range(num_waiting + 2):
            driver.scheduler.add(request(f"r{k}", 4, max_tokens=30, arrival_s=float(k)))
        driver.scheduler.apply(plan := driver.scheduler.plan(), map(driver.answer, plan.slices))
        asked = 0
        policy = driver.scheduler._policy
        original = policy.key

        def counting(level: int, arrival_s: float) -> float:
            nonlocal asked
            asked += 1
            return original(level, arrival_s)

        policy.key = counting  # type: ignore[method-assign]
        driver.scheduler.apply(plan := driver.scheduler.plan(), map(driver.answer, plan.slices))
        return asked

    assert keys_asked(2000) == keys_asked(2)
