"""The engine in a thread of its own: requests go in, batches of outputs come out through a callback.

    loop = EngineLoop(lambda: LLM("demo").engine)
    loop.start()
    loop.attach(on_outputs, on_death)
    loop.submit("a", prompt, params, stream=True)

Nothing here waits for a client: what the callback does with outputs must not block.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from penstock.serve.engine import EncodedPrompt, Engine, InvalidPrompt
from penstock.serve.outputs import EngineStatistics, RequestOutput
from penstock.serve.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine did not take a request; in place of its outputs."""

    request_id: str
    reason: str


Delivery = list[RequestOutput | Refused]
Command = Callable[[Engine], Refused | None]


class EngineLoop:
    """Owns an engine; every call but `start` returns at once.

    The engine is built in the thread that uses it, because the current CUDA device is that of a thread.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._built = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._engine: Engine | None = None
        self.failure: BaseException | None = None
        self.statistics: EngineStatistics  # of the last step

    def start(self) -> None:
        """Build the engine and begin; raises what building raises."""
        self._thread.start()
        self._built.wait()
        if self._engine is None:
            assert self.failure is not None
            raise self.failure

    def attach(self, on_outputs: Callable[[Delivery], None], on_death: Callable[[], None]) -> None:
        """Say where outputs go; before the first request.

        Args:
            on_outputs: called in the engine's thread after every step that made something.
            on_death: called in the engine's thread when it ends by a failure, which `failure` then holds.
        """
        self._on_outputs, self._on_death = on_outputs, on_death

    @property
    def engine(self) -> Engine:
        """The engine, for what does not change in it; its requests belong to the thread."""
        assert self._engine is not None, "the loop was not started"
        return self._engine

    @property
    def alive(self) -> bool:
        """Whether requests are being computed."""
        return self._thread.is_alive() and self.failure is None

    def submit(self, request_id: str, prompt: EncodedPrompt, params: SamplingParams, *, stream: bool) -> None:
        """Hand over a request; streamed outputs are increments."""

        def add(engine: Engine) -> Refused | None:
            try:
                engine.add_request(request_id, prompt, params, stream=stream, increments=stream)
            except InvalidPrompt as error:
                return Refused(request_id, str(error))
            return None

        self._commands.put(add)

    def abort(self, request_id: str) -> None:
        """End a request, if it has not ended; its pages are free before the next step."""

        def end(engine: Engine) -> None:
            engine.abort(request_id)

        self._commands.put(end)

    def stop(self, timeout: float = 10.0) -> None:
        """End every request and the thread."""
        self._commands.put(None)
        self._thread.join(timeout)

    def _main(self) -> None:
        try:
            engine = self._build()
            self.statistics = engine.statistics()
            self._engine = engine
        except BaseException as error:
            self.failure = error
            return
        finally:
            self._built.set()
        try:
            self._serve(self._engine)
        except BaseException as error:
            self.failure = error
            self._on_death()

    def _serve(self, engine: Engine) -> None:
        while True:
            made: Delivery = []
            for command in self._take(wait=not engine.has_unfinished()):
                if command is None:
                    engine.abort_all()
                    return
                if (refused := command(engine)) is not None:
                    made.append(refused)
            if engine.has_unfinished():
                made += engine.step()
            self.statistics = engine.statistics()
            if made:
                self._on_outputs(made)

    def _take(self, *, wait: bool) -> list[Command | None]:
        """The commands so far; with `wait` at least one."""
        commands = [self._commands.get()] if wait else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands
