"""benchmarks/on_gpu.sh: the sequence and its summary, with a tiny network where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import environment
import on_gpu_summary
import precision_losses

# stands for the interpreter: what the case does not name runs as it is
WRAPPER = """#!/usr/bin/env bash
case "$*" in
{cases}
esac
exec "{python}" "$@"
"""


def run(tmp_path: Path, *arguments: str, cases: str = "", **variables: str):
    """Run the script; returns its exit code, what it said, and results.json if any."""
    wrapper = tmp_path / "python"
    wrapper.write_text(WRAPPER.format(cases=cases, python=sys.executable))
    wrapper.chmod(0o755)
    env = os.environ | {"PYTHON": str(wrapper), "GUIDED_DIFFUSION_DEVICE": "cpu"}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    results = tmp_path / "out" / "results.json"
    steps = json.loads(results.read_text()) if results.exists() else {}
    return done.returncode, done.stdout + done.stderr, steps


def statuses(steps):
    return {name: step["status"] for name, step in steps.items()}


def test_all_steps_run_and_one_that_fails_stops_none(tmp_path):
    code, said, steps = run(
        tmp_path, "out", cases='*benchmarks/inference.py*) echo "no!"; exit 3 ;;'
    )
    assert code == 1, said
    assert statuses(steps) == {
        "tests": "passed",
        "radiographs": "passed",
        "losses": "passed",
        "memory_fp32": "passed",
        "memory_fp16": "skipped",
        "memory_bf16": "passed",
        "train_step": "passed",
        "inference": "FAILED",
        "sampling": "passed",
        "kernels": "passed",
        "compiled": "skipped",
    }, said
    assert steps["inference"]["detail"] == "exit code 3: no!"
    assert "skipped" in steps["tests"]["detail"]  # what needs a GPU
    runs = steps["losses"]["figures"]["runs"]
    assert list(runs) == ["fp32", "bf16"]
    assert all(len(run["loss"]) == 8 for run in runs.values())
    assert steps["memory_fp32"]["figures"]["peak"] < steps["memory_fp32"]["figures"]["limit"]
    assert len(steps["kernels"]["figures"]["profiles"]["whole step fp32"]) == 10
    assert (tmp_path / "out" / "losses.png").stat().st_size > 0
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in said
    assert "8 passed, 1 FAILED, 2 skipped" in summary
    assert "no CUDA card: a tiny network on the CPU" in said
    assert "Not run, for want of a CUDA card: float16" in said

    code, said, _ = run(tmp_path, "out")
    assert code == 2
    assert "out holds the results of an earlier run" in said


def test_a_step_that_hangs_ends_with_its_time(tmp_path):
    cases = """
