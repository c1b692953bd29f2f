"""Who owns which page of the KV pool: every page is free or owned exactly once."""

from collections import deque


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out pages 0 … num_pages - 1, oldest freed first; O(1) for each page."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"PageAllocator: `num_pages` must be ≥ 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._owner: list[str | None] = [None] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def owner(self, page: int) -> str | None:
        """Who owns the page; None when it is free."""
        return self._owner[page]

    def allocate(self, owner: str, count: int) -> list[int]:
        """Give `count` pages to `owner`: all of them, or none and OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"{owner!r} asks for {count} pages; {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._owner[page] = owner
        return pages

    def release(self, owner: str, pages: list[int]) -> None:
        """Take pages back from `owner`; giving back a page owned by another, or by nobody, is an error."""
        for page in pages:
            if self._owner[page] != owner:
                raise ValueError(f"{owner!r} gives back page {page}, which belongs to {self._owner[page]!r}")
            self._owner[page] = None
            self._free.append(page)

    def check(self) -> None:
        """Assert that every page is free or owned exactly once."""
        times_free = [0] * self.num_pages
        for page in self._free:
            times_free[page] += 1
        for page, (times, owner) in enumerate(zip(times_free, self._owner, strict=True)):
            assert times == (1 if owner is None else 0), f"page {page} is {times} times free and owned by {owner!r}"
