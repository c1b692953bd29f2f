"""The command line as a user meets it: what it prints, where, and with which exit code."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import cli

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "penstock"]


def environment(**changes):
    """The environment of a command run apart; the interpreter is for tests of kernels."""
    plain = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PENSTOCK_CHECK")}
    return {**plain, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


def apart(*arguments, **changes):
    """Runs the command in a process of its own."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment(**changes), timeout=120)


@pytest.fixture
def here(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama of two small layers with a tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>", "<pad>"], initial_alphabet=bytes_, show_progress=False
    )
    backend.train_from_iterator(["the penstock feeds the turbine"] * 8, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- help and usage


def test_help_is_quick_and_imports_no_torch():
    program = "import sys; from penstock.cli import main; main(['--help']); print(sys.modules.keys() & {'torch', 'rich'})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "set()"
    for command in ("generate", "serve", "ops", "bench", "doctor"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["generate", "serve", "ops", "doctor", "bench"])
def test_every_command_has_help(here, command):
    code, out, err = here(command, "--help")
    assert code == 0 and "Usage: penstock" in out and err == ""


def test_no_command_shows_help_and_is_wrong_usage(here):
    code, out, err = here()
    assert code == 2 and out == "" and err.startswith("Usage: penstock")


def test_version(here):
    import penstock

    assert here("--version") == (0, f"{penstock.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generat"], "No such command 'generat'"),
        (["generate", "demo"], "Missing option '--prompt'"),
        (["generate", "demo", "--prompt", "x", "--temperature", "warm"], "Invalid value for '--temperature'"),
        (["generate", "demo", "--prompt", "x", "--temperature", "-1"], "`temperature` must be a number ≥ 0, got -1.0"),
        (["generate", "demo", "--prompt", "x", "--top-p", "0"], "`top_p` must be a number in (0, 1], got 0.0"),
        (["generate", "demo", "--prompt", "x", "--max-tokens", "0"], "`max_tokens` must be"),
        (["generate", "demo", "--prompt", "x", "--dtype", "int8"], "`dtype` must be one of auto, float32"),
        (["generate", "demo", "--prompt", "x", "--device", "tpu"], '`device` must be "auto", "cpu"'),
        (["ops", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["ops", "--device", "cuda:99"], "--device cuda:99: there are"),
    ],
)
def test_wrong_usage_is_one_line(here, arguments, said):
    code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


# ---- failures


def test_a_model_that_is_not_there(here):
    code, out, err = here("generate", "/no/such/model", "--prompt", "x")
    assert (code, out) == (1, "")
    assert err.startswith("error: model '/no/such/model': there is no such folder") and err.count("\n") == 1


def test_an_empty_folder(here, tmp_path):
    code, out, err = here("generate", str(tmp_path), "--prompt", "x")
    assert (code, out) == (1, "")
    assert "has no config.json" in err and err.count("\n") == 1


def test_a_prompt_that_is_too_long(here, tiny):
    code, out, err = here("generate", tiny, "--prompt", "x" * 300, "--max-model-len", "64", "--device", "cpu")
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and "64" in err and err.count("\n") == 1