*environment.py*) echo '{"device": "cpu", "missing_for_tests": []}' >"$3"; exit 0 ;;
"-m pytest"*) echo begun; exec sleep 1000 ;;
*benchmarks/*.py*|*tools/*.py*)
    case "$*" in *on_gpu_summary*) ;; *) exit 0 ;; esac ;;
"""
    code, said, steps = run(tmp_path, "--toy", "out", cases=cases, LIMIT_S="10")
    assert code == 1, said
    assert steps["tests"]["status"] == "FAILED"
    assert steps["tests"]["detail"].startswith("stopped after ")
    assert steps["tests"]["detail"].endswith(": begun")
    assert steps["radiographs"] | {"figures": None} == {
        "status": "skipped",
        "seconds": 0,
        "detail": "no time left of 10 s",
        "figures": None,
    }


def test_missing_packages_end_it_in_one_line(tmp_path, monkeypatch, capsys):
    assert environment.missing({"json": "json", "no_such_module": "no-such-package"}) == [
        "no-such-package"
    ]
    monkeypatch.setattr(environment, "NEEDED", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(sys, "argv", ["environment.py"])
    assert environment.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith("name a folder that holds them in PYTHONPATH\n")
    assert "pip install no-such-package" in said
    code, said, _ = run(tmp_path, "out", cases="*environment.py*) exit 2 ;;")
    assert code == 2
    assert not (tmp_path / "out" / "steps.tsv").exists()


def losses(*values, scale=1.0):
    return {"loss": list(values), "mse": list(values), "loss_scale": scale}


@pytest.mark.parametrize(
    ("half", "fault"),
    [
        (losses(9.0, 9.0, 1.02, 1.02), None),
        (
            losses(1.0, 1.0, 1.2, 1.1),
            "fp16: loss 1.15 over the second half of the steps, in fp32 1",
        ),
        (losses(1.0, float("nan"), 1.0, 1.0), "fp16: loss is not finite in 1 of 4"),
        (losses(1.0, 1.0, 1.0, 1.0, scale=0.5), "fp16: the loss scale has fallen to 0.5"),
    ],
)
def test_losses_are_compared(tmp_path, half, fault):
    runs = {"fp32": losses(1.0, 1.0, 1.0, 1.0), "fp16": half}
    faults = precision_losses.compare(runs, 0.05)
    assert faults[0].startswith(fault) if fault else not faults
    json.dumps(precision_losses.for_json(half), allow_nan=False)
    precision_losses.plot(str(tmp_path / "curves.png"), runs)
    assert (tmp_path / "curves.png").exists()


def test_fewer_steps_where_time_is_short(monkeypatch, capsys):
    settings = precision_losses.Settings(steps=300, seconds=100.0)
    experiment = object.__new__(precision_losses.Experiment)
    experiment.settings = settings
    monkeypatch.setattr(precision_losses.Experiment, "run", lambda *args: {"seconds_per_step": 0.5})
    steps = experiment.affordable_steps(["fp32", "fp16"])
    assert 90 <= steps <= 100
    assert f"{steps} of 300 steps" in capsys.readouterr().out


def test_a_limit_on_memory(script, tmp_path):
    flags = "--image_size 8 --in_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1"
    flags = [*flags.split(), "--num_head_channels", "16", "--attention_resolutions", "8"]
    flags += ["--device", "cpu", "--precision", "fp32", "--json", tmp_path / "out.json"]
    ended = script("step_memory.py", *flags, "--limit_gb", "0.001")
    assert ended.code == 1, ended.err
    assert "ABOVE 0.001 GB" in ended.out
    assert json.loads((tmp_path / "out.json").read_text())["peak"] > 1e6
    ended = script("step_memory.py", *flags[:-4], "--precision", "fp16")
    assert ended.code == 2
    assert "needs CUDA" in ended.err


def test_the_summary_of_steps_that_all_pass(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "one.log").write_text("first\nlast\n\n")
    (tmp_path / "steps.tsv").write_text("one\tpassed\t3\t\ntwo\tskipped\t0\tneeds a card\n")
    monkeypatch.setattr(sys, "argv", ["on_gpu_summary.py", str(tmp_path)])
    assert on_gpu_summary.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "one  passed      3 s  last",
        "two  skipped     0 s  needs a card",
        "1 passed, 0 FAILED, 1 skipped in 3 s",
    ]


def test_what_runs_on_a_card(tmp_path):
    """The commands for a card of 85 GB, which here do nothing."""
    said = tmp_path / "commands"
    found = {"device": "cuda", "memory_gb": 84.9, "missing_for_tests": [], "compiler": "gcc"}
    cases = f"""
*environment.py*) echo '{json.dumps(found | {"triton": True})}' >"$3"; exit 0 ;;
*on_gpu_summary*) ;;
"-m pytest"*|*benchmarks/*.py*|*tools/*.py*) echo "$*" >>{said}; exit 0 ;;
"""
    code, printed, steps = run(tmp_path, "out", cases=cases)
    assert code == 0, printed
    assert set(statuses(steps).values()) == {"passed"}
    commands = {}
    for command in said.read_text().splitlines():
        commands.setdefault(command.split()[0], []).append(command)
    (trained,) = commands["benchmarks/precision_losses.py"]
    for flags in ("--steps 300 --seconds 100", "--image_size 256", "--in_channels 1", "--lr 1e-4"):
        assert flags in trained
    assert trained.endswith("--microbatch -1")
    memory = commands["benchmarks/step_memory.py"]
    assert [c.split("--precision ")[1].split()[0] for c in memory] == ["fp32", "fp16", "bf16"]
    assert all("--microbatch 1 --limit_gb 8" in command for command in memory)
    timed, profiled = commands["benchmarks/train_step.py"]
    assert "--precision fp32,fp16,bf16 --batch_size 8" in timed
    assert "--profile 10" in profiled
    assert any("--compile True" in command for command in commands["benchmarks/sampling.py"])
    assert all("--device cuda" in command for command in (trained, *memory, timed, profiled))
