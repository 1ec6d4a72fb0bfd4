"""Command lines, flags and files that README, docs/, docstrings and shell files name exist.

How documents write them: documents_util.py. Nothing is run.
"""

import importlib.util
import re

import pytest
from command_lines_util import fault, unknown_flags, value_fault
from documents_util import (
    Code,
    commands,
    docstring_codes,
    documents,
    markdown_codes,
    project_codes,
    shell_codes,
)
from paths import ROOT

# scripts of other repositories that the documents name
OTHERS_FILES = ("train.py",)
FOLDERS = ("scripts", "tools", "benchmarks", "tests", "guided_diffusion")


def faults_of(codes):
    """The first fault of each code, with its place."""
    found = []
    for code in codes:
        faults = [
            *map(fault, commands(code)),
            *(f"no script has {flag}" for flag in unknown_flags(code)),
            value_fault(code),
            missing_name(code),
            *missing_words(code),
        ]
        found += [f"{code.place}: {text}" for text in filter(None, faults)][:1]
    return found


def missing_words(code: Code) -> list[str]:
    """Files of this project, and targets of its Makefile, that a command line names in vain."""
    words = re.split(r"\s+", code.text) if not code.mention or " " in code.text else []
    files = [word for word in words if re.fullmatch(r"(?:flags|docs|tests)/[\w/.-]+\.\w+", word)]
    made = re.match(r"make ([a-z]\w*)", code.text)
    targets = (ROOT / "Makefile").read_text()
    return [
        *(f"there is no {file}" for file in files if not (ROOT / file).exists()),
        *([f"no {made[0]}"] if made and not re.search(rf"^{made[1]}:", targets, re.M) else []),
    ]


def missing_name(code: Code) -> str | None:
    """The file or module of this project that a code in prose names although it does not exist."""
    text = code.text
    if not code.mention or text in OTHERS_FILES:
        return None
    if re.fullmatch(r"guided_diffusion(\.\w+)+", text):
        return None if _is_name(text) else f"there is no {text}"
    path = re.fullmatch(r"([\w./-]+?)(:[\w.]+)?", text)
    below = path and path[1].split("/")[0] in (*FOLDERS, "flags", "docs")
    if path and (path[1].endswith(".py") or (below and "." in path[1])):
        places = [ROOT, *(ROOT / folder for folder in FOLDERS)]
        exists = any((place / path[1]).exists() for place in places)
        if not exists and "/" not in path[1]:
            exists = any((ROOT / "guided_diffusion").rglob(path[1]))
        return None if exists else f"there is no {path[1]}"
    return None


