"""Who holds which page of the KV pool, and which full pages can be found again by the tokens in them.

A page is held by one or more requests, or cached (nobody holds it, its content can still be found), or free. A key names all
the tokens from the beginning of a request to the end of its page, so equal keys mean equal keys and values.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or cached."""


def root_key(salt: bytes = b"") -> bytes:
    """The key before the first page; requests with different salts share nothing."""
    return hashlib.sha256(b"penstock pages 1\0" + salt).digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """SHA-256 of the key of the page before and of this page's tokens."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class PagePool:
    """Pages 0 … num_pages - 1, counted by reference; every call is O(1) for each page.

    `allocate` gives free pages first, oldest freed first, then cached ones, those longest unused first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"PagePool: `num_pages` must be ≥ 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._holders = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and that can be found by their key."""
        return len(self._cached)

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """Hold `count` pages of no content: all of them, or none and OutOfPages."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are asked for; {self.num_free} of {self.num_pages} are free or cached")
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, key: bytes) -> int | None:
        """The page published under a key, if it is still there."""
        return self._page_of.get(key)

    def hold(self, page: int) -> None:
        """One more holder of a page that was found."""
        if self._keys[page] is None:
            raise ValueError(f"page {page} has no key, so nobody else may hold it")
        self._cached.pop(page, None)
        self._holders[page] += 1

    def publish(self, page: int, key: bytes) -> None:
        """Let a page that is held and full be found; where the key is taken the first page keeps it."""
        if self._holders[page] == 0:
            raise ValueError(f"page {page} is published, but nobody holds it")
        if self._keys[page] is None and key not in self._page_of:
            self._keys[page] = key
            self._page_of[key] = page

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page of a request, in its order.

        The last page is the first to go: without the pages before it nobody could use it.
        """
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise ValueError(f"page {page} is given back, but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key, self._keys[page] = self._keys[page], None
        assert key is not None
        del self._page_of[key]
        return page

    def check(self, held: Iterable[int]) -> None:
        """Assert that every page is held as often as `held` names it, or else is once free or once cached."""
        held, free = Counter(held), Counter(self._free)
        for page in range(self.num_pages):
            holders, state = self._holders[page], (free[page], int(page in self._cached))
            assert holders == held[page], f"page {page} counts {holders} holders and has {held[page]}"
            key = self._keys[page]
            wanted = (0, 0) if holders else (1, 0) if key is None else (0, 1)
            assert state == wanted, f"page {page}, held {holders} times: {state} times (free, cached)"
            assert key is None or self._page_of.get(key) == page, f"page {page} is not found under its key"
        assert len(self._page_of) == sum(key is not None for key in self._keys)
