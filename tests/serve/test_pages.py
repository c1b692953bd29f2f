"""The page pool: reference counts, keys, and what is evicted when."""

import pytest

from penstock.serve.pages import OutOfPages, PagePool, page_key, root_key


def test_pages_come_back_in_the_order_they_were_freed():
    pages = PagePool(4)
    first, second = pages.allocate(2), pages.allocate(1)
    assert (first, second, pages.num_free) == ([0, 1], [2], 1)
    pages.release(second)
    pages.release(first)
    assert pages.allocate(4) == [3, 2, 1, 0]
    pages.check(range(4))


def test_too_many_is_all_or_nothing():
    pages = PagePool(3)
    pages.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages are asked for; 1 of 3 are free or cached"):
        pages.allocate(2)
    assert pages.num_free == 1
    pages.check([0, 1])


def test_a_page_is_given_back_as_often_as_it_is_held():
    pages = PagePool(3)
    [page] = pages.allocate(1)
    with pytest.raises(ValueError, match="page 0 has no key, so nobody else may hold it"):
        pages.hold(page)
    pages.publish(page, b"a")
    pages.hold(page)
    pages.release([page])
    assert (pages.holders(page), pages.num_free, pages.num_cached) == (1, 2, 0)
    pages.release([page])
    assert (pages.holders(page), pages.num_free, pages.num_cached) == (0, 3, 1)
    with pytest.raises(ValueError, match="page 0 is given back, but nobody holds it"):
        pages.release([page])
    with pytest.raises(ValueError, match="page 1 is published, but nobody holds it"):
        pages.publish(1, b"b")
    pages.check([])


def test_the_longest_unused_is_evicted_first_and_never_a_held_one():
    pages = PagePool(3)
    pages.allocate(3)
    for page in range(3):
        pages.publish(page, bytes([page]))
    for page in (1, 0, 2):
        pages.release([page])
    pages.hold(1)  # used again: now it is nobody's to take
    assert pages.allocate(1) == [0] and pages.find(b"\0") is None
    pages.release([1])
    assert pages.allocate(2) == [2, 1]
    assert pages.find(b"\1") is None
    pages.check(range(3))


def test_free_pages_are_taken_before_cached_ones_and_the_end_of_a_prefix_first():
    pages = PagePool(4)
    held = pages.allocate(3)
    for page in held:
        pages.publish(page, bytes([page]))
    pages.release(held)
    assert pages.allocate(2) == [3, 2]
    assert [pages.find(bytes([page])) for page in range(3)] == [0, 1, None]


def test_the_first_page_keeps_its_key_and_a_page_its_first_key():
    pages = PagePool(2)
    pages.allocate(2)
    pages.publish(0, b"a")
    pages.publish(1, b"a")
    pages.publish(0, b"b")
    assert (pages.find(b"a"), pages.find(b"b")) == (0, None)
    pages.release([1, 0])
    assert pages.num_cached == 1
    pages.check([])


def test_a_key_names_the_whole_prefix_and_the_salt():
    def chain(*pages, salt=b""):
        key = root_key(salt)
        for tokens in pages:
            key = page_key(key, tokens)
        return key

    keys = [chain(), chain([1, 2]), chain([2, 1]), chain([1], [2]), chain([3], [2]), chain([1, 2], salt=b"x"), chain([258])]
    assert len(set(keys)) == len(keys)
    assert chain([1, 2], [3, 4]) == chain([1, 2], [3, 4]) and len(keys[0]) == 32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pages: pages._free.append(0), "page 0, held 1 times"),
        (lambda pages: pages._free.remove(2), "page 2, held 0 times"),
        (lambda pages: pages._cached.clear(), "page 1, held 0 times"),
        (lambda pages: pages._cached.update({0: None}), "page 0, held 1 times"),
        (lambda pages: pages._page_of.clear(), "page 1 is not found under its key"),
        (lambda pages: pages._holders.__setitem__(0, 2), "page 0 counts 2 holders and has 1"),
    ],
)
def test_check_sees_damage(damage, message):
    pages = PagePool(3)
    pages.allocate(2)
    pages.publish(1, b"a")
    pages.release([1])
    pages.check([0])
    damage(pages)
    with pytest.raises(AssertionError, match=message):
        pages.check([0])


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="must be ≥ 1, got 0"):
        PagePool(0)
