"""Small tokenizers, trained in a moment: byte-level as GPT's, and SentencePiece-like with byte fallback as Llama's."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from penstock.serve.text import Tokenizer

CORPUS = ["the penstock feeds the turbine", "water under full pressure turns the wheel", "stop here and turn back"] * 8
CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(chat_template: str | None = None, *, begin: bool = False) -> Tokenizer:
    """Every text can be encoded, any bytes can be sampled; <eos> is token 0 and <pad> token 1.

    With `begin` every text is encoded with <pad> before it, as by tokenizers that add a begin token.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return Tokenizer(tokenizer)


def sentencepiece_like() -> Tokenizer:
    """Words carry their leading space, which the decoder strips from the first one; unknown characters become bytes."""
    words = ["\u2581the", "\u2581wheel", "\u2581turns", "s", "\u2581"]
    vocabulary = {word: index for index, word in enumerate(["<s>", *words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<s>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
