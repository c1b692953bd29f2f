"""Logs on stderr, one line each: words for people, or JSON for machines."""

import json
import logging
from datetime import UTC, datetime


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; `facts` are its fields."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        facts = getattr(record, "facts", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            line = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage(), **facts}
            return json.dumps(line | ({"exception": trace} if trace else {}), ensure_ascii=True, default=str)
        words = [
            moment,
            record.levelname.lower(),
            record.getMessage(),
            *(f"{name}={_word(value)}" for name, value in facts.items()),
        ]
        return " ".join(words) + (f"\n{trace}" if trace else "")


def _word(value: object) -> str:
    """A value in one word, whatever a client put in it."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else ascii(text)


def configure(*, as_json: bool, level: str) -> None:
    """Sends Penstock's and uvicorn's logs to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(as_json=as_json))
    for name, least in (("penstock", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