def _is_name(dotted: str) -> bool:
    """Whether a module exists, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        file = ROOT.joinpath(*parts[:end])
        if file.with_suffix(".py").exists() or file.is_dir():
            if end == len(parts):
                return True
            found = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def test_what_the_documents_name_exists():
    codes = project_codes()
    found = [command for code in codes for command in commands(code)]
    assert len(found) > 250
    assert {"README.md", "docs/data.md", "tools/demo.sh", "scripts/predict.py"} <= {
        command.code.file for command in found
    }
    faults = faults_of(codes)
    assert not faults, "\n" + "\n".join(faults)


def test_every_page_is_read():
    assert {"README.md", "CONTRIBUTING.md"} | {f.name for f in (ROOT / "docs").glob("*.md")} <= {
        page.name for page in documents()
    }


FINETUNE = "python scripts/finetune.py CHECKPOINT IMG MASK"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{FINETUNE} --epochs 20", None),
        (f"{FINETUNE} --epoch 20", "--epoch"),
        (f"{FINETUNE} --epochs many", "--epochs"),
        (f"{FINETUNE} --epochs N", None),
        (f"{FINETUNE} --epochs -5", "--epochs"),
        (f"{FINETUNE} --resize stretch", "stretch"),
        (f"{FINETUNE} --log_interval 10", "ignores --log_interval"),
        (f"{FINETUNE} $TRAIN_FLAGS", None),
        (f"{FINETUNE} --no_binary --wandb True", None),
        ("python scripts/predict.py --save_uncertainty MODEL RADIOGRAPHS", None),
        ("python tools/pack_model.py --overwrite MODEL OUT", "--overwrite"),
        ("python tools/pack_model.py --config mine.yaml MODEL OUT", None),
        ("python scripts/image_train.py --config flags/unet.yaml", None),
        (f"{FINETUNE} --resize pad|crop", None),
        (f"{FINETUNE} --resize pad|stretch", "stretch"),
        (f"{FINETUNE} [VAL_IMG VAL_MASK] [--resize stretch]", "stretch"),
        (f"{FINETUNE} --epochs \\\n        20 --epoch 1", "--epoch"),
        (f"{FINETUNE} # --epoch 3", None),
        (f"{FINETUNE} --epochs 3 && python scripts/probe.py RUN", "required"),
        ("python scripts/finetune.py CHECKPOINT", "required"),
        ("python scripts/finetune.py CHECKPOINT ...", None),
        ("python scripts/finetune.py CHECKPOINT ... --epoch 3", "--epoch"),
        ("mpiexec -n 4 python scripts/image_train.py --data-dir D --batch 3", "--batch"),
        ("python scripts/image_train.py --data_dir D $MODEL_FLAGS $DIFFUSION_FLAGS", None),
        ("python scripts/predict.py segm.pth $MODEL_FLAGS", "--image_size"),
        ("python scripts/pretrain.py --data_dir D", "does not exist"),
        ("python benchmarks/train_step.py --thread 1", "--thread"),
        ("python tools/prepare_data.py --action analyze --action-on x", "--action-on"),
        ("source flags/unet_large.sh", "there is no flags/unet_large.sh"),
    ],
)
class TestFaults:
    def test_in_a_block_of_a_page(self, line, words):
        for block in (f"    {line}", f"```sh\n{line}\n```"):
            faults = faults_of(markdown_codes(f"A page\n\nwith\n\n{block}\n", "page.md"))
            assert len(faults) == (words is not None), faults
            if words:
                place = "page.md:5" if block.startswith(" ") else "page.md:6"
                assert faults[0].startswith(f"{place}: ")
                assert words in faults[0]

    def test_in_a_shell_file(self, line, words):
        faults = faults_of(shell_codes(f"cd x\nrun {line}\n", "a.sh"))
        assert len(faults) == (words is not None), faults
        assert not words or (words in faults[0] and faults[0].startswith("a.sh:2: "))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("finetune.py --epochs", None),
        ("finetune.py --epochs 3", None),
        ("finetune.py --epoch 3", "--epoch"),
        ("finetune.py --resize stretch", "stretch"),
        ("scripts/finetune.py CHECKPOINT IMG MASK", None),
        ("scripts/finetune.py CHECKPOINT", "required"),
        ("scripts/pretrain.py", "scripts/pretrain.py does not exist"),
        ("make demo", None),
        ("make it", "no make it"),
        ("python scripts/evaluate.py A B --categories flags/classes.json", "flags/classes.json"),
        ("--epochs", None),
        ("--epoch", "no script has --epoch"),
        ("-o/--output", None),
        ("-o/--outputs", "no script has --outputs"),
        ("--timesteps 1,50", None),
        ("--k 5 --sampler ddim", "no script has all"),
        ("--resize stretch", "stretch"),
        ("torchrun --nproc_per_node 4", None),
        ("flags/unet.yml", "there is no flags/unet.yml"),
        ("flags/unet.sh", None),
        ("images/readings.py", "there is no"),
        ("images/reading.py:normalize", None),
        ("guided_diffusion.images.reading.ReadingConfig", None),
        ("guided_diffusion.images.reading.Config", "there is no"),
        ("segm.pth", None),
    ],
)
def test_code_in_prose(code, words):
    text = f"| a | b |\n| - | - |\n| c | `{code}` |\n" if "|" not in code else f"c `{code}`"
    faults = faults_of(markdown_codes(f"Prose of\ntwo lines with\n`{code}`.\n\n{text}\n", "p.md"))
    found = {fault.split(": ")[0] for fault in faults}
    assert found == ({"p.md:3", "p.md:7"} if words else set()), faults
    assert all(words in fault for fault in faults)


def test_docstrings_of_scripts():
    source = (
        '"""Does it.\n\nprobe.py RUN_FOLDER    all is well\nprobe.py RUN_FOLDER SPLIT --out\n"""\n'
    )
    faults = faults_of(docstring_codes(source, "scripts/probe.py"))
    assert [fault.split(": ")[0] for fault in faults] == [
        "scripts/probe.py:3",
        "scripts/probe.py:4",
    ]
    source = '"""Does it.\n\n    python scripts/probe.py RUN\n        SPLIT --epochs 3\n"""\n'
    assert "--epochs" in faults_of(docstring_codes(source, "scripts/probe.py"))[0]


def test_variables_are_those_of_the_flags_file_that_is_sourced():
    page = "    source flags/unet_small.sh\n    python scripts/image_sample.py --model_path M {}\n"
    (one,) = commands(markdown_codes(page.format("$SAMPLE_FLAGS"), "p.md")[1])
    assert "--sampler" in one.arguments
    (one,) = commands(markdown_codes(page.format("$SAMPLE_FLAGS").replace("_small", ""), "p.md")[1])
    assert "--timestep_respacing" in one.arguments
