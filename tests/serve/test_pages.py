"""The page allocator: every page is free or owned exactly once."""

import pytest

from penstock.serve.pages import OutOfPages, PageAllocator


def test_pages_come_back_in_the_order_they_were_freed():
    pages = PageAllocator(4)
    first, second = pages.allocate("a", 2), pages.allocate("b", 1)
    assert (first, second, pages.num_free) == ([0, 1], [2], 1)
    pages.release("b", second)
    pages.release("a", first)
    assert pages.allocate("c", 4) == [3, 2, 0, 1]
    pages.check()


def test_too_many_is_all_or_nothing():
    pages = PageAllocator(3)
    pages.allocate("a", 2)
    with pytest.raises(OutOfPages, match=r"'b' asks for 2 pages; 1 of 3 are free"):
        pages.allocate("b", 2)
    assert pages.num_free == 1
    pages.check()


def test_a_page_is_given_back_once_and_by_its_owner():
    pages = PageAllocator(3)
    mine = pages.allocate("a", 1)
    with pytest.raises(ValueError, match=r"'b' gives back page 0, which belongs to 'a'"):
        pages.release("b", mine)
    pages.release("a", mine)
    with pytest.raises(ValueError, match=r"belongs to None"):
        pages.release("a", mine)
    assert pages.num_free == 3


def test_check_sees_a_page_that_is_free_and_owned():
    pages = PageAllocator(2)
    pages.allocate("a", 1)
    pages._free.append(0)
    with pytest.raises(AssertionError, match="page 0"):
        pages.check()


def test_check_sees_a_page_that_is_lost():
    pages = PageAllocator(2)
    pages._free.pop()
    with pytest.raises(AssertionError, match="page 1 is 0 times free and owned by None"):
        pages.check()


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="must be ≥ 1, got 0"):
        PageAllocator(0)