def test_an_unforeseen_error_names_its_class_and_debug_shows_where(here, monkeypatch):
    def fail():
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(cli, "catalogue", fail)
    assert here("ops") == (1, "", "error: ZeroDivisionError: by nought (`penstock --debug ...` shows where)\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "ops"])


# ---- ops, doctor, bench


def test_ops_lists_every_implementation(here):
    import torch

    import penstock.ops
    from penstock.core.op import Op

    code, out, err = here("ops", "--device", "cpu")
    assert (code, err) == (0, "")
    rows = {tuple(line.split()[:3]) for line in out.splitlines()}
    for operator in [value for value in vars(penstock.ops).values() if isinstance(value, Op)]:
        for name, reason in operator.availability(torch.device("cpu")).items():
            assert (operator.name, name, "no" if reason else "yes") in rows
            assert reason in out
        assert (operator.name, "reference", "yes") in rows


def test_doctor_is_content_here():
    done = apart("doctor", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for word in ("python", "torch", "transformers", "triton", "PENSTOCK_CHECK", "threads", "bfloat16 on the cpu", "operators"):
        assert word in done.stdout
    assert "on: kernels run on the CPU, slowly" in done.stdout


def test_doctor_names_what_is_broken():
    done = apart("doctor", PENSTOCK_CHECK="often")
    assert done.returncode == 1
    assert "PENSTOCK_CHECK must be 'static' or 'values', got 'often'" in done.stdout
    assert done.stderr.startswith("error: PENSTOCK_CHECK") and done.stderr.count("\n") == 1


# ---- generate


def test_generate_streams_text_and_tells_what_ran(here, tiny):
    code, out, err = here("generate", tiny, "--prompt", "the turbine", "--max-tokens", "12", "--ignore-eos", "--device", "cpu")
    assert code == 0 and out.endswith("\n")
    assert re.search(r"^rms_norm +cpu +triton: needs a CUDA device", err, re.MULTILINE)
    assert re.search(r"^attention_decode +\S+", err, re.MULTILINE)
    assert re.search(r"tokens in, 12 out \(length\), time to first token \d+ ms, then [\d.]+ tokens per second", err)


def test_generate_without_stats_says_nothing_on_stderr(here, tiny):
    options = ("--max-tokens", "8", "--device", "cpu", "--no-stats", "--seed", "3")
    first, again = [here("generate", tiny, "--prompt", "the turbine", *options) for _ in range(2)]
    assert first[0] == 0 and first[2] == ""
    assert first == again


def test_generate_is_what_the_library_generates(here, tiny):
    from penstock.serve.llm import LLM
    from penstock.serve.params import SamplingParams

    llm = LLM(tiny, device="cpu", max_num_seqs=1)
    wanted = llm.generate("the turbine", SamplingParams(max_tokens=24, temperature=0), progress=False)[0].outputs[0].text
    arguments = ("--max-tokens", "24", "--temperature", "0", "--device", "cpu", "--no-stats")
    assert here("generate", tiny, "--prompt", "the turbine", *arguments)[1] == wanted + "\n"


def test_generate_reads_the_prompt_from_stdin(here, tiny, monkeypatch):
    options = ("--max-tokens", "8", "--device", "cpu", "--no-stats", "--seed", "3")
    given = here("generate", tiny, "--prompt", "the turbine", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the turbine\n"))
    assert here("generate", tiny, "--prompt", "-", *options) == given


def test_generate_with_a_chat_template(here, tiny):
    options = ("--max-tokens", "8", "--device", "cpu", "--no-stats", "--temperature", "0")
    plain = here("generate", tiny, "--prompt", "[system]be brief[user]the wheel[assistant]", *options)
    assert here("generate", tiny, "--prompt", "the wheel", "--system", "be brief", *options) == plain
    chat = here("generate", tiny, "--prompt", "the wheel", "--chat", *options)
    assert chat == here("generate", tiny, "--prompt", "[user]the wheel[assistant]", *options)


def test_the_bundled_model(here):
    code, out, err = here(
        "generate", "demo", "--prompt", "A generator is", "--max-tokens", "16", "--device", "cpu", "--ignore-eos", "--seed", "0"
    )
    assert code == 0, err
    assert len(out.split()) >= 4


# ---- signals and pipes


def begin(tiny):
    """A generation that goes on for long, after its first text has come."""
    options = ("--ignore-eos", "--max-tokens", "4000", "--device", "cpu", "--no-stats")
    command = [*COMMAND, "generate", tiny, "--prompt", "the turbine", *options]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        # A test run in the background may have been told to ignore interruptions, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    assert running.stdout.read(1), running.stderr.read()
    return running


def test_interruption_is_one_line_and_130(tiny):
    running = begin(tiny)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, b"interrupted\n")


def test_a_reader_that_leaves_is_no_error(tiny):
    running = begin(tiny)
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(timeout=60) == 1


def test_ops_into_a_pipe_that_closes():
    command = f"{' '.join(COMMAND)} ops --device cpu | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
