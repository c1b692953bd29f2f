"""Train the checkpoint bundled in penstock/serve/demo: a small Llama that has read only Python's own documentation.

The text ships with the interpreter, so the whole run needs no network: python scripts/train_demo.py
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from demo_text import gather, split
from demo_tokenizer import build_tokenizer, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TARGET = Path(__file__).resolve().parent.parent / "penstock" / "serve" / "demo"
PROMPTS = ["The with statement is used to", "Return a new list containing", "If the argument is a string,"]
CHAT_PROMPT = "What does list.append do?"
CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
---

# Penstock demo

A Llama of {parameters:,} parameters (4 layers, hidden 256, 4 query heads and 2 key-value heads of 64, tied embeddings,
2,048 positions, byte-level BPE of 4,096) that lets Penstock run end to end with no download. It writes fluent-looking
Python documentation; what it says is not to be believed.

- **Text**: {characters:,} characters that ship with CPython {python}: the language reference of `pydoc`, docstrings and
  prose comments of the standard library, the licence. Questions in the chat format were made from the docstrings.
  The text is under the PSF License Version 2 and the notices in CPython's `LICENSE`.
- **Training**: {step:,} steps of {batch_tokens:,} tokens ({epochs:.1f} epochs) on {hardware}, {minutes:.1f} minutes,
  contexts of 512 and 2,048, AdamW, cosine schedule. The step with the best validation loss was kept. Losses are
  in `train_log.jsonl`.
- **Validation loss**: {loss:.3f} nats per token in bfloat16, on {validation_tokens:,} tokens of held-out documents.
- **Command**: `python scripts/train_demo.py {arguments}`

Continuations, the first greedy, the others at temperature 0.7 and top-p 0.9:

{samples}
"""


class Stream:
    """An endless row of token ids: the documents end to end, in a new order each epoch; step n always gets the same."""

    def __init__(self, documents: list[list[int]], batch: int, seed: int):
        self.documents, self.batch, self.seed = documents, batch, seed
        self.steps_per_epoch = sum(map(len, documents)) // batch
        self.epoch = -1

    def step(self, step: int) -> torch.Tensor:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = torch.randperm(len(self.documents), generator=torch.Generator().manual_seed(self.seed + epoch))
            self.ids = torch.tensor([token for i in order.tolist() for token in self.documents[i]])
            self.epoch = epoch
        # One step in eight sees whole 2048-token contexts, so that late positions are trained as well.
        return self.ids[index * self.batch : (index + 1) * self.batch].view(-1, 2048 if step % 8 == 7 else 512)


