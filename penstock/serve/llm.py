"""The offline interface: `LLM(model).generate(prompts)`; calling forms and names are vLLM's."""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.serve.config import EngineConfig, SpeculativeConfig
from penstock.serve.drafters import Drafter, DraftModel
from penstock.serve.engine import EncodedPrompt, Engine, InvalidPrompt, Runner
from penstock.serve.outputs import RequestOutput
from penstock.serve.params import SamplingParams
from penstock.serve.text import ChatError, Tokenizer, TokenizerError, load_tokenizer


class LLM:
    """A model ready to generate.

    Args:
        model: folder of a Hugging Face checkpoint, or "demo".
        tokenizer: folder of the tokenizer, or a tokenizer already loaded; None takes the model's.
        progress: called with (bytes read, bytes in all) while the checkpoint is read.
        runner: computes the plans in place of the model; the model is then not read.
        others: see EngineConfig.
    Raises: InvalidConfig, FileNotFoundError, TokenizerError or the runner's ModelError, each with the reason.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | str | None = None,
        page_size: int | None = None,
        skip_tokenizer_init: bool = False,
        enforce_eager: bool = False,
        enable_prefix_caching: bool | None = None,
        speculative: Mapping[str, Any] | SpeculativeConfig | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner | None = None,
    ) -> None:
        loaded = tokenizer if isinstance(tokenizer, Tokenizer) else None
        config = EngineConfig(
            model=model,
            tokenizer=None if isinstance(tokenizer, Tokenizer) else tokenizer,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            page_size=page_size,
            skip_tokenizer_init=skip_tokenizer_init,
            enforce_eager=enforce_eager,
            enable_prefix_caching=enable_prefix_caching,
            speculative=speculative,
            seed=seed,
        )
        if not skip_tokenizer_init and loaded is None:  # before the weights: it fails sooner
            loaded = load_tokenizer(config.tokenizer_path)
        drafter = load_drafter(config)  # before the model, whose pages take the memory that is left
        if runner is None:
            from penstock.serve.runner import Runner as ModelRunner

            runner = ModelRunner.load(config, progress=progress)
        self.engine = Engine(config, runner, loaded, drafter)
        self._names = itertools.count()
        self._inboxes: dict[str, deque[RequestOutput]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises if there is none."""
        if self.engine.tokenizer is None:
            raise TokenizerError("there is no tokenizer: skip_tokenizer_init=True")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt; the outputs in the order of the prompts.

        Args:
            prompts: one prompt or a list of them; a prompt is text, a list of token ids, {"prompt": text} or
                {"prompt_token_ids": token ids}.
            sampling_params: for all, or one for each prompt.
            progress: show a bar on stderr; None shows it on a terminal.
            use_tqdm: vLLM's name for `progress`.
        Raises: InvalidPrompt naming every prompt that cannot run, before any runs.
        """
        several = _as_list(prompts)
        all_params = _params_for(several, sampling_params)
        encoded = self._encode_all(several, all_params)
        return self._run(encoded, all_params, use_tqdm if progress is None else progress)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of a conversation, or of each of several.

        Args:
            messages: a list of {"role": …, "content": …}, or a list of such lists.
            chat_template: in place of the tokenizer's.
            chat_template_kwargs: more variables for the template.
        Raises: InvalidPrompt naming every conversation that cannot run, before any runs.
        """
        single = isinstance(messages, (list, tuple)) and all(isinstance(message, Mapping) for message in messages)
        conversations = [messages] if single else _as_list(messages)
        all_params = _params_for(conversations, sampling_params)
        prompts: list[Any] = []
        reasons = []
        for index, conversation in enumerate(conversations):
            try:
                text = self.tokenizer.render_chat(
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
                token_ids = self.tokenizer.encode(text, add_special_tokens=False)
                prompts.append({"prompt": text, "prompt_token_ids": token_ids})
            except ChatError as error:
                reasons.append(f"conversation {index}: {error}")
        if reasons:
            raise InvalidPrompt("; ".join(reasons))
        encoded = self._encode_all(prompts, all_params)
        return self._run(encoded, all_params, use_tqdm if progress is None else progress)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt and yield after every token; each output holds all the text so far.

        The prompt is checked at once; the request runs while the iterator is read and is aborted when it is closed.
        """
        params = _params_for([prompt], sampling_params)[0]
        return self._stream(self.engine.encode(prompt, params), params)

    def _stream(self, encoded: EncodedPrompt, params: SamplingParams) -> Iterator[RequestOutput]:
        name = self._submit(encoded, params, stream=True)
        try:
            finished = False
            while not finished:
                output = self._next(name)
                finished = output.finished
                yield output
        finally:
            del self._inboxes[name]
            self.engine.abort(name)

    def _run(
        self, encoded: list[EncodedPrompt], all_params: list[SamplingParams], progress: bool | None
    ) -> list[RequestOutput]:
        names: list[str] = []
        try:
            with _Bar(len(encoded), sys.stderr.isatty() if progress is None else progress) as bar:
                for prompt, params in zip(encoded, all_params, strict=True):
                    names.append(self._submit(prompt, params, stream=False))
                left = dict.fromkeys(names)
                while left:
                    for name in self._pump():
                        left.pop(name, None)
                    bar.show(len(names) - len(left))
            return [self._inboxes[name].popleft() for name in names]
        except BaseException:
            self.engine.abort_all()  # an interruption may have hit any line, so not only these
            raise
        finally:
            for name in names:
                del self._inboxes[name]

    def _submit(self, prompt: EncodedPrompt, params: SamplingParams, *, stream: bool) -> str:
        name = str(next(self._names))
        self.engine.add_request(name, prompt, params, stream=stream)
        self._inboxes[name] = deque()
        return name

    def _next(self, name: str) -> RequestOutput:
        while not self._inboxes[name]:
            self._pump()
        return self._inboxes[name].popleft()

    def _pump(self) -> list[str]:
        """One step; its outputs go to whoever asked, who may be another iterator than the one that pumps.

        Returns: the names that got an output.
        """
        outputs = self.engine.step()
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.append(output)
        return [output.request_id for output in outputs]

    def _encode_all(self, prompts: Sequence[Any], all_params: list[SamplingParams]) -> list[EncodedPrompt]:
        encoded, reasons = [], []
        for index, (prompt, params) in enumerate(zip(prompts, all_params, strict=True)):
            try:
                encoded.append(self.engine.encode(prompt, params))
            except InvalidPrompt as error:
                reasons.append(f"prompt {index}: {error}")
        if reasons:
            raise InvalidPrompt("; ".join(reasons))
        return encoded


def load_drafter(config: EngineConfig) -> Drafter | None:
    """The smaller model of speculative={"method": "draft"}; None where there is none."""
    speculation = config.speculation
    if speculation is None or speculation.method != "draft":
        return None
    from penstock.serve.runner import Runner as ModelRunner

    assert speculation.model is not None
    own = replace(
        config,
        model=speculation.model,
        speculative=None,
        max_model_len=None,
        kv_cache_memory=speculation.kv_cache_memory,
    )
    runner = ModelRunner.load(own)
    return DraftModel(
        runner,
        max_num_seqs=own.max_num_seqs,
        max_num_batched_tokens=own.max_num_batched_tokens,
        keep_probs=speculation.verification == "rejection",
    )


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several, as several; a list that begins with an integer is the tokens of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise InvalidPrompt(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    if prompts and hasattr(prompts[0], "__index__"):
        return [list(prompts)]
    return list(prompts)


def _params_for(prompts: Sequence[Any], params: Any) -> list[SamplingParams]:
    """One SamplingParams for each prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if not isinstance(params, (list, tuple)) or not all(isinstance(entry, SamplingParams) for entry in params):
        raise TypeError("sampling_params must be SamplingParams or a list of them")
    if len(params) != len(prompts):
        raise ValueError(f"sampling_params must be one for all or one for each of {len(prompts)} prompts, got {len(params)}")
    return list(params)


class _Bar:
    """How many requests are done, on stderr."""

    def __init__(self, total: int, visible: bool) -> None:
        self._total = total
        self._visible = visible and total > 0

    def __enter__(self) -> "_Bar":
        if self._visible:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("Requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("requests", total=self._total)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            self._progress.stop()

    def show(self, done: int) -> None:
        """Set the number done."""
        if self._visible:
            self._progress.update(self._task, completed=done)
