"""The command line writes what it says, and a GPU session survives a part that fails."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from penstock.bench.cli import app

ROOT = Path(__file__).resolve().parents[2]


def test_one_operator_from_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ["rms_norm", "--device", "cpu", "--quick", "--output", str(tmp_path), "--no-host"])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "rms_norm.json").read_text())
    assert [result["case"] for result in document["results"]] == ["decode_row", "head_norm"]
    assert "ceilings: copy" in done.output and "torch F.rms_norm" in done.output


def test_a_wrong_name_says_what_there_is():
    done = CliRunner().invoke(app, ["rms_morn", "--device", "cpu"])
    assert done.exit_code == 2
    assert "no operator rms_morn" in done.output


def test_the_session_survives_an_operator_that_crashes(tmp_path):
    command = [sys.executable, "benchmarks/gpu_session.py", "--device", "cpu", "--quick", "--minutes", "1"]
    command += ["--parts", "operators", "--operators", "no_such_operator", "--output", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "no_such_operator: no numbers, exit status 2" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"operators.json", "session.log", "summary.txt"}


def test_a_process_that_hangs_is_ended_and_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from watched import watch

    heard = []
    with open(tmp_path / "log", "w") as log:
        code = "import time; print('alive', flush=True); time.sleep(60)"
        slow = watch([sys.executable, "-c", code], log, 1.0, heard.append)
        silent = watch([sys.executable, "-c", code], log, 30.0, heard.append, silence=1.0)
        good = watch([sys.executable, "-c", "print('done')"], log, 30.0, heard.append)
        bad = watch([sys.executable, "-c", "print('why'); raise SystemExit(3)"], log, 30.0, heard.append)
    assert slow.fault == "stopped at its limit of 1 s" and slow.seconds < 20
    assert silent.fault == "stopped after 1 s without a word"
    assert (good.fault, bad.fault) == ("", "exit status 3: why")
    assert heard == ["alive", "alive", "done", "why"]


def test_results_of_a_session_are_filed_by_device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from file_results import file_results

    full = {"environment": {"device": "NVIDIA H200"}, "results": [{"case": "a"}]}
    (tmp_path / "operators.json").write_text(json.dumps({"operators": {"rms_norm": full, "none": {"results": []}}}))
    (tmp_path / "engine.json").write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "rows": [1]}))
    filed = [path for name in ("operators", "engine") for path in file_results(tmp_path / f"{name}.json", tmp_path / "results")]
    assert [path.relative_to(tmp_path).as_posix() for path in filed] == [
        "results/nvidia-h200/rms_norm.json",
        "results/nvidia-h200/engine.json",
    ]