def validation_loss(model, ids: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.float().item() for rows in ids.to(model.device).split(8)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 percent, then a cosine down to a fiftieth of the peak."""
    if progress < 0.03:
        return peak * (progress + 0.0005) / 0.0305
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97))))


def train(model, stream: Stream, validation, options, partial: Path) -> list[dict]:
    """Run the schedule; the best weights so far are always complete in `partial`/best.pt. Returns the log."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    state = {"step": 0, "seconds": 0.0, "best": math.inf, "log": []}
    if options.resume:
        saved = torch.load(partial / "state.pt")
        state = saved["state"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    start, losses = time.monotonic() - state["seconds"], []
    for step in range(state["step"], options.steps):
        seconds = time.monotonic() - start
        # On a slow machine the clock, not the step count, drives the schedule, so that the rate always comes down.
        progress = max(step / options.steps, seconds / (60 * options.minutes))
        if progress >= 1:
            break
        rate = learning_rate(progress, options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = stream.step(step).to(model.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"training loss must be finite, got {losses[-1]} at step {step}")
        if (step + 1) % options.log_every == 0:
            held_out = validation_loss(model, validation)
            record = {
                "step": step + 1,
                "tokens": (step + 1) * stream.batch,
                "loss": round(sum(losses) / len(losses), 4),
                "validation_loss": round(held_out, 4),
                "learning_rate": round(rate, 7),
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(record), flush=True)
            losses.clear()
            state["log"].append(record)
            state |= {"step": step + 1, "seconds": record["seconds"]}
            if held_out < state["best"]:
                state["best"] = held_out
                save(model.state_dict(), partial / "best.pt")
            saved = {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(saved, partial / "state.pt")
    return state["log"]


def save(content, path: Path) -> None:
    torch.save(content, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def export(partial: Path, model, tokenizer) -> Path:
    """The Hugging Face folder, in bfloat16, complete before any of it reaches the target."""
    folder = partial / "checkpoint"
    model.load_state_dict(torch.load(partial / "best.pt"))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def continuations(folder: Path) -> list[str]:
    """One greedy and several sampled continuations by the exported checkpoint."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": CHAT_PROMPT}], tokenize=False, add_generation_prompt=True)
    torch.manual_seed(0)
    texts = []
    for index, prompt in enumerate([*PROMPTS, chat]):
        encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=prompt is not chat)
        sampling = {"do_sample": False, "temperature": None, "top_p": None} if index == 0 else {}
        output = model.generate(**encoded, max_new_tokens=80, **sampling)
        texts.append(tokenizer.decode(output[0]))
    return texts


def model_card(facts: dict, best: dict, final: dict, samples: list[str]) -> str:
    fields = {**facts, "step": best["step"], "epochs": best["tokens"] / facts["tokens_per_epoch"]}
    quoted = "\n\n".join("```text\n" + sample + "\n```" for sample in samples)
    return CARD.format(**fields, minutes=best["seconds"] / 60, loss=final["validation_loss"], samples=quoted)


def gathered(path: Path | None) -> dict:
    """The documents and the version of Python they shipped with; a machine with a bare Python may read another's."""
    if path and path.exists():
        return json.loads(path.read_text("utf-8"))
    text = {"python": platform.python_version(), "documents": gather()}
    if path:
        path.write_text(json.dumps(text), "utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--minutes", type=float, default=46, help="the schedule ends here if the steps take longer")
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a step, a multiple of 2048")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, help="where the gathered text is kept: read if it is there, else written")
    parser.add_argument("--resume", action="store_true", help="go on from the last log line of an interrupted run")
    options = parser.parse_args()
    if options.batch % 2048:
        parser.error(f"--batch must be a multiple of 2048, got {options.batch}")
    partial = options.out.with_name(options.out.name + ".partial")
    if not options.resume:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    text = gathered(options.text)
    train_texts, validation_texts = split(text["documents"])
    tokenizer = build_tokenizer(train_texts, vocab_size=4096)
    encode = tokenizer.backend_tokenizer.encode_batch
    train_ids, validation_ids = (
        [e.ids for e in encode(texts, add_special_tokens=False)] for texts in (train_texts, validation_texts)
    )
    stream = Stream(train_ids, options.batch, options.seed)
    validation = Stream(validation_ids, 40 * 512, options.seed).step(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(options.device)
    facts = {
        "python": text["python"],
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
        "documents": len(train_texts),
        "characters": sum(map(len, train_texts)),
        "tokens_per_epoch": sum(map(len, train_ids)),
        "validation_tokens": validation.numel(),
        "batch_tokens": options.batch,
        "steps": options.steps,
        "seed": options.seed,
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else "one CPU thread",
        "arguments": f"--device {options.device} --steps {options.steps} --batch {options.batch}",
    }
    print(json.dumps(facts), flush=True)
    try:
        log = train(model, stream, validation, options, partial)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {options.out} is untouched; --resume goes on from the last log line") from None
    if not log:
        raise SystemExit(f"nothing to save: no validation within {options.minutes} minutes; lower --log-every")

    folder = export(partial, model, tokenizer)
    best = min(log, key=lambda record: record["validation_loss"])
    loss = validation_loss(AutoModelForCausalLM.from_pretrained(folder), validation)
    final = {"saved_step": best["step"], "dtype": "bfloat16", "validation_loss": round(loss, 4)}
    print(json.dumps(final))
    lines = [json.dumps(record) + "\n" for record in (facts, *log, final)]
    (folder / "train_log.jsonl").write_text("".join(lines), "utf-8")
    samples = continuations(folder)
    for sample in samples:
        print("-" * 8, sample, sep="\n")
    (folder / "README.md").write_text(model_card(facts, best, final, samples), "utf-8")
    options.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        os.replace(path, options.out / path.name)
    shutil.rmtree(partial)


if __name__ == "__main__":
    main()
